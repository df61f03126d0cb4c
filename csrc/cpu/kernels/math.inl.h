// exp, log(1 + e) and the normal distribution, as straight-line code on vectors: one text for every instruction set,
// with the same bits. No libm, no tables, no branches, and no FMA (-ffp-contract=off).
//
//   exp_of(hi, lo)   exp(hi + lo) for hi + lo <= 0, as scale*(1 + rest), optionally 2^lift times as large, so that a
//                    caller may multiply before the result becomes subnormal and is rounded
//   log1p_of(e)      log(1 + e) for 0 <= e <= 1
//   tail_of(t)       Phi(-t) = exp(-t^2/2)*ratio for t >= 0, Phi being the distribution function (1 + erf(z/sqrt(2)))/2
//
// Everything else is made of these three with arguments of one sign, so that nothing cancels (activation.inl.h). NaN
// passes through. bench/coefficients.py makes the polynomials; the number beside each is its error relative to the
// function. docs/activations.md has the errors of the whole functions, measured over all float32 values.
#pragma once
#include "simd.inl.h"

namespace bnfast {
namespace {

template <class V> struct Math;
template <> struct Math<F32v> {
    using T = float;
    using U = U32v;
    static constexpr int exponent_at = 23, exponent_bias = 127;
    static constexpr T round = 0x1.8p23f;      // v + round - round is the integer nearest to v
    static constexpr T ln2_hi = 0x1.62e4p-1f;  // 15 bits: n*ln2_hi is exact
    static constexpr T ln2_lo = 0x1.7f7d1cp-20f;
    static constexpr int lift = 64;
    static constexpr T drop = 0x1p-64f;          // undoes the lift
    static constexpr T far = 128;                // exp(-far)*far rounds to 0, and its lifted form is normal
    static constexpr T far_tail = 15;            // so does Phi(-far_tail)*far_tail
    static constexpr U low_half = U{} + 0xfffu;  // the bits that the square of the others has no room for
    static constexpr T exp[] = {                 // 2^-26.1
                                0x1.fffffep-2f, 0x1.5554b0p-3f, 0x1.55570ep-5f, 0x1.1227d4p-7f, 0x1.6b7c8ep-10f};
    static constexpr T log[] = {// 2^-33.0
                                0x1.555558p-4f, 0x1.9996dcp-7f, 0x1.25046ep-9f, 0x1.b73bdap-12f, 0x1.f0494ep-14f};
    static constexpr T tanh[] = {// 2^-29.7
                                 -0x1.55554ap-2f, 0x1.110cf6p-3f, -0x1.b920aap-5f, 0x1.58fc42p-6f, -0x1.99bc86p-8f};
    static constexpr T tail_zero = 0, tail_pole = 2.5f;
    static constexpr T tail[] = {// 2^-27.2
                                 0x1.400000p+0f, -0x1.3e4ed6p+0f, 0x1.5b3110p-3f, 0x1.2c26a4p-2f,
                                 0x1.7c3b72p-5f, -0x1.b8daecp-4f, 0x1.adcf52p-6f, -0x1.0a7150p-3f,
                                 0x1.9258eap-4f, 0x1.434896p-6f,  -0x1.7c35fap-6f};
};
template <> struct Math<F64v> {
    using T = double;
    using U = U64v;
    static constexpr int exponent_at = 52, exponent_bias = 1023;
    static constexpr T round = 0x1.8p52;
    static constexpr T ln2_hi = 0x1.62e42fefap-1;  // 37 bits
    static constexpr T ln2_lo = 0x1.cf79abc9e3b3ap-40;
    static constexpr int lift = 512;
    static constexpr T drop = 0x1p-512;
    static constexpr T far = 800;
    static constexpr T far_tail = 39;
    static constexpr U low_half = U{} + 0x7ffffffu;
    static constexpr T exp[] = {// 2^-55.6
                                0x1.0000000000005p-1,  0x1.555555555553fp-3,  0x1.55555555520d3p-5,
                                0x1.1111111117758p-7,  0x1.6c16c17f46e06p-10, 0x1.a01a017deb8f5p-13,
                                0x1.a019a645559c1p-16, 0x1.71de731366ca4p-19, 0x1.28a2fb55296bdp-22,
                                0x1.ae8e94f3ce540p-26};
    static constexpr T log[] = {// 2^-64.5
                                0x1.5555555555556p-4,  0x1.9999999999665p-7,  0x1.24924924b9874p-9,
                                0x1.c71c71aa32d61p-12, 0x1.745d1d58bd5b9p-14, 0x1.3b12e6538e464p-16,
                                0x1.11223d7973529p-18, 0x1.dff80ff5f36f8p-21, 0x1.c0e507f227defp-23,
                                0x1.2079aad15cdbep-25, 0x1.4fabe774ec067p-26};
    static constexpr T tanh[] = {// 2^-55.4
                                 -0x1.555555555548fp-2,  0x1.1111111101959p-3,  -0x1.ba1ba1acacbc1p-5,
                                 0x1.664f459e1430ap-6,   -0x1.226dd9679ad45p-7, 0x1.d6c59fc8dde1dp-9,
                                 -0x1.7ceed6564d71bp-10, 0x1.2f852e9c50f29p-11, -0x1.b8482500b0ec2p-13,
                                 0x1.a9e4bcc9c3c38p-15};
    static constexpr T tail_zero = 1, tail_pole = 3;
    static constexpr T tail[] = {
        // 2^-54.8
        0x1.0bdb2e039df32p+0,   -0x1.26c966e2f7d49p+0,  0x1.4044950c6cd2bp-1,   -0x1.6c8f4488c1905p-5,
        -0x1.b22146a38c487p-4,  0x1.8c9bace29bfffp-8,   0x1.a744681d22bffp-6,   0x1.3e29dc53b3845p-8,
        -0x1.6994c9926f764p-8,  -0x1.da433cd69efaap-9,  0x1.ec64d233392cep-16,  0x1.331cc330f95b0p-10,
        0x1.524bce079b1f2p-11,  -0x1.0be38937c723bp-16, -0x1.eb24676fc5509p-13, -0x1.1fd355af06ecep-13,
        -0x1.e1ffba29b923cp-15, 0x1.0e9d5aba1c589p-16,  0x1.eab4c0a9234e3p-13,  -0x1.b418cfeeaa056p-13,
        -0x1.6b561d01a843fp-13, 0x1.8b1f30c80d758p-11,  -0x1.fa6cef8410a7cp-11, 0x1.43abdc857f85dp-11,
        -0x1.a155e3883ca7ep-13, 0x1.b1a6360c8b627p-16};
};

template <class V, class T> BNFAST_INLINE V all(T value) { return value - V{}; }
// min(v, top); NaN stays NaN, as x86's minimum returns the second operand then. GCC 12 makes four instructions of the
// generic form.
BNFAST_INLINE F32v at_most(F32v v, float top) {
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    return (F32v)_mm512_min_ps(_mm512_set1_ps(top), (__m512)v);
#elif BNFAST_VBYTES == 32 && defined(__AVX2__)
    return (F32v)_mm256_min_ps(_mm256_set1_ps(top), (__m256)v);
#elif defined(__x86_64__)
    return (F32v)_mm_min_ps(_mm_set1_ps(top), (__m128)v);
#else
    return v > top ? all<F32v>(top) : v;
#endif
}
BNFAST_INLINE F64v at_most(F64v v, double top) {
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    return (F64v)_mm512_min_pd(_mm512_set1_pd(top), (__m512d)v);
#elif BNFAST_VBYTES == 32 && defined(__AVX2__)
    return (F64v)_mm256_min_pd(_mm256_set1_pd(top), (__m256d)v);
#elif defined(__x86_64__)
    return (F64v)_mm_min_pd(_mm_set1_pd(top), (__m128d)v);
#else
    return v > top ? all<F64v>(top) : v;
#endif
}
template <class V> BNFAST_INLINE typename Math<V>::U sign_bit(V v) {
    using U = typename Math<V>::U;
    return bits_as<U>(v) & ((U{} + 1) << (sizeof(v[0]) * 8 - 1));
}
template <class V> BNFAST_INLINE V magnitude(V v) {
    using U = typename Math<V>::U;
    return bits_as<V>(bits_as<U>(v) ^ sign_bit(v));
}

// c[0] + c[1]*v + c[2]*v^2 + ..., even and odd powers in a chain of their own, which halves the latency: gelu in
// float64 takes 0.7x the time.
template <class V, class T, int n> BNFAST_INLINE V polynomial(V v, const T (&c)[n]) {
    const V vv = v * v;
    V high = all<V>(c[n - 1]), low = all<V>(c[n - 2]);  // the chains of powers n - 1, n - 3, ... and n - 2, n - 4, ...
    _Pragma("GCC unroll 32") for (int i = n - 3; i >= 0; --i) {
        V& sum = (n - 1 - i) % 2 ? low : high;
        sum = sum * vv + c[i];
    }
    return n % 2 ? high + low * v : low + high * v;
}

template <class V> struct Exponential {  // scale*(1 + rest), scale being a power of 2
    V scale, rest;
    BNFAST_INLINE V value() const { return scale + scale * rest; }
};

// exp(-t)*2^lift for 0 <= t <= far, where t = hi + lo, and lo are the digits of t that hi has no room for.
template <class V> BNFAST_INLINE Exponential<V> exp_of_minus(V hi, V lo, bool has_lo, int lift) {
    using M = Math<V>;
    using T = typename M::T;
    using U = typename M::U;
    const V shifted = (has_lo ? hi + lo : hi) * T(0x1.71547652b82fep0) + M::round, n = shifted - M::round;
    const V r = (n * M::ln2_hi - hi) + (has_lo ? n * M::ln2_lo - lo : n * M::ln2_lo);  // in +-ln(2)/2
    // The lowest bits of `shifted` are n.
    const U scale = ((M::exponent_bias + lift) - bits_as<U>(shifted)) << M::exponent_at;
    return {bits_as<V>(scale), r + r * r * polynomial(r, M::exp)};
}
// exp(-t)*2^lift for t >= 0. Beyond `far` the result is that of `far`.
template <class V> BNFAST_INLINE V lifted_exp(V t) {
    return exp_of_minus(at_most(t, Math<V>::far), V{}, false, Math<V>::lift).value();
}
// exp(-t) - 1 for t >= 0, with all its digits. At 40 it rounds to -1.
template <class V> BNFAST_INLINE V expm1_of_minus(V t) {
    const Exponential<V> e = exp_of_minus(at_most(t, typename Math<V>::T(40)), V{}, false, 0);
    return e.scale * e.rest + (e.scale - 1);
}

template <class V> BNFAST_INLINE V log1p_of(V e) {
    const V t = (e + e) / (e + 2);
    return t + t * (t * t) * polynomial(t * t, Math<V>::log);
}

template <class V> struct Tail {  // Phi(-t) = exp*ratio*drop
    V t, exp, ratio;
};
// t <= far_tail. t^2/2 is computed in two parts, because a rounding error in the exponent grows 100-fold in the result.
template <class V> BNFAST_INLINE Tail<V> tail_of(V t) {
    using M = Math<V>;
    using T = typename M::T;
    const V hi = bits_as<V>(bits_as<typename M::U>(t) & ~M::low_half);
    const V exp = exp_of_minus(T(0.5) * (hi * hi), T(0.5) * ((t - hi) * (t + hi)), true, M::lift).value();
    const V inverse = T(1) / (t + M::tail_pole);
    return {t, exp, polynomial((t - M::tail_zero) * inverse, M::tail) * inverse};
}

}  // namespace
}  // namespace bnfast
