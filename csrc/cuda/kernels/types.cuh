// The dtypes, and 16-byte vectors of them. Storage is what memory holds, T what is computed in, V the values per
// vector. load and store take vectors whole where memory allows, else value by value: the assignment of values to
// threads, and with it the bits, is the same.
#pragma once
#include "device.h"

namespace bnfast::cuda {

struct F32 {
    using Storage = unsigned;
    using T = float;
    static constexpr int V = 4;
    static __device__ __forceinline__ void unpack(const Raw& r, T* f) {
        UNROLL for (int i = 0; i < V; ++i) f[i] = __uint_as_float(r.w[i]);
    }
    static __device__ __forceinline__ Raw pack(const T* f) {
        Raw r;
        UNROLL for (int i = 0; i < V; ++i) r.w[i] = __float_as_uint(f[i]);
        return r;
    }
    static __device__ __forceinline__ void put(Raw& r, int i, Storage s) { r.w[i] = s; }
    static __device__ __forceinline__ Storage get(const Raw& r, int i) { return r.w[i]; }
};

struct F64 {
    using Storage = unsigned long long;
    using T = double;
    static constexpr int V = 2;
    static __device__ __forceinline__ void unpack(const Raw& r, T* f) {
        UNROLL for (int i = 0; i < V; ++i) f[i] = double_of(r.w[2 * i], r.w[2 * i + 1]);
    }
    static __device__ __forceinline__ Raw pack(const T* f) {
        Raw r;
        UNROLL for (int i = 0; i < V; ++i) {
            r.w[2 * i] = low_word(f[i]);
            r.w[2 * i + 1] = high_word(f[i]);
        }
        return r;
    }
    static __device__ __forceinline__ void put(Raw& r, int i, Storage s) {
        r.w[2 * i] = unsigned(s);
        r.w[2 * i + 1] = unsigned(s >> 32);
    }
    static __device__ __forceinline__ Storage get(const Raw& r, int i) {
        return r.w[2 * i] | Storage(r.w[2 * i + 1]) << 32;
    }
};

struct Sixteen {  // what both half types share: two values per word, the first in its low half
    using Storage = unsigned short;
    using T = float;
    static constexpr int V = 8;
    static __device__ __forceinline__ void put(Raw& r, int i, Storage s) {
        const int up = 16 * (i & 1);
        r.w[i / 2] = (r.w[i / 2] & ~(0xffffu << up)) | unsigned(s) << up;
    }
    static __device__ __forceinline__ Storage get(const Raw& r, int i) {
        return static_cast<Storage>(r.w[i / 2] >> 16 * (i & 1));
    }
};

struct F16 : Sixteen {
    static __device__ __forceinline__ void unpack(const Raw& r, T* f) {
        UNROLL for (int i = 0; i < 4; ++i) {
            f[2 * i] = float_of_half(r.w[i] & 0xffffu);
            f[2 * i + 1] = float_of_half(r.w[i] >> 16);
        }
    }
    static __device__ __forceinline__ Raw pack(const T* f) {
        Raw r;
        UNROLL for (int i = 0; i < 4; ++i) r.w[i] = half_of_float(f[2 * i]) | half_of_float(f[2 * i + 1]) << 16;
        return r;
    }
};

struct BF16 : Sixteen {
    static __device__ __forceinline__ void unpack(const Raw& r, T* f) {
        UNROLL for (int i = 0; i < 4; ++i) {
            f[2 * i] = __uint_as_float(r.w[i] << 16);
            f[2 * i + 1] = __uint_as_float(r.w[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ Raw pack(const T* f) {
        Raw r;
        UNROLL for (int i = 0; i < 4; ++i) r.w[i] = bfloat_of_float(f[2 * i]) | bfloat_of_float(f[2 * i + 1]) << 16;
        return r;
    }
};

// Bits [low, high) of a mask of values.
__device__ __forceinline__ unsigned values_between(int low, int high) {
    return high > low ? (1u << high) - (1u << low) : 0u;
}
template <class X> __device__ __forceinline__ constexpr unsigned all_values() { return (1u << X::V) - 1; }
__device__ __forceinline__ bool has(unsigned valid, int i) { return (valid >> i & 1) != 0; }

// The vector of values [e, e + V), of which only those in `valid` need to exist: the others are read if the vector is
// whole in the tensor, else they are 0. e is a multiple of V, `size` the values of the tensor.
template <class X>
__device__ __forceinline__ Raw load(const void* base, Index size, Index e, unsigned valid, bool aligned) {
    using Storage = typename X::Storage;
    if (aligned && e + X::V <= size) return load16(static_cast<const Storage*>(base) + e);
    Raw raw = {};
    UNROLL for (int i = 0; i < X::V; ++i) if (has(valid, i)) X::put(raw, i, load1<Storage>(base, e + i));
    return raw;
}

// Writes the values in `valid` and no others.
template <class X>
__device__ __forceinline__ void store(void* base, Index e, const Raw& raw, unsigned valid, bool aligned) {
    using Storage = typename X::Storage;
    if (aligned && valid == all_values<X>()) {
        store16(static_cast<Storage*>(base) + e, raw);
        return;
    }
    UNROLL for (int i = 0; i < X::V; ++i) if (has(valid, i)) store1<Storage>(base, e + i, X::get(raw, i));
}

template <class X> __device__ __forceinline__ typename X::T load_value(const void* base, Index e) {
    typename X::T f[X::V];
    Raw raw = {};
    X::put(raw, 0, load1<typename X::Storage>(base, e));
    X::unpack(raw, f);
    return f[0];
}

__device__ __forceinline__ double value_of(const ParamVector& v, Index c, double absent) {
    if (!v.data) return absent;
    return v.is_double ? load1<double>(v.data, c) : double(load1<float>(v.data, c));
}
__device__ __forceinline__ double value_of(const ParamOutput& v, Index c) {
    return v.is_double ? load1<double>(v.data, c) : double(load1<float>(v.data, c));
}
__device__ __forceinline__ void set_value(const ParamOutput& v, Index c, double value) {
    if (v.is_double) store1<double>(v.data, c, value);
    else store1<float>(v.data, c, float(value));
}

template <class T> __device__ __forceinline__ bool is_finite(T v) { return v - v == T(0); }
template <class T> __device__ __forceinline__ T finite_or_zero(T v) { return is_finite(v) ? v : T(0); }
template <class I> __device__ __forceinline__ I least(I a, I b) { return a < b ? a : b; }

}  // namespace bnfast::cuda
