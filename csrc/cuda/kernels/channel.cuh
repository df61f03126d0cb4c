// The form `channel`, for the rows layout: one block takes a channel through all steps and keeps it in shared memory,
// so that global memory is read once and written once (2 units of traffic for train, 3 for the gradient) at any size of
// the tensor, as long as one channel fits.
//
// Chunks, threads and the order of every sum are those of `sweeps`, so the bits are too. A thread reads back only
// vectors that it kept itself. The constants need no barrier after the apply step: the next channel's reduce step has
// one before they are written again.
#pragma once
#include "sweeps.cuh"

namespace bnfast::cuda {

// What lies in front of the kept vectors in shared memory.
template <class X> struct ChannelShared {
    using T = typename X::T;
    FinalizeShared finalize;
    RowShared<T> moments;
    GradientRowShared<T> gradient;
    T constants[5];

    __device__ __forceinline__ Constants channel_constants() {
        return {constants, constants + 1, constants + 2, constants + 3, constants + 4};
    }
};

// Shared memory of one block: ChannelShared, then 3 values per part, then the kept vectors (16-byte aligned).
struct ChannelLayout {
    Index parts_at, kept_at;
};
template <class X> __device__ __forceinline__ ChannelLayout channel_layout(const Grid& g) {
    using T = typename X::T;
    const Index parts_at = (sizeof(ChannelShared<X>) + 15) / 16 * 16;
    return {parts_at, (parts_at + 3 * parts_of(g) * Index(sizeof(T)) + 15) / 16 * 16};
}

// The kept vectors of chunk k; every chunk has the room of a full one.
__device__ __forceinline__ Index vectors_per_chunk(const Grid& g) { return g.chunk_rows * g.row_vectors; }

template <class X> struct ChannelMemory {
    ChannelShared<X>& shared;
    Parts parts;
    Raw* kept;
    Index per_chunk;

    __device__ __forceinline__ ChannelMemory(const Grid& g, unsigned char* bytes)
        : shared(*reinterpret_cast<ChannelShared<X>*>(bytes)) {
        using T = typename X::T;
        const ChannelLayout layout = channel_layout<X>(g);
        T* values = reinterpret_cast<T*>(bytes + layout.parts_at);
        parts = {values, values + parts_of(g), values + 2 * parts_of(g)};
        kept = reinterpret_cast<Raw*>(bytes + layout.kept_at);
        per_chunk = vectors_per_chunk(g);
    }
};

template <class X, Act act> __device__ void channel_train(const ForwardArgs& a) {
    using T = typename X::T;
    DYNAMIC_SHARED(unsigned char, bytes);
    const Grid& g = a.grid;
    ChannelMemory<X> memory(g, bytes);
    const Constants constants = memory.shared.channel_constants();
    for (Index c = blockIdx.x; c < g.C; c += gridDim.x) {
        for (Index k = 0; k < g.chunks; ++k)
            reduce_rows<X>(g, a.x, a.aligned, k * g.C + c, memory.parts, k, memory.shared.moments,
                           memory.kept + k * memory.per_chunk);
        const Statistics s =
            merge_parts<T, Statistics>(g, memory.parts, 0, 1, int(threadIdx.x) < g.merge_lanes, memory.shared.finalize);
        if (threadIdx.x == 0) finalize_statistics<T>(a, c, s, constants, 0);
        __syncthreads();
        for (Index k = 0; k < g.chunks; ++k)
            apply_rows<X, act>(a, constants, 0, k * g.C + c, memory.kept + k * memory.per_chunk);
    }
}

template <class X, Act act> __device__ void channel_gradient(const GradientArgs& a) {
    using T = typename X::T;
    DYNAMIC_SHARED(unsigned char, bytes);
    const Grid& g = a.grid;
    ChannelMemory<X> memory(g, bytes);
    const Constants constants = memory.shared.channel_constants();
    Raw* const kept_dy = memory.kept + g.chunks * memory.per_chunk;
    for (Index c = blockIdx.x; c < g.C; c += gridDim.x) {
        for (Index k = 0; k < g.chunks; ++k)
            reduce_gradient_rows<X, act>(a, k * g.C + c, memory.parts, k, memory.shared.gradient,
                                         kept_dy + k * memory.per_chunk, memory.kept + k * memory.per_chunk);
        const GradientSums s = merge_parts<T, GradientSums>(g, memory.parts, 0, 1, int(threadIdx.x) < g.merge_lanes,
                                                            memory.shared.finalize);
        if (threadIdx.x == 0) finalize_gradient<T>(a, c, s, constants, 0);
        __syncthreads();
        for (Index k = 0; k < g.chunks; ++k)
            apply_gradient_rows<X, act>(a, constants, 0, k * g.C + c, kept_dy + k * memory.per_chunk,
                                        memory.kept + k * memory.per_chunk);
    }
}

}  // namespace bnfast::cuda
