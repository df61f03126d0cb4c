// The activation functions and their gradients, on vectors.
//
//   activate   y = f(z)                 gate   dz = dy*f'(z), from z alone
//
// relu, relu6 and leaky_relu are a comparison, inlined into every kernel. The others are 20 to 120 instructions, so
// they exist once per compute type: a kernel takes a pointer from the table below once per call, and calls it per
// vector (docs/performance/activations.md). With w = exp(-|z|), which lies in [0, 1], most functions are a fraction of
// two polynomials in w, one for each sign of z; only sums of positive terms occur. Where a function goes to 0 for z to
// -infinity, w stays lifted (math.inl.h) until the last multiplication, so that subnormal results are rounded once.
// NaN passes through. +-infinity gives the limit: silu(-infinity) is 0.
#pragma once
#include "math.inl.h"

namespace bnfast {
namespace {

// ---- values ---------------------------------------------------------------------------------------------------------

#define BNFAST_FUNCTION template <class V, class T = typename Math<V>::T> BNFAST_INLINE V

// z >= 0 ? positive : negative*drop, both divided by the same divisor.
BNFAST_FUNCTION by_sign(V z, V positive, V negative, V divisor) {
    return (z >= T(0) ? positive : negative) / divisor * (z >= T(0) ? all<V>(T(1)) : all<V>(Math<V>::drop));
}

BNFAST_FUNCTION sigmoid(V z) {
    const V w = lifted_exp(magnitude(z));
    return by_sign(z, all<V>(T(1)), w, w * Math<V>::drop + T(1));
}
BNFAST_FUNCTION silu(V z) {
    const V t = at_most(magnitude(z), Math<V>::far), w = lifted_exp(t);
    return by_sign(z, z, -t * w, w * Math<V>::drop + T(1));
}
BNFAST_FUNCTION tanh(V z) {
    const V zz = z * z, t = magnitude(z), w = lifted_exp(t + t) * Math<V>::drop;
    const V near = z + z * zz * polynomial(zz, Math<V>::tanh);
    const V far = bits_as<V>(bits_as<typename Math<V>::U>(T(1) - T(2) * w / (w + T(1))) | sign_bit(z));
    return t < T(0.55) ? near : far;
}
BNFAST_FUNCTION gelu(V z) {
    const Tail<V> p = tail_of(at_most(magnitude(z), Math<V>::far_tail));
    const V tail = p.exp * p.ratio;
    return z >= T(0) ? z * (T(1) - tail * Math<V>::drop) : -p.t * tail * Math<V>::drop;
}
// gelu_tanh(z) = z*(1 + tanh(u(z)/2))/2 = z*sigmoid(u(z)) with u(z) = 2*sqrt(2/pi)*(z + 0.044715*z^3)
constexpr double gelu_slope = 1.5957691216057308, gelu_cubic = 0.07135481627260025;
BNFAST_FUNCTION gelu_tanh(V z) {
    const V t = at_most(magnitude(z), Math<V>::far_tail);
    const V w = lifted_exp(t * (t * t * T(gelu_cubic) + T(gelu_slope)));
    return by_sign(z, z, -t * w, w * Math<V>::drop + T(1));
}
BNFAST_FUNCTION elu(V z) { return z >= T(0) ? z : expm1_of_minus(magnitude(z)); }
constexpr double selu_scale = 1.0507009873554805, selu_alpha = 1.6732632423543772;
BNFAST_FUNCTION selu(V z) {
    const V e = expm1_of_minus(magnitude(z));
    return z >= T(0) ? z * T(selu_scale) : e * T(selu_scale * selu_alpha);
}
BNFAST_FUNCTION softplus(V z) { return (z >= T(0) ? z : V{}) + log1p_of(lifted_exp(magnitude(z)) * Math<V>::drop); }
// tanh(log(1 + e^z)) = ((1 + e^z)^2 - 1)/((1 + e^z)^2 + 1)
BNFAST_FUNCTION mish(V z) {
    const V t = at_most(magnitude(z), Math<V>::far), lifted = lifted_exp(t), w = lifted * Math<V>::drop;
    const V divisor = z >= T(0) ? T(2) * (w * (w + T(1))) + T(1) : w * (w + T(2)) + T(2);
    return by_sign(z, z * (w + w + T(1)), -t * (lifted * (w + T(2))), divisor);
}
BNFAST_FUNCTION hard_sigmoid(V z) {
    const V v = z + T(3);
    return (v <= T(0) ? V{} : at_most(v, T(6))) / T(6);
}
BNFAST_FUNCTION hard_silu(V z) { return (z < T(-3) ? all<V>(T(-3)) : z) * hard_sigmoid(z); }

// ---- gradients ------------------------------------------------------------------------------------------------------

// f'(z) + f'(-z) = 1 for silu and both gelus: z >= 0 ? 1 - negative : negative, where `negative` is still lifted.
BNFAST_FUNCTION mirrored(V z, V negative) {
    const V slope = negative * Math<V>::drop;
    return z >= T(0) ? T(1) - slope : slope;
}

BNFAST_FUNCTION sigmoid_slope(V z) {
    const V w = lifted_exp(magnitude(z)), one_more = w * Math<V>::drop + T(1);
    return w / (one_more * one_more) * Math<V>::drop;
}
BNFAST_FUNCTION silu_slope(V z) {
    const V t = at_most(magnitude(z), Math<V>::far), w = lifted_exp(t), one_more = w * Math<V>::drop + T(1);
    return mirrored(z, w * (one_more - t) / (one_more * one_more));
}
BNFAST_FUNCTION tanh_slope(V z) { return T(4) * sigmoid_slope(z + z); }
BNFAST_FUNCTION gelu_slope_of(V z) {
    const Tail<V> p = tail_of(at_most(magnitude(z), Math<V>::far_tail));
    return mirrored(z, p.exp * (p.ratio - p.t * T(0.3989422804014327)));  // 1/sqrt(2*pi)
}
BNFAST_FUNCTION gelu_tanh_slope(V z) {
    const V t = at_most(magnitude(z), Math<V>::far_tail), tt = t * t;
    const V w = lifted_exp(t * (tt * T(gelu_cubic) + T(gelu_slope))), one_more = w * Math<V>::drop + T(1);
    const V t_du = t * (tt * T(3 * gelu_cubic) + T(gelu_slope));
    return mirrored(z, w * (one_more - t_du) / (one_more * one_more));
}
BNFAST_FUNCTION elu_slope(V z) { return z >= T(0) ? all<V>(T(1)) : lifted_exp(magnitude(z)) * Math<V>::drop; }
BNFAST_FUNCTION selu_slope(V z) {
    const V w = lifted_exp(magnitude(z)) * T(selu_scale * selu_alpha) * Math<V>::drop;
    return z >= T(0) ? all<V>(T(selu_scale)) : w;
}
BNFAST_FUNCTION mish_slope(V z) {
    const V t = at_most(magnitude(z), Math<V>::far), lifted = lifted_exp(t), w = lifted * Math<V>::drop;
    const V positive_divisor = T(2) * (w * (w + T(1))) + T(1), negative_divisor = w * (w + T(2)) + T(2);
    const V divisor = z >= T(0) ? positive_divisor : negative_divisor, t4 = T(4) * t * (w + T(1));
    return by_sign(z, (w + w + T(1)) * positive_divisor + t4 * (w * w), lifted * ((w + T(2)) * negative_divisor - t4),
                   divisor * divisor);
}
BNFAST_FUNCTION hard_sigmoid_slope(V z) {
    return z <= T(-3) ? V{} : z >= T(3) ? V{} : z * T(0) + T(1.0 / 6);  // not of z + 3, which is rounded
}
BNFAST_FUNCTION hard_silu_slope(V z) { return z <= T(-3) ? V{} : z >= T(3) ? all<V>(T(1)) : (z + z + T(3)) / T(6); }

// ---- the table, and what kernels take -------------------------------------------------------------------------------

template <class V, class T> struct Function {
    V (*value)(V z, T negative_slope) noexcept;
    V (*gradient)(V z, V dy, T negative_slope) noexcept;
};

#define BNFAST_VALUE(function) [](V z, T) noexcept -> V { return function<V>(z); }
#define BNFAST_GRADIENT(slope) [](V z, V dy, T) noexcept -> V { return dy * slope<V>(z); }

// In the order of ActivationFunction.
template <class V, class T = typename Math<V>::T>
constexpr Function<V, T> functions[function_count] = {
    {[](V z, T) noexcept -> V { return z; }, [](V, V dy, T) noexcept -> V { return dy; }},
    {[](V z, T) noexcept -> V { return z <= T(0) ? V{} : z; },
     [](V z, V dy, T) noexcept -> V { return z <= T(0) ? V{} : dy; }},
    {[](V z, T) noexcept -> V { return z <= T(0) ? V{} : at_most(z, T(6)); },
     [](V z, V dy, T) noexcept -> V { return z <= T(0) ? V{} : (z >= T(6) ? V{} : dy); }},
    {[](V z, T slope) noexcept -> V { return z > T(0) ? z : z * slope; },
     [](V z, V dy, T slope) noexcept -> V { return z > T(0) ? dy : dy * slope; }},
    {BNFAST_VALUE(silu), BNFAST_GRADIENT(silu_slope)},
    {BNFAST_VALUE(hard_silu), BNFAST_GRADIENT(hard_silu_slope)},
    {BNFAST_VALUE(sigmoid), BNFAST_GRADIENT(sigmoid_slope)},
    {BNFAST_VALUE(hard_sigmoid), BNFAST_GRADIENT(hard_sigmoid_slope)},
    {BNFAST_VALUE(tanh), BNFAST_GRADIENT(tanh_slope)},
    {BNFAST_VALUE(gelu), BNFAST_GRADIENT(gelu_slope_of)},
    {BNFAST_VALUE(gelu_tanh), BNFAST_GRADIENT(gelu_tanh_slope)},
    {BNFAST_VALUE(elu), BNFAST_GRADIENT(elu_slope)},
    {BNFAST_VALUE(selu), BNFAST_GRADIENT(selu_slope)},
    {BNFAST_VALUE(softplus), BNFAST_GRADIENT(sigmoid)},
    {BNFAST_VALUE(mish), BNFAST_GRADIENT(mish_slope)},
};

// The activation of one kernel call. act says what is inlined (KernelActivation).
template <class X, int act> class Activated {
    using V = typename X::V;
    using T = typename X::T;
    const T bound, negative_slope;  // bound: 6 for relu6, NaN for relu: comparisons with it are false
    const Function<V, T> function;

public:
    explicit BNFAST_INLINE Activated(const ActivationArgs& a)
        : bound(T(a.bound)),
          negative_slope(T(a.negative_slope)),
          function(act == act_function ? functions<V>[a.function] : Function<V, T>{}) {}

    BNFAST_INLINE V activate(V z) const {
        if (act == act_relu) return z <= T(0) ? V{} : (z > bound ? bound - V{} : z);  // NaN fails both: it passes
        if (act == act_leaky) return z > T(0) ? z : z * negative_slope;
        if (act == act_function) return function.value(z, negative_slope);
        return z;
    }
    BNFAST_INLINE V gate(V z, V dy) const {
        if (act == act_relu) return z <= T(0) ? V{} : (z >= bound ? V{} : dy);
        if (act == act_leaky) return z > T(0) ? dy : dy * negative_slope;
        if (act == act_function) return function.gradient(z, dy, negative_slope);
        return dy;
    }
};

}  // namespace
}  // namespace bnfast
