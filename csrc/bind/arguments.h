// The argument lists of the functions in bnfast._core: one list per function, in positional order. Everything that
// depends on that order is generated from the list: the C++ declaration and definition, the signature that Python
// shows, and the positions that Callback fills. tests/core/test_signatures.py compares the lists with the Python side.
// The lists are macros because C++17 can't make parameter names from a constexpr table.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <string_view>

// clang-format off
#define BNFAST_TRAIN_ARGUMENTS(F)                                                                                     \
    F(x), F(gamma), F(beta), F(moving_mean), F(moving_variance), F(axis), F(momentum), F(epsilon), F(mask),           \
    F(activation), F(negative_slope), F(residual), F(correction), F(nan_policy), F(out)
#define BNFAST_INFER_ARGUMENTS(F)                                                                                     \
    F(x), F(moving_mean), F(moving_variance), F(gamma), F(beta), F(axis), F(epsilon),                                 \
    F(activation), F(negative_slope), F(residual), F(out)
#define BNFAST_GRAD_ARGUMENTS(F)                                                                                      \
    F(dy), F(x), F(mean), F(invstd), F(gamma), F(beta), F(axis), F(mask), F(activation), F(negative_slope),           \
    F(residual), F(y), F(training), F(dmean), F(dvariance), F(out), F(out_dresidual)
#define BNFAST_MOMENTS_ARGUMENTS(F) F(x), F(axis), F(mask)
#define BNFAST_GROUP_NORM_ARGUMENTS(F)                                                                                \
    F(x), F(groups), F(gamma), F(beta), F(axis), F(epsilon), F(activation), F(negative_slope), F(residual), F(out)
#define BNFAST_GROUP_NORM_GRAD_ARGUMENTS(F)                                                                           \
    F(dy), F(x), F(mean), F(invstd), F(groups), F(gamma), F(beta), F(axis), F(activation), F(negative_slope),         \
    F(residual), F(out), F(out_dresidual)
#define BNFAST_LAYER_NORM_ARGUMENTS(F)                                                                                \
    F(x), F(gamma), F(beta), F(axis), F(epsilon), F(activation), F(negative_slope), F(residual), F(out)
#define BNFAST_LAYER_NORM_GRAD_ARGUMENTS(F)                                                                           \
    F(dy), F(x), F(mean), F(invstd), F(gamma), F(beta), F(axis), F(activation), F(negative_slope), F(residual),       \
    F(out), F(out_dresidual)
// clang-format on

#define BNFAST_PARAMETER(name) pybind11::handle name
#define BNFAST_NAME(name) std::string_view(#name)

namespace bnfast::bind {

inline constexpr std::array train_names{BNFAST_TRAIN_ARGUMENTS(BNFAST_NAME)};
inline constexpr std::array infer_names{BNFAST_INFER_ARGUMENTS(BNFAST_NAME)};
inline constexpr std::array grad_names{BNFAST_GRAD_ARGUMENTS(BNFAST_NAME)};
inline constexpr std::array moments_names{BNFAST_MOMENTS_ARGUMENTS(BNFAST_NAME)};
inline constexpr std::array group_norm_names{BNFAST_GROUP_NORM_ARGUMENTS(BNFAST_NAME)};
inline constexpr std::array group_norm_grad_names{BNFAST_GROUP_NORM_GRAD_ARGUMENTS(BNFAST_NAME)};
inline constexpr std::array layer_norm_names{BNFAST_LAYER_NORM_ARGUMENTS(BNFAST_NAME)};
inline constexpr std::array layer_norm_grad_names{BNFAST_LAYER_NORM_GRAD_ARGUMENTS(BNFAST_NAME)};

// The argument names of one function: a view of one of the arrays above.
struct Names {
    const std::string_view* first;
    std::size_t count;
    template <std::size_t n>
    constexpr Names(const std::array<std::string_view, n>& names) : first(names.data()), count(n) {}
    constexpr const std::string_view* begin() const { return first; }
    constexpr const std::string_view* end() const { return first + count; }

    // The position of `name`, or `count` for an unknown name.
    constexpr std::size_t find(std::string_view name) const {
        std::size_t i = 0;
        while (i < count && first[i] != name) ++i;
        return i;
    }
};

// A position known at compile time; an unknown name is a compile error there.
constexpr std::size_t position(Names names, std::string_view name) {
    const std::size_t at = names.find(name);
    return at < names.count ? at : throw "no argument has this name";
}

// "train(x, gamma, ..., out, /)\n--\n\n": CPython reads __text_signature__ from a docstring that starts like this.
inline std::string signature(std::string_view function, Names names) {
    std::string text = std::string(function) + "(";
    for (const std::string_view name : names) text.append(name).append(", ");
    return text + "/)\n--\n\n";
}

}  // namespace bnfast::bind
