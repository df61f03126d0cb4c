// The inputs, outputs and attributes of the three ops, as TensorFlow's op definitions write them. ops.cpp registers
// them; kernels.cpp takes its positions from them. The ops are stateless.
//
//   BnfastTrain: x, moving_mean, moving_variance, momentum, epsilon, [gamma], [beta], [mask], [residual]
//             -> y, new_mean, new_variance (the updated moving statistics), saved (2, C): mean and invstd of the batch
//   BnfastInfer: x, moving_mean, moving_variance, epsilon, [gamma], [beta], [residual] -> y
//   BnfastGrad:  dy, x, saved, epsilon, [gamma], [beta], [mask], [y], [dmean, dvariance]
//             -> dx, dgamma, dbeta, [dresidual]
//
// Vectors are (C,) of type U; C is the extent of x along `axis`. mask: N*S weights of type W, which is float64 for
// float64 x and float32 otherwise. An optional input is a list of num_* tensors, 0 or 1 (statistics: 0 or 2).
// BnfastGrad takes y where the forward had both residual and activation. y is kept for the next layer anyway, so the
// residual needn't be kept too (ResNet50 at batch 16: 92 MB of 1356 MB). Only relu, relu6 and leaky_relu can be told
// from y: with any other activation `y` holds the residual. parameter_type is U; TensorFlow can't infer it for a
// BnfastGrad without gamma and beta. statistics_gradient tells the Python gradient to pass on the gradients of new_mean
// and new_variance: with momentum 0 these are the batch's own. momentum and epsilon are scalars and inputs, so that one
// kernel serves all their values: TensorFlow keeps a kernel for each set of attribute values. BnfastGrad's kernel
// doesn't read epsilon; its second derivative does.
#pragma once
#include <initializer_list>
#include <string_view>

namespace bnfast::tf {

inline constexpr const char* train_inputs[] = {"x: T",
                                               "moving_mean: U",
                                               "moving_variance: U",
                                               "momentum: double",
                                               "epsilon: double",
                                               "gamma: num_gamma * U",
                                               "beta: num_beta * U",
                                               "mask: num_mask * W",
                                               "residual: num_residual * T"};
inline constexpr const char* train_outputs[] = {"y: T", "new_mean: U", "new_variance: U", "saved: double"};
inline constexpr const char* train_attributes[] = {"W: {float, double} = DT_FLOAT",
                                                   "num_mask: int >= 0 = 0",
                                                   "num_residual: int >= 0 = 0",
                                                   "correction: int >= 0 = 0",
                                                   "nan_policy: {'propagate', 'skip_update'} = 'propagate'",
                                                   "statistics_gradient: bool = false"};

inline constexpr const char* infer_inputs[] = {"x: T",
                                               "moving_mean: U",
                                               "moving_variance: U",
                                               "epsilon: double",
                                               "gamma: num_gamma * U",
                                               "beta: num_beta * U",
                                               "residual: num_residual * T"};
inline constexpr const char* infer_outputs[] = {"y: T"};
inline constexpr const char* infer_attributes[] = {"num_residual: int >= 0 = 0"};

inline constexpr const char* grad_inputs[] = {"dy: T",
                                              "x: T",
                                              "saved: double",
                                              "epsilon: double",
                                              "gamma: num_gamma * U",
                                              "beta: num_beta * U",
                                              "mask: num_mask * W",
                                              "y: num_y * T",
                                              "statistics: num_statistics * U"};
inline constexpr const char* grad_outputs[] = {"dx: T", "dgamma: parameter_type", "dbeta: parameter_type",
                                               "dresidual: num_y * T"};
inline constexpr const char* grad_attributes[] = {"W: {float, double} = DT_FLOAT", "num_mask: int >= 0 = 0",
                                                  "num_y: int >= 0 = 0", "num_statistics: int >= 0 = 0",
                                                  "parameter_type: {float, double}"};

inline constexpr const char* common_attributes[] = {
    "T: {half, bfloat16, float, double}",
    "U: {float, double} = DT_FLOAT",
    "num_gamma: int >= 0 = 0",
    "num_beta: int >= 0 = 0",
    "axis: int = -1",
    "activation: {'none', 'relu', 'relu6', 'leaky_relu', 'silu', 'hard_silu', 'sigmoid', 'hard_sigmoid', 'tanh', "
    "'gelu', "
    "'gelu_tanh', 'elu', 'selu', 'softplus', 'mish'} = 'none'",
    "negative_slope_bits: int = 0",
};

// The position of the input or output `name`: a compile error for an unknown name, and for a name behind an optional
// tensor, because that position depends on the call.
template <std::size_t n> constexpr int position(const char* const (&specs)[n], std::string_view name) {
    for (std::size_t i = 0; i < n; ++i) {
        const std::string_view spec = specs[i];
        if (spec.substr(0, spec.find(':')) == name) return int(i);
        if (spec.find('*') != spec.npos) throw "the position depends on how many optional tensors there are";
    }
    throw "no input or output has this name";
}

// Whether the specs end with these names, in this order.
template <std::size_t n>
constexpr bool ends_with(const char* const (&specs)[n], std::initializer_list<std::string_view> names) {
    std::size_t i = n - names.size();
    for (const std::string_view name : names) {
        const std::string_view spec = specs[i++];
        if (spec.substr(0, spec.find(':')) != name) return false;
    }
    return true;
}

}  // namespace bnfast::tf
