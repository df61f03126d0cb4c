// The form `sweeps`: one launch per step, each a loop over its items, so that it runs on any device and for any size.
//
//   train     sweep_moments -> sweep_finalize_train -> sweep_apply       3 units of traffic (x, x, y)
//   moments   sweep_moments -> sweep_finalize_train
//   infer     sweep_finalize_inference -> sweep_apply                    2 units
//   gradient  sweep_gradient -> sweep_finalize_gradient -> sweep_apply_gradient     5 units (dy, x, dy, x, dx)
//
// The apply steps go backwards, because the reduce step has left the end of x in L2. Blocks have 256 threads; their
// number changes no bit.
#pragma once
#include "gradient.cuh"
#include "moments.cuh"

namespace bnfast::cuda {

template <class X> __device__ void sweep_moments(const ForwardArgs& a) {
    union Shared {
        ColumnShared<X> columns;
        RowShared<typename X::T> rows;
    };
    DYNAMIC_SHARED(Shared, shared);
    for (Index item = blockIdx.x; item < items_of(a.grid); item += gridDim.x) {
        if (a.grid.columns) reduce_columns<X>(a.grid, a.x, a.aligned, item, a.parts, shared->columns);
        else reduce_rows<X>(a.grid, a.x, a.aligned, item, a.parts, item, shared->rows, nullptr);
    }
}

// Calls finalize(c, total) in one thread per channel. T: the type of the parts.
template <class T, class Total, class Finalize>
__device__ __forceinline__ void over_channels(const Grid& g, const Parts& parts, Finalize finalize) {
    DYNAMIC_SHARED(FinalizeShared, shared);
    const int per_block = block_threads / g.merge_lanes, mine = int(threadIdx.x) / g.merge_lanes;
    for (Index c = Index(blockIdx.x) * per_block; c < g.C; c += Index(gridDim.x) * per_block) {
        const bool inside = c + mine < g.C;
        const Total total = merge_parts<T, Total>(g, parts, c + mine, g.C, inside, *shared);
        if (inside && int(threadIdx.x) % g.merge_lanes == 0) finalize(c + mine, total);
    }
}

template <class T> __device__ void sweep_finalize_train(const ForwardArgs& a) {
    over_channels<T, Statistics>(
        a.grid, a.parts, [&](Index c, const Statistics& s) { finalize_statistics<T>(a, c, s, a.constants, c); });
}

template <class T> __device__ void sweep_finalize_inference(const ForwardArgs& a) {
    for (Index c = Index(blockIdx.x) * block_threads + threadIdx.x; c < a.grid.C; c += Index(gridDim.x) * block_threads)
        finalize_inference<T>(a, c);
}

template <class X, Act act> __device__ void sweep_apply(const ForwardArgs& a) {
    for (Index item = items_of(a.grid) - 1 - blockIdx.x; item >= 0; item -= gridDim.x) {
        if (a.grid.columns) apply_columns<X, act>(a, item);
        else apply_rows<X, act>(a, a.constants, item % a.grid.C, item, nullptr);
    }
}

template <class X, Act act> __device__ void sweep_gradient(const GradientArgs& a) {
    union Shared {
        GradientShared<X> columns;
        GradientRowShared<typename X::T> rows;
    };
    DYNAMIC_SHARED(Shared, shared);
    for (Index item = blockIdx.x; item < items_of(a.grid); item += gridDim.x) {
        if (a.grid.columns) reduce_gradient_columns<X, act>(a, item, shared->columns);
        else reduce_gradient_rows<X, act>(a, item, a.parts, item, shared->rows, nullptr, nullptr);
    }
}

template <class T> __device__ void sweep_finalize_gradient(const GradientArgs& a) {
    over_channels<T, GradientSums>(
        a.grid, a.parts, [&](Index c, const GradientSums& s) { finalize_gradient<T>(a, c, s, a.constants, c); });
}

template <class X, Act act> __device__ void sweep_apply_gradient(const GradientArgs& a) {
    for (Index item = items_of(a.grid) - 1 - blockIdx.x; item >= 0; item -= gridDim.x) {
        if (a.grid.columns) apply_gradient_columns<X, act>(a, item);
        else apply_gradient_rows<X, act>(a, a.constants, item % a.grid.C, item, nullptr, nullptr);
    }
}

}  // namespace bnfast::cuda
