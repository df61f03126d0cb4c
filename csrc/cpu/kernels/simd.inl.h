// SIMD vectors of the instruction set's full width, and the loads, stores and conversions of each dtype.
//
// The translation unit of each ISA includes this file once and defines BNFAST_VBYTES (16, 32 or 64). Everything here
// has internal linkage, and only C headers are included, so that the linker can't give this unit's code to a processor
// that lacks its instructions. Results never depend on the vector width: sums run over 64 virtual lanes (64/W vectors)
// and one fixed tree, conversions round to nearest even, and a*b + c is never contracted (-ffp-contract=off).
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../dispatch/kernel_table.h"

#define BNFAST_INLINE inline __attribute__((always_inline))
#define BNFAST_UNROLL _Pragma("GCC unroll 16")

namespace bnfast {
namespace {

constexpr int lanes = 64;  // virtual lanes of a sum, for every vector width

typedef float F32v __attribute__((vector_size(BNFAST_VBYTES)));
typedef double F64v __attribute__((vector_size(BNFAST_VBYTES)));
typedef uint32_t U32v __attribute__((vector_size(BNFAST_VBYTES)));
typedef uint64_t U64v __attribute__((vector_size(BNFAST_VBYTES)));
typedef uint16_t U16h __attribute__((vector_size(BNFAST_VBYTES / 2)));

template <class V> BNFAST_INLINE V load_vector(const void* p) {
    typedef V Unaligned __attribute__((aligned(1), may_alias));
    return *static_cast<const Unaligned*>(p);
}
template <class V> BNFAST_INLINE void store_vector(void* p, V v) {
    typedef V Unaligned __attribute__((aligned(1), may_alias));
    *static_cast<Unaligned*>(p) = v;
}
// Non-temporal store; p is aligned to the vector. Outside x86-64: an ordinary store.
template <class V> BNFAST_INLINE void stream_vector(void* p, V v) {
#if defined(__AVX512F__) && BNFAST_VBYTES == 64
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX2__) && BNFAST_VBYTES >= 32
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__x86_64__)
    if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
    if constexpr (sizeof(V) == 8) return _mm_stream_si64(static_cast<long long*>(p), (long long)v);
#endif
    store_vector(p, v);
}

// Needed between streaming stores and a later store that publishes the data, which could overtake them.
BNFAST_INLINE void fence_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// 16 to 32 bits and back (the upper halves are zero). Intrinsics, because GCC 12 splits the generic conversion in two.
BNFAST_INLINE U32v widen(U16h v) {
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    return (U32v)_mm512_cvtepu16_epi32((__m256i)v);
#elif BNFAST_VBYTES == 32 && defined(__AVX2__)
    return (U32v)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, U32v);
#endif
}
BNFAST_INLINE U16h narrow(U32v v) {
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    return (U16h)_mm512_cvtepi32_epi16((__m512i)v);
#elif BNFAST_VBYTES == 32 && defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // duplicates each half within its 128 bits
    return (U16h)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(v, U16h);
#endif
}

// Prefetches a cache line into L2. The address may lie beyond the array. Used while a block is read again from L1, when
// the memory bus would otherwise be idle: channels_last training takes 0.81x at 103 MB and 0.86x at 26 MB
// (docs/performance/reduce-channels-last.md).
BNFAST_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
// Loads n values and discards them, for the hardware prefetchers, which follow loads only.
template <class S> BNFAST_INLINE void touch(const S* p, int n) {
    for (int k = 0; k < n; k += 64 / int(sizeof(S))) static_cast<void>(*static_cast<const volatile S*>(p + k));
}
template <class S> BNFAST_INLINE void prefetch_row(const S* p, int64_t n) {
    for (int64_t k = 0; k < n; k += 64 / int64_t(sizeof(S))) prefetch(p + k);
}
template <class S> BNFAST_INLINE void prefetch_row_for_write(const S* p, int64_t n) {
    for (int64_t k = 0; k < n; k += 64 / int64_t(sizeof(S))) __builtin_prefetch(p + k, 1, 3);
}

template <class To, class From> BNFAST_INLINE To bits_as(From v) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To r;
    memcpy(&r, &v, sizeof r);
    return r;
}

// a - b, computed as a*1 - b if the ISA has FMA: the rounding and the bits are the same, but the subtraction runs on
// the multiply pipes while the sums use the add pipes. Moments of 512 KiB in L2 take 0.81x on Zen 4.
template <class V> BNFAST_INLINE V minus(V a, V b) {
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(a[0]) == 4) return (V)_mm512_fmsub_ps((__m512)a, _mm512_set1_ps(1), (__m512)b);
    else return (V)_mm512_fmsub_pd((__m512d)a, _mm512_set1_pd(1), (__m512d)b);
