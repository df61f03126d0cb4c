// Errors of the activation functions in units in the last place, for activation_test.cpp and exhaustive.cpp. The
// functions are called through infer (mean 0, variance 1, epsilon 0) and, for gradients, through the frozen grad with
// dy = 1: the kernels that users run.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "reference.h"

namespace bnfast::test {

struct Function {
    std::string name;
    Activation activation;
    bool gradient;
    double bound(DType dtype) const;  // documented largest error
};
const std::vector<Function>& all_functions();  // values and gradients of the smooth activations

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
std::vector<double> sample_of_doubles(int count);  // all magnitudes, both signs, more around the curved parts

Array result_of(const Function& f, const Array& x);
std::vector<double> values_of(const Function& f, DType dtype, const std::vector<double>& x);

struct Errors {
    double ulp = 0, at = 0;
    bool nan_passes = true;
};
// The unit is that of the exact result. Where a gradient crosses 0 no fixed number of digits helps: below 1/16 in
// magnitude and |z| < 3, the unit is that of 1/16.
Errors errors_of(const Function& f, DType dtype, const std::vector<double>& x, const std::vector<double>& y);
}  // namespace bnfast::test
