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

// ---- one item of each step, in either layout ------------------------------------------------------------------------

template <class X> union MomentsShared {
    ColumnShared<X> columns;
    RowShared<typename X::T> rows;
};
template <class X> union GradientStepShared {
    GradientShared<X> columns;
    GradientRowShared<typename X::T> rows;
};

template <class X>
__device__ __forceinline__ void reduce_item(const ForwardArgs& a, Index item, MomentsShared<X>& shared,
                                            const Kept& kept) {
    if (a.grid.columns) reduce_columns<X>(a.grid, a.x, a.aligned, item, a.parts, shared.columns, kept);
    else reduce_rows<X>(a.grid, a.x, a.aligned, item, a.parts, item, shared.rows, kept);
}
template <class X, Act act>
__device__ __forceinline__ void apply_item(const ForwardArgs& a, Index item, const Kept& kept) {
    if (a.grid.columns) apply_columns<X, act>(a, item, kept);
    else apply_rows<X, act>(a, a.constants, item % a.grid.C, item, kept);
}
template <class X, Act act>
__device__ __forceinline__ void reduce_item(const GradientArgs& a, Index item, GradientStepShared<X>& shared,
                                            const KeptPair& kept) {
    if (a.grid.columns) reduce_gradient_columns<X, act>(a, item, shared.columns, kept);
    else reduce_gradient_rows<X, act>(a, item, a.parts, item, shared.rows, kept);
}
template <class X, Act act>
__device__ __forceinline__ void apply_item(const GradientArgs& a, Index item, const KeptPair& kept) {
    if (a.grid.columns) apply_gradient_columns<X, act>(a, item, kept);
    else apply_gradient_rows<X, act>(a, a.constants, item % a.grid.C, item, kept);
}

// Calls finalize(c, total) in one warp per channel; the total is right in its lane 0. T: the type of the parts.
template <class T, class Total, class Finalize>
__device__ __forceinline__ void over_channels(const Grid& g, const Parts& parts, FinalizeShared& shared,
                                              Finalize finalize) {
    const int per_block = block_threads / g.merge_lanes, mine = int(threadIdx.x) / g.merge_lanes;
    for (Index c = Index(blockIdx.x) * per_block; c < g.C; c += Index(gridDim.x) * per_block) {
        const bool inside = c + mine < g.C;
        const Total total = merge_parts<T, Total>(g, parts, c + mine, g.C, inside, shared);
        if (inside && int(threadIdx.x) % g.merge_lanes < 32) finalize(c + mine, total);
    }
}
template <class X> __device__ __forceinline__ void finalize_channels(const ForwardArgs& a, FinalizeShared& shared) {
    using T = typename X::T;
    over_channels<T, Statistics>(a.grid, a.parts, shared, [&](Index c, const Statistics& s) {
        const ChannelMoments m = moments_of_channel<X>(a, c, a.parts, c, a.grid.C, s);
        if (threadIdx.x % 32 == 0) finalize_statistics<T>(a, c, m, a.constants, c, true);
    });
}
template <class T> __device__ __forceinline__ void finalize_channels(const GradientArgs& a, FinalizeShared& shared) {
    over_channels<T, GradientSums>(a.grid, a.parts, shared, [&](Index c, const GradientSums& s) {
        if (threadIdx.x % 32 == 0) finalize_gradient<T>(a, c, s, a.constants, c, true);
    });
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

template <class X> __device__ void sweep_moments(const ForwardArgs& a) {
    DYNAMIC_SHARED(MomentsShared<X>, shared);
    for (Index item = blockIdx.x; item < items_of(a.grid); item += gridDim.x) reduce_item<X>(a, item, *shared, {});
}

template <class X> __device__ void sweep_finalize_train(const ForwardArgs& a) {
    DYNAMIC_SHARED(FinalizeShared, shared);
    finalize_channels<X>(a, *shared);
}

template <class T> __device__ void sweep_finalize_inference(const ForwardArgs& a) {
    for (Index c = Index(blockIdx.x) * block_threads + threadIdx.x; c < a.grid.C; c += Index(gridDim.x) * block_threads)
        finalize_inference<T>(a, c);
}

template <class X, Act act> __device__ void sweep_apply(const ForwardArgs& a) {
    for (Index item = items_of(a.grid) - 1 - blockIdx.x; item >= 0; item -= gridDim.x) apply_item<X, act>(a, item, {});
}

template <class X, Act act> __device__ void sweep_gradient(const GradientArgs& a) {
    DYNAMIC_SHARED(GradientStepShared<X>, shared);
    for (Index item = blockIdx.x; item < items_of(a.grid); item += gridDim.x) reduce_item<X, act>(a, item, *shared, {});
}

template <class T> __device__ void sweep_finalize_gradient(const GradientArgs& a) {
    DYNAMIC_SHARED(FinalizeShared, shared);
    finalize_channels<T>(a, *shared);
}

template <class X, Act act> __device__ void sweep_apply_gradient(const GradientArgs& a) {
    for (Index item = items_of(a.grid) - 1 - blockIdx.x; item >= 0; item -= gridDim.x) apply_item<X, act>(a, item, {});
}

}  // namespace bnfast::cuda