#elif BNFAST_VBYTES == 32 && defined(__FMA__)
    if constexpr (sizeof(a[0]) == 4) return (V)_mm256_fmsub_ps((__m256)a, _mm256_set1_ps(1), (__m256)b);
    else return (V)_mm256_fmsub_pd((__m256d)a, _mm256_set1_pd(1), (__m256d)b);
#else
    return a - b;
#endif
}

// ---- storage types: S in memory, T and V in registers ---------------------------------------------------------------

// Each dtype defines load and pack (registers to stored bits). The other operations are derived from them here, and
// replaced if the ISA has masked instructions.
template <class Self, class Stored, class Compute, class Vector, class Packed> struct Storage {
    using S = Stored;
    using T = Compute;
    using V = Vector;
    static constexpr int W = BNFAST_VBYTES / sizeof(T);
    static constexpr int NV = lanes / W;

    static BNFAST_INLINE V splat(T t) { return t - V{}; }  // a subtraction, so that -0 stays -0
    static BNFAST_INLINE void store(S* p, V v) { store_vector<Packed>(p, Self::pack(v)); }
    static BNFAST_INLINE void stream(S* p, V v) { stream_vector<Packed>(p, Self::pack(v)); }
    // Loads the first n < W values; the other lanes get pad.
    static BNFAST_INLINE V load_partial(const S* p, int n, V pad) {
        S some[W] = {};
        T value[W], padded[W];
        for (int i = 0; i < n; ++i) some[i] = p[i];
        store_vector(value, Self::load(some));
        store_vector(padded, pad);
        for (int i = 0; i < n; ++i) padded[i] = value[i];
        return load_vector<V>(padded);
    }
    static BNFAST_INLINE void store_partial(S* p, V v, int n) {
        S some[W];
        store(some, v);
        for (int i = 0; i < n; ++i) p[i] = some[i];
    }
};

struct Float32 : Storage<Float32, float, float, F32v, F32v> {
    static BNFAST_INLINE V load(const S* p) { return load_vector<V>(p); }
    static BNFAST_INLINE V pack(V v) { return v; }
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    static BNFAST_INLINE V load_partial(const S* p, int n, V pad) {
        return (V)_mm512_mask_loadu_ps((__m512)pad, __mmask16((1u << n) - 1), p);
    }
    static BNFAST_INLINE void store_partial(S* p, V v, int n) {
        _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
    }
#elif BNFAST_VBYTES == 32 && defined(__AVX2__)
    static BNFAST_INLINE __m256i first(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static BNFAST_INLINE V load_partial(const S* p, int n, V pad) {
        const __m256i m = first(n);
        return (V)_mm256_blendv_ps((__m256)pad, _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
    }
    static BNFAST_INLINE void store_partial(S* p, V v, int n) { _mm256_maskstore_ps(p, first(n), (__m256)v); }
#endif
};

struct Float64 : Storage<Float64, double, double, F64v, F64v> {
    static BNFAST_INLINE V load(const S* p) { return load_vector<V>(p); }
    static BNFAST_INLINE V pack(V v) { return v; }
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    static BNFAST_INLINE V load_partial(const S* p, int n, V pad) {
        return (V)_mm512_mask_loadu_pd((__m512d)pad, __mmask8((1u << n) - 1), p);
    }
    static BNFAST_INLINE void store_partial(S* p, V v, int n) {
        _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
    }
#elif BNFAST_VBYTES == 32 && defined(__AVX2__)
    static BNFAST_INLINE __m256i first(int n) {
        return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    }
    static BNFAST_INLINE V load_partial(const S* p, int n, V pad) {
        const __m256i m = first(n);
        return (V)_mm256_blendv_pd((__m256d)pad, _mm256_maskload_pd(p, m), _mm256_castsi256_pd(m));
    }
    static BNFAST_INLINE void store_partial(S* p, V v, int n) { _mm256_maskstore_pd(p, first(n), (__m256d)v); }
#endif
};

struct BFloat16 : Storage<BFloat16, uint16_t, float, F32v, U16h> {
    static BNFAST_INLINE V load(const S* p) { return bits_as<V>(widen(load_vector<U16h>(p)) << 16); }
    static BNFAST_INLINE U16h pack(V v) {  // to nearest even, in integer arithmetic: equal on every ISA
        const U32v b = bits_as<U32v>(v);
        const U32v rounded = b + (0x7fffu + ((b >> 16) & 1u));
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
        const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
        const __m512i quiet = _mm512_set1_epi32(0x400000);
        return narrow((U32v)_mm512_mask_or_epi32((__m512i)rounded, nan, (__m512i)b, quiet) >> 16);
#else
        return narrow((v == v ? rounded : (b | 0x400000u)) >> 16);
#endif
    }
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    static BNFAST_INLINE V load_partial(const S* p, int n, V pad) {
        const __mmask16 m = __mmask16((1u << n) - 1);
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16);
        return (V)_mm512_mask_mov_ps((__m512)pad, m, _mm512_castsi512_ps(wide));
    }
    static BNFAST_INLINE void store_partial(S* p, V v, int n) {
        _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), bits_as<__m256i>(pack(v)));
    }
