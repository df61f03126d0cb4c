// The form `channel`, for the rows layout: one block, or a cluster of blocks, takes a channel through all steps and
// keeps it in shared memory, so that global memory is read once and written once (2 units of traffic for train, 3 for
// the gradient) at any size of the tensor, as long as one channel fits.
//
// Block r of a cluster takes chunks r, r + blocks, ... Their parts lie in the block's shared memory or, of a cluster,
// in scratch memory; behind the cluster's barrier every block merges them for itself, and block 0 writes the results.
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

// Shared memory of one block: ChannelShared, then 3 values per part (none in a cluster), then the kept vectors.
struct ChannelLayout {
    Index parts_at, kept_at;
};
template <class X> __device__ __forceinline__ ChannelLayout channel_layout(const Grid& g, int cluster) {
    using T = typename X::T;
    const Index parts_at = (sizeof(ChannelShared<X>) + 15) / 16 * 16, parts = cluster == 1 ? parts_of(g) : 0;
    return {parts_at, (parts_at + 3 * parts * Index(sizeof(T)) + 15) / 16 * 16};
}

// The kept vectors of one chunk; every chunk has the room of a full one.
__device__ __forceinline__ Index vectors_per_chunk(const Grid& g) { return g.chunk_rows * g.row_vectors; }
__device__ __forceinline__ Index chunks_per_block(const Grid& g, int cluster) {
    return (g.chunks + cluster - 1) / cluster;
}

template <class X> struct ChannelMemory {
    using T = typename X::T;
    const Grid& grid;
    int cluster, rank;  // blocks per channel, and which of them this is
    ChannelShared<X>& shared;
    Parts parts;
    Raw* room;

    __device__ __forceinline__ ChannelMemory(const Grid& g, const LaunchArgs& launch, const Parts& scratch,
                                             unsigned char* bytes)
        : grid(g),
          cluster(launch.cluster),
          rank(int(blockIdx.x % unsigned(launch.cluster))),
          shared(*reinterpret_cast<ChannelShared<X>*>(bytes)),
          parts(scratch) {
        const ChannelLayout layout = channel_layout<X>(g, cluster);
        room = reinterpret_cast<Raw*>(bytes + layout.kept_at);
        if (cluster > 1) return;
        T* values = reinterpret_cast<T*>(bytes + layout.parts_at);
        parts = {values, values + parts_of(g), values + 2 * parts_of(g)};
    }
    // Part k of channel c lies at first(c) + k*stride().
    __device__ __forceinline__ Index first(Index c) const { return cluster > 1 ? c : 0; }
    __device__ __forceinline__ Index stride() const { return cluster > 1 ? grid.C : 1; }
    // Chunk k of this block, in the tensor_th of the tensors that are kept.
    __device__ __forceinline__ Kept kept(Index k, int tensor) const {
        const Index each = vectors_per_chunk(grid), chunks = chunks_per_block(grid, cluster);
        return {room + (tensor * chunks + k / cluster) * each, unsigned(each)};
    }
    __device__ __forceinline__ KeptPair kept_pair(Index k) const { return {kept(k, 1), kept(k, 0)}; }
    // The channel's total, right in thread 0.
    template <class Total> __device__ __forceinline__ Total merge(Index c) {
        if (cluster > 1) cluster_barrier();
        return merge_parts<T, Total>(grid, parts, first(c), stride(), int(threadIdx.x) < grid.merge_lanes,
                                     shared.finalize);
    }
};

template <class X, Act act> __device__ void channel_train(const ForwardArgs& a) {
    using T = typename X::T;
    DYNAMIC_SHARED(unsigned char, bytes);
    const Grid& g = a.grid;
    ChannelMemory<X> memory(g, a.launch, a.parts, bytes);
    const Constants constants = memory.shared.channel_constants();
    for (Index c = blockIdx.x / memory.cluster; c < g.C; c += gridDim.x / memory.cluster) {
        for (Index k = memory.rank; k < g.chunks; k += memory.cluster)
            reduce_rows<X>(g, a.x, a.aligned, k * g.C + c, memory.parts, memory.first(c) + k * memory.stride(),
                           memory.shared.moments, memory.kept(k, 0));
        const Statistics s = memory.template merge<Statistics>(c);
        if (threadIdx.x < 32) {
            const ChannelMoments m = moments_of_channel<X>(a, c, memory.parts, memory.first(c), memory.stride(), s);
            if (threadIdx.x == 0) finalize_statistics<T>(a, c, m, constants, 0, memory.rank == 0);
        }
        __syncthreads();
        for (Index k = memory.rank; k < g.chunks; k += memory.cluster)
            apply_rows<X, act>(a, constants, 0, k * g.C + c, memory.kept(k, 0));
    }
}

template <class X, Act act> __device__ void channel_gradient(const GradientArgs& a) {
    using T = typename X::T;
    DYNAMIC_SHARED(unsigned char, bytes);
    const Grid& g = a.grid;
    ChannelMemory<X> memory(g, a.launch, a.parts, bytes);
    const Constants constants = memory.shared.channel_constants();
    for (Index c = blockIdx.x / memory.cluster; c < g.C; c += gridDim.x / memory.cluster) {
        for (Index k = memory.rank; k < g.chunks; k += memory.cluster)
            reduce_gradient_rows<X, act>(a, k * g.C + c, memory.parts, memory.first(c) + k * memory.stride(),
                                         memory.shared.gradient, memory.kept_pair(k));
        const GradientSums s = memory.template merge<GradientSums>(c);
        if (threadIdx.x == 0) finalize_gradient<T>(a, c, s, constants, 0, memory.rank == 0);
        __syncthreads();
        for (Index k = memory.rank; k < g.chunks; k += memory.cluster)
            apply_gradient_rows<X, act>(a, constants, 0, k * g.C + c, memory.kept_pair(k));
    }
}

}  // namespace bnfast::cuda
