// One case of the kernel tests: a shape, a dtype and the options; its inputs, what the core makes of them on whatever
// instruction set and team is set, and how far that may be from the oracle.
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

// Every layout of the kernels: packed and plain columns, short, long and several rows, one and many chunks.
const std::vector<Shape>& kernel_shapes();
// The options, so mixed that each meets every other one somewhere.
std::vector<Case> cases_of(Shape shape, DType dtype);

struct Inputs {
    Array x, dy, residual, mask, gamma, beta;
    explicit Inputs(const Case& c);
    Inputs shifted() const;  // the same, one value off their lines
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
// by_y: with the forward's y in place of residual.
Backward run_grad(const Case& c, const Inputs& in, const Forward& forward, int shift = 0, bool by_y = false);

// The largest error over its bound (1: on the bound); `what` names where it stands.
struct Worst {
    long double ratio = 0;
    std::string what = "nothing";
    void add(const char* name, std::int64_t i, long double actual, long double expected, long double bound);
};
Worst check_forward(const Case& c, const Inputs& in, const Forward& out);
Worst check_backward(const Case& c, const Inputs& in, const Forward& forward, const Backward& out);

// Puts the settings back when a test ends, however it ends.
struct Settings {
    Settings(const std::string& isa, int threads);  // threads > 0: a whole team, however small the tensor
    ~Settings();
};
bool same(const std::vector<double>& a, const std::vector<double>& b);  // bits; NaN equals NaN

}  // namespace bnfast::test