#endif
};

struct Float16 : Storage<Float16, uint16_t, float, F32v, U16h> {
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    static BNFAST_INLINE V load(const S* p) {
        return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static BNFAST_INLINE U16h pack(V v) {
        return bits_as<U16h>(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static BNFAST_INLINE V load_partial(const S* p, int n, V pad) {
        const __mmask16 m = __mmask16((1u << n) - 1);
        return (V)_mm512_mask_mov_ps((__m512)pad, m, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)));
    }
    static BNFAST_INLINE void store_partial(S* p, V v, int n) {
        _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), bits_as<__m256i>(pack(v)));
    }
#elif BNFAST_VBYTES == 32 && defined(__F16C__)
    static BNFAST_INLINE V load(const S* p) {
        return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static BNFAST_INLINE U16h pack(V v) {
        return bits_as<U16h>(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#else
    static BNFAST_INLINE V load(const S* p) {
        const U32v h = widen(load_vector<U16h>(p));
        const U32v magnitude = (h & 0x7fffu) << 13;
        const V scaled = bits_as<V>(magnitude) * 0x1p112f;  // exact, subnormals too
        const U32v special = magnitude >= 0x0f800000u ? U32v{} + 0x7f800000u : U32v{};
        return bits_as<V>(bits_as<U32v>(scaled) | special | ((h & 0x8000u) << 16));
    }
    static BNFAST_INLINE U16h pack(V v) {
        const U32v b = bits_as<U32v>(v), a = b & 0x7fffffffu;
        const U32v normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
        const U32v tiny = bits_as<U32v>(bits_as<V>(a) + 0.5f) - 0x3f000000u;  // ulp(0.5) is the smallest float16
        U32v r = a < 0x38800000u ? tiny : normal;
        r = a >= 0x47800000u ? U32v{} + 0x7c00u : r;
        r = a > 0x7f800000u ? U32v{} + 0x7e00u : r;
        return narrow(r | ((b >> 16) & 0x8000u));
    }
#endif
};

template <class T> struct ComputeStorage;  // of parameters and weights, which are stored in the compute type
template <> struct ComputeStorage<float> {
    using type = Float32;
};
template <> struct ComputeStorage<double> {
    using type = Float64;
};

// ---- flags as types: a loop is compiled for each case, so that there is no branch per vector ------------------------

struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

template <class X, class Whole> BNFAST_INLINE typename X::V load_some(const typename X::S* p, int n, Whole) {
    return Whole::value ? X::load(p) : X::load_partial(p, n, typename X::V{});
}
template <class X, class Whole, class Stream>
BNFAST_INLINE void store_some(typename X::S* p, typename X::V v, int n, Whole, Stream) {
    if (!Whole::value) X::store_partial(p, v, n);
    else if (Stream::value) X::stream(p, v);
    else X::store(p, v);
}

// Calls f with each flag as Yes{} or No{}.
template <class F> BNFAST_INLINE void with_flags(bool a, bool b, F f) {
    if (a) b ? f(Yes{}, Yes{}) : f(Yes{}, No{});
    else b ? f(No{}, Yes{}) : f(No{}, No{});
}

// ---- the fixed tree over 64 virtual lanes: lane l adds lane l+32, then l+16, ..., l+1 -------------------------------

BNFAST_INLINE float sum_vector(F32v v) {
#if defined(__x86_64__)
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    const __m256 h = _mm512_castps512_ps256((__m512)v) + _mm512_extractf32x8_ps((__m512)v, 1);
    const __m128 q = _mm256_castps256_ps128(h) + _mm256_extractf128_ps(h, 1);
#elif BNFAST_VBYTES == 32 && defined(__AVX2__)
    const __m128 q = _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
#else
    const __m128 q = (__m128)v;
#endif
    const __m128 d = q + _mm_movehl_ps(q, q);
    return d[0] + d[1];
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
BNFAST_INLINE double sum_vector(F64v v) {
#if BNFAST_VBYTES == 64 && defined(__AVX512F__)
    const __m256d h = _mm512_castpd512_pd256((__m512d)v) + _mm512_extractf64x4_pd((__m512d)v, 1);
    return (h[0] + h[2]) + (h[1] + h[3]);
#elif BNFAST_VBYTES == 32
    return (v[0] + v[2]) + (v[1] + v[3]);
#else
    return v[0] + v[1];
#endif
}

template <class X> BNFAST_INLINE typename X::T sum_lanes(typename X::V (&v)[X::NV]) {
    BNFAST_UNROLL for (int h = X::NV / 2; h > 0; h /= 2) { BNFAST_UNROLL for (int i = 0; i < h; ++i) v[i] += v[i + h]; }
    return sum_vector(v[0]);
}

}  // namespace
}  // namespace bnfast
