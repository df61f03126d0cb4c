// What the fast path takes of a DLPack tensor, and the (N, C, S) views of it. No Python: the fuzzer calls this too.
//
// Every field is checked before it is used. A producer's claim about its memory can't be: `data` has the room that
// shape and strides say, or the tensor's owner is broken.
#pragma once
#include <algorithm>
#include <optional>

#include "bnfast/bnfast.h"
#include "dlpack.h"

namespace bnfast::bind::dlpack {

enum class Order { contiguous, channels_last };  // channels_last: the memory of (n, ..., c) under dims (n, c, ...)
constexpr int most_axes = 16;

struct View {
    void* data = nullptr;  // null: an optional tensor is absent
    DType dtype = DType::float32;
    Order order = Order::contiguous;
    int rank = 0;
    std::int64_t size = 1, dims[most_axes] = {};

    explicit operator bool() const { return data; }
    bool like(const View& o) const {
        return rank == o.rank && dtype == o.dtype && order == o.order && std::equal(dims, dims + rank, o.dims);
    }
};

inline std::optional<DType> dtype_of(const Tensor& t) {
    if (t.lanes != 1) return std::nullopt;
    if (t.code == brain_float && t.bits == 16) return DType::bfloat16;
    if (t.code != floating_point) return std::nullopt;
    if (t.bits == 16) return DType::float16;
    if (t.bits == 32) return DType::float32;
    if (t.bits == 64) return DType::float64;
    return std::nullopt;
}

// Whether the elements are dense in this order of axes; strides of extents of 1 don't matter.
inline bool follows(const View& v, const std::int64_t* strides, Order order) {
    const bool last = order == Order::channels_last;
    std::int64_t next = 1;
    const auto is_next = [&](int i) {
        const bool valid = v.dims[i] == 1 || strides[i] == next;
        next *= v.dims[i];
        return valid;
    };
    if (last && !is_next(1)) return false;
    for (int i = v.rank - 1; i >= 0; --i)
        if (!(last && i == 1) && !is_next(i)) return false;
    return true;
}

// Null for what the fast path leaves to the slower one: another device or dtype, other strides, no values.
inline std::optional<View> view_of(const Tensor& t) {
    View v;
    const auto dtype = dtype_of(t);
    if ((t.device_type != cpu && t.device_type != cuda_host) || !dtype) return std::nullopt;
    if (t.ndim < 0 || t.ndim > most_axes || (t.ndim > 0 && !t.shape) || !t.data) return std::nullopt;
    v.dtype = *dtype;
    v.rank = t.ndim;
    for (int i = 0; i < v.rank; ++i) {
        v.dims[i] = t.shape[i];
        if (v.dims[i] <= 0 || __builtin_mul_overflow(v.size, v.dims[i], &v.size)) return std::nullopt;
    }
    // As integers, because a pointer that passes the end of the address space is undefined behaviour.
    v.data = reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(t.data) + std::uintptr_t(t.byte_offset));
    if (!v.data) return std::nullopt;
    if (!t.strides || follows(v, t.strides, Order::contiguous)) return v;
    if ((v.rank != 4 && v.rank != 5) || !follows(v, t.strides, Order::channels_last)) return std::nullopt;
    v.order = Order::channels_last;
    return v;
}

// Batch norm's view, axis 1 being the channels.
inline std::optional<Shape> batch_shape(const View& x) {
    if (!x || x.rank < 2) return std::nullopt;
    const std::int64_t S = x.size / x.dims[0] / x.dims[1];
    if (x.order == Order::channels_last) return Shape{x.dims[0] * S, x.dims[1], 1};
    return Shape{x.dims[0], x.dims[1], S};
}

// Group norm's. For layer norm groups is 0, and the last `axes` axes are one row of C values.
inline std::optional<GroupShape> group_shape(const View& x, std::int64_t groups, int axes) {
    if (!x || groups < 0) return std::nullopt;
    if (groups > 0) {
        if (x.rank < 2 || x.dims[1] % groups != 0) return std::nullopt;
        const std::int64_t S = x.size / x.dims[0] / x.dims[1];
        const bool last = x.order == Order::channels_last;
        return GroupShape{x.dims[0], last ? S : 1, x.dims[1], last ? 1 : S, groups};
    }
    if (axes < 1 || axes > x.rank || x.order != Order::contiguous) return std::nullopt;
    GroupShape shape;
    for (int i = 0; i < x.rank; ++i) (i < x.rank - axes ? shape.N : shape.C) *= x.dims[i];
    return shape;
}

}  // namespace bnfast::bind::dlpack
