// bnfast: batch normalization on the CPU. This header is the whole C++ API.
//
// An array is viewed as contiguous (N, C, S): N outer extents, C channels, S inner extents; M = N*S values per channel.
// Forward:  y = activation(gamma * (x - mean) * invstd + beta + residual),  invstd = 1/sqrt(variance + epsilon)
// Backward: dx = gamma*invstd * (dy - sum(dy)/M - xhat * sum(dy*xhat)/M),   xhat = (x - mean)*invstd
// Results depend only on values, shape, dtype and axis, not on thread count, alignment or instruction set.
// Inputs are never written, unless an output is given the same memory (in place). Functions are reentrant. They throw
// std::invalid_argument for a bad argument, before anything is written. Under NanPolicy::raise, train may throw
// NonFiniteError; only mean and variance have then been written.
// Per-channel vectors have shape (C,) and are float32 or float64, for every dtype of x. Statistics are float64.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#define BNFAST_VERSION "0.1.0"

namespace bnfast {

enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };
enum class Activation : int {
    none,
    relu,
    relu6,
    leaky_relu,
    silu,          // z*sigmoid(z)
    hard_silu,     // z*hard_sigmoid(z)
    sigmoid,       // 1/(1 + exp(-z))
    hard_sigmoid,  // relu6(z + 3)/6
    tanh,
    gelu,       // z*Phi(z) = z*(1 + erf(z/sqrt(2)))/2
    gelu_tanh,  // z*(1 + tanh(sqrt(2/pi)*(z + 0.044715*z^3)))/2
    elu,        // z < 0: exp(z) - 1
    selu,       // 1.0507*(z < 0 ? 1.6733*(exp(z) - 1) : z)
    softplus,   // log(1 + exp(z))
    mish        // z*tanh(softplus(z))
};
// Whether the gradient can be told from y, so that grad takes y in place of the residual.
constexpr bool gated_by_y(Activation a) { return int(a) <= int(Activation::leaky_relu); }
enum class NanPolicy : int { propagate, skip_update, raise };

struct Shape {
    std::int64_t N = 1, C = 1, S = 1;
    std::int64_t per_channel() const { return N * S; }
    std::int64_t size() const { return N * C * S; }
};
// The (N, C, S) view of a contiguous array, from its dims and channel axis. A negative axis counts from the end.
Shape shape_of(const std::int64_t* dims, int rank, int axis);

struct ConstVector {  // (C,) float32 or float64; null data means absent
    const void* data = nullptr;
    DType dtype = DType::float32;
};
struct Vector {
    void* data = nullptr;
    DType dtype = DType::float32;
};

struct TrainArgs {
    const void* x = nullptr;
    void* y = nullptr;  // exactly x, or disjoint from every input
    Shape shape;
    DType dtype = DType::float32;
    ConstVector gamma, beta;              // absent: 1 and 0
    Vector moving_mean, moving_variance;  // both or neither; moving = moving*momentum + batch*(1 - momentum)
    double momentum = 0.99, epsilon = 1e-3;
    const void* mask = nullptr;  // N*S weights >= 0: float64 for float64 x, else float32
    Activation activation = Activation::none;
    double negative_slope = 0.2;
    const void* residual = nullptr;  // like x; added before the activation
    int correction = 0;              // 1: moving_variance is updated with the sample variance, variance*W/(W - 1)
    NanPolicy nan_policy = NanPolicy::propagate;
    double *mean = nullptr, *variance = nullptr, *invstd = nullptr;  // (C,) results
};
// Returns W, the sum of the weights per channel (M without a mask). For an empty or fully masked batch, W, mean and
// variance are 0 and the moving statistics are unchanged.
double train(const TrainArgs& args);

struct InferArgs {
    const void* x = nullptr;
    void* y = nullptr;
    Shape shape;
    DType dtype = DType::float32;
    ConstVector moving_mean, moving_variance, gamma, beta;
    double epsilon = 1e-3;
    Activation activation = Activation::none;
    double negative_slope = 0.2;
    const void* residual = nullptr;
};
void infer(const InferArgs& args);

struct GradArgs {
    const void *dy = nullptr, *x = nullptr;
    void* dx = nullptr;  // exactly dy or x, or disjoint from every input
    Shape shape;
    DType dtype = DType::float32;
    ConstVector mean, invstd, gamma, beta;  // mean and invstd as train returned them
    const void* mask = nullptr;
    Activation activation = Activation::none;
    double negative_slope = 0.2;
    const void* residual = nullptr;
    const void* y = nullptr;       // train's y in place of the residual, where gated_by_y(activation)
    void* dresidual = nullptr;     // written if an activation and residual or y are given; x (if dx isn't) or disjoint
    bool training = true;          // false: mean and invstd are constants, dx = gamma*invstd*dy
    ConstVector dmean, dvariance;  // upstream gradients of the batch mean and variance
    Vector dgamma, dbeta;          // (C,) results
};
void grad(const GradArgs& args);

struct MomentsArgs {
    const void* x = nullptr;
    Shape shape;
    DType dtype = DType::float32;
    const void* mask = nullptr;
    double *mean = nullptr, *variance = nullptr;
};
double moments(const MomentsArgs& args);  // returns W, as train does

// ---- group norm; instance norm: G = C; layer norm over trailing axes: N rows of C values, G = 1 ------------------

struct GroupShape {  // contiguous (N samples, A, C channels, S), where A or S is 1; G groups of C/G channels each
    std::int64_t N = 1, A = 1, C = 1, S = 1, G = 1;
    std::int64_t size() const { return N * A * C * S; }
};

struct GroupNormArgs {
    const void* x = nullptr;
    void* y = nullptr;  // exactly x, or disjoint from every input
    GroupShape shape;
    DType dtype = DType::float32;
    ConstVector gamma, beta;  // (C,); absent: 1 and 0
    double epsilon = 1e-3;
    Activation activation = Activation::none;
    double negative_slope = 0.2;
    const void* residual = nullptr;             // like x; added before the activation
    double *mean = nullptr, *invstd = nullptr;  // (N, G) results; an empty group has mean and variance 0
};
void group_norm(const GroupNormArgs& args);

struct GroupNormGradArgs {
    const void *dy = nullptr, *x = nullptr;
    void* dx = nullptr;  // exactly dy or x, or disjoint from every input
    GroupShape shape;
    DType dtype = DType::float32;
    const double *mean = nullptr, *invstd = nullptr;  // (N, G), as group_norm returned them
    ConstVector gamma, beta;                          // beta: read if there is an activation
    Activation activation = Activation::none;
    double negative_slope = 0.2;
    const void* residual = nullptr;
    void* dresidual = nullptr;  // written if activation and residual are given; x (if dx isn't) or disjoint
    Vector dgamma, dbeta;       // (C,) results
};
void group_norm_grad(const GroupNormGradArgs& args);

struct NonFiniteError : std::runtime_error {
    explicit NonFiniteError(std::vector<std::int64_t> at);
    std::vector<std::int64_t> channels;
};

int get_num_threads();
void set_num_threads(int threads);  // 0 restores the default, min(affinity, cgroup quota)

// The instruction set in use: the one named by the environment variable BNFAST_ISA (read once at load), else the best
// one of this processor.
std::string isa_name();

}  // namespace bnfast
