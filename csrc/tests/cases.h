// One case of the kernel tests: a shape, a dtype and options. Creates its inputs, runs the core on them with the
// current instruction set and team, and compares the results with the oracle within error bounds.
#pragma once
#include <string>
#include <vector>

#include "reference.h"

namespace bnfast::test {

struct Case {
    Shape shape;
    DType dtype = DType::float32;
    Activation act = Activation::none;
    bool affine = true, residual = false, mask = false, training = true;
    double offset = 0;
    double negative_slope = 0.2;
    std::string text() const;
};

// Shapes for every kernel layout: packed and plain columns, short and long rows, one chunk and many.
const std::vector<Shape>& kernel_shapes();
constexpr Activation smooth_activations[] = {Activation::silu,         Activation::hard_silu, Activation::sigmoid,
                                             Activation::hard_sigmoid, Activation::tanh,      Activation::gelu,
                                             Activation::gelu_tanh,    Activation::elu,       Activation::selu,
                                             Activation::softplus,     Activation::mish};
// A small set of option combinations in which every option occurs with the others.
std::vector<Case> cases_of(Shape shape, DType dtype);

struct Inputs {
    Array x, dy, residual, mask, gamma, beta;
    explicit Inputs(const Case& c);
    Inputs shifted() const;  // a copy, each array moved one value off its 64-byte line
};

struct Forward {
    Array y, moving_mean, moving_variance;
    std::vector<double> mean, variance, invstd;
    double count = 0;
    bool same_bits(const Forward& other) const;
};
Forward run_train(const Case& c, const Inputs& in, int shift = 0);

struct Backward {
    Array dx, dresidual, dgamma, dbeta;
    bool same_bits(const Backward& other) const;
};
// by_y: passes the forward's y instead of residual.
Backward run_grad(const Case& c, const Inputs& in, const Forward& forward, int shift = 0, bool by_y = false);

// The largest ratio of error to bound (1: the error equals its bound); `what` names the value.
struct Worst {
    long double ratio = 0;
    std::string what = "nothing";
    void add(const char* name, std::int64_t i, long double actual, long double expected, long double bound);
};
Worst check_forward(const Case& c, const Inputs& in, const Forward& out);
Worst check_backward(const Case& c, const Inputs& in, const Forward& forward, const Backward& out);

std::string smallest_isa();  // the one that every processor of the architecture has: baseline or neon

// Sets the instruction set and thread count, and restores the defaults on destruction.
struct Settings {
    Settings(const std::string& isa, int threads);  // threads > 0: a full team even for small tensors
    ~Settings();
};
bool same(const std::vector<double>& a, const std::vector<double>& b);  // bit by bit, but any NaN equals any NaN

}  // namespace bnfast::test
