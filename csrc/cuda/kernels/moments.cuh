// Reduce: mean and M2 (sum of squared deviations) of each channel in one item, in one read of memory.
//
// Every value is shifted by the chunk's first one of its column or row, the center, so that a large offset costs no
// digits and a constant channel has M2 = 0. A thread takes `in_flight` vectors at a time and goes over them twice in
// registers: sum -> mean -> squares about it. Chan's formula merges these batches, then the threads of the block, in T
// and in a fixed order; a thread has at most 64 values per channel. finalize.cuh merges the parts in float64.
// Sums may overflow T where values lie 1e19 (float64: 1e154) from the center; finalize.cuh mends such a channel.
#pragma once
#include "layout.cuh"

namespace bnfast::cuda {

// 16-byte loads in flight per thread, and the vectors of a batch: 32 values of one channel (rows), so this fixes bits.
// 2 blocks per SM then have 32 KB or more in flight. 8 for half types spill at 128 registers.
template <class X> constexpr int in_flight = X::V == 8 ? 4 : 8;

// Chan's formula, for nb values merged into na: r = nb/n, q = na*nb/n.
template <class T> struct Merge {
    T r, q;
    __device__ __forceinline__ Merge(T na, T nb) {
        const T n = na + nb;
        r = n > T(0) ? nb / n : T(0);
        q = na * r;
    }
    __device__ __forceinline__ void into(T& mean, T& m2, T mean_b, T m2_b) const {
        const T delta = mean_b - mean;
        mean = fma_rn(delta, r, mean);
        m2 += m2_b + delta * q * delta;
    }
};

template <class T> struct Sums {  // the mean is relative to the center
    T count, mean, m2;
    __device__ __forceinline__ void add(const Sums& b) {
        if (!(b.count > T(0))) return;
        Merge<T>(count, b.count).into(mean, m2, b.mean, b.m2);
        count += b.count;
    }
};

// Lane 0 of each warp gets the sums of its 32 threads.
template <class T> __device__ __forceinline__ void add_warp(Sums<T>& s) {
    for (int d = 16; d > 0; d /= 2) {
        const Sums<T> other{__shfl_down_sync(0xffffffffu, s.count, d), __shfl_down_sync(0xffffffffu, s.mean, d),
                            __shfl_down_sync(0xffffffffu, s.m2, d)};
        s.add(other);
    }
}

// ---- columns --------------------------------------------------------------------------------------------------------

// The sums of the V columns of one thread. They share one count.
template <class X> struct ColumnSums {
    using T = typename X::T;
    T mean[X::V] = {}, m2[X::V] = {};
    int count = 0;

    // Adds rows [0, got) of `raw`.
    __device__ __forceinline__ void add(const Raw* raw, int got, const T* center) {
        T sum[X::V] = {}, squares[X::V] = {}, f[X::V];
        UNROLL for (int u = 0; u < in_flight<X>; ++u) {
            if (u >= got) continue;
            X::unpack(raw[u], f);
            UNROLL for (int i = 0; i < X::V; ++i) sum[i] += f[i] - center[i];
        }
        const T inverse = T(1) / T(got);
        UNROLL for (int i = 0; i < X::V; ++i) sum[i] *= inverse;
        UNROLL for (int u = 0; u < in_flight<X>; ++u) {
            if (u >= got) continue;
            X::unpack(raw[u], f);
            UNROLL for (int i = 0; i < X::V; ++i) {
                const T d = (f[i] - center[i]) - sum[i];
                squares[i] = fma_rn(d, d, squares[i]);
            }
        }
        const Merge<T> merge{T(count), T(got)};
        UNROLL for (int i = 0; i < X::V; ++i) merge.into(mean[i], m2[i], sum[i], squares[i]);
        count += got;
    }
    // Adds the partial packed row: one more value in some of the columns.
    __device__ __forceinline__ void add_tail(const Raw& raw, unsigned valid, const T* center) {
        T f[X::V];
        X::unpack(raw, f);
        const Merge<T> merge{T(count), T(1)};
        UNROLL for (int i = 0; i < X::V; ++i) if (has(valid, i)) merge.into(mean[i], m2[i], f[i] - center[i], T(0));
    }
};

template <class X> struct ColumnShared {
    using T = typename X::T;
    static constexpr int columns = tile_vectors * X::V;
    T mean[tile_lanes][columns], m2[tile_lanes][columns], center[columns];
};

// How many of `rows` packed rows lane `lane` takes.
__device__ __forceinline__ int rows_of_lane(int rows, int lane) { return (rows - lane + tile_lanes - 1) / tile_lanes; }

// Merges the lanes of every column of the tile in order, and writes the parts.
template <class X>
__device__ void write_column_parts(const Grid& g, Index item, const ColumnShared<X>& s, const Parts& parts) {
    using T = typename X::T;
    const Index chunk = item / g.tiles, begin = item % g.tiles * s.columns;
    const int rows = int(least(g.rows - chunk * g.chunk_rows, g.chunk_rows));
    const Index tail_columns = chunk == g.chunks - 1 ? g.tail * g.C : 0;
    for (int k = int(threadIdx.x); k < s.columns && begin + k < g.row_size; k += block_threads) {
        Sums<T> sums{};
        for (int lane = 0; lane < tile_lanes; ++lane) {
            const int extra = lane == 0 && begin + k < tail_columns ? 1 : 0;
            sums.add({T(rows_of_lane(rows, lane) + extra), s.mean[lane][k], s.m2[lane][k]});
        }
        const Index at = chunk * g.row_size + begin + k;
        store1<T>(parts.center, at, s.center[k]);
        store1<T>(parts.offset, at, sums.mean);
        store1<T>(parts.m2, at, sums.m2);
    }
}

template <class X>
__device__ void reduce_columns(const Grid& g, const void* x, bool aligned, Index item, const Parts& parts,
                               ColumnShared<X>& shared, const Kept& kept) {
    using T = typename X::T;
    const ColumnItem<X> it(g, item);
    const Index size = size_of(g);
    T center[X::V] = {};
    if (it.rows > 0) X::unpack(load<X>(x, size, it.at(g, 0), all_values<X>(), aligned), center);
    else if (it.tail) X::unpack(load<X>(x, size, it.tail_at(g), it.tail, aligned), center);
    UNROLL for (int i = 0; i < X::V; ++i) center[i] = finite_or_zero(center[i]);

    ColumnSums<X> sums;
    for (int base = it.lane; base < it.rows; base += tile_lanes * in_flight<X>) {
        Raw raw[in_flight<X>];
        int got = 0;
        UNROLL for (int u = 0; u < in_flight<X>; ++u) {
            const int row = base + u * tile_lanes;
            if (row >= it.rows) continue;
            raw[u] = load<X>(x, size, it.at(g, row), all_values<X>(), aligned);
            if (Raw* room = kept.find(it.number(row))) *room = raw[u];
            got = u + 1;
        }
        sums.add(raw, got, center);
    }
    if (it.tail && it.lane == 0) sums.add_tail(load<X>(x, size, it.tail_at(g), it.tail, aligned), it.tail, center);

    const int k = int(threadIdx.x) % tile_vectors * X::V;
    UNROLL for (int i = 0; i < X::V; ++i) {
        shared.mean[it.lane][k + i] = sums.mean[i];
        shared.m2[it.lane][k + i] = sums.m2[i];
        if (it.lane == 0) shared.center[k + i] = center[i];
    }
    __syncthreads();
    write_column_parts<X>(g, item, shared, parts);
    __syncthreads();  // before the next item overwrites the shared memory
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Adds the valid values of a batch of vectors, all of one channel.
template <class X>
__device__ __forceinline__ void add_row_batch(Sums<typename X::T>& sums, const Raw* raw, const unsigned* valid,
                                              typename X::T center) {
    using T = typename X::T;
    T sum = 0, squares = 0, f[X::V];
    int got = 0;
    UNROLL for (int u = 0; u < in_flight<X>; ++u) {
        X::unpack(raw[u], f);
        got += __popc(valid[u]);
        UNROLL for (int i = 0; i < X::V; ++i) if (has(valid[u], i)) sum += f[i] - center;
    }
    if (got == 0) return;
    const T mean = sum * (T(1) / T(got));
    UNROLL for (int u = 0; u < in_flight<X>; ++u) {
        X::unpack(raw[u], f);
        UNROLL for (int i = 0; i < X::V; ++i) {
            const T d = (f[i] - center) - mean;
            if (has(valid[u], i)) squares = fma_rn(d, d, squares);
        }
    }
    sums.add({T(got), mean, squares});
}

template <class T> struct RowShared {
    Sums<T> warps[block_threads / 32];
};

template <class X>
__device__ void reduce_rows(const Grid& g, const void* x, bool aligned, Index item, const Parts& parts, Index part_at,
                            RowShared<typename X::T>& shared, const Kept& kept) {
    using T = typename X::T;
    const RowItem<X> it(g, item);
    const Index size = size_of(g);
    const T center = finite_or_zero(load_value<X>(x, it.first));
    Sums<T> sums{};
    int number = int(threadIdx.x);
    for (RowWalk<X> walk(g, it); walk.more();) {
        Raw raw[in_flight<X>] = {};
        unsigned valid[in_flight<X>] = {};
        UNROLL for (int u = 0; u < in_flight<X>; ++u) {
            if (!walk.more()) continue;
            const Place p = walk.next();
            valid[u] = p.valid;
            if (p.valid) raw[u] = load<X>(x, size, p.at, p.valid, aligned);
            if (Raw* room = kept.find(number + u * block_threads)) *room = raw[u];
        }
        number += in_flight<X> * block_threads;
        add_row_batch<X>(sums, raw, valid, center);
    }
    add_warp(sums);
    if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = sums;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < block_threads / 32; ++w) sums.add(shared.warps[w]);
        store1<T>(parts.center, part_at, center);
        store1<T>(parts.offset, part_at, sums.mean);
        store1<T>(parts.m2, part_at, sums.m2);
    }
    __syncthreads();
}

}  // namespace bnfast::cuda
