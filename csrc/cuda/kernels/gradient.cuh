// Gradient: reduce (sum(g), sum(g*(x - mean_hi))) and apply (dx), item by item, in the order of moments.cuh.
//
//   g          = the upstream gradient dy times the activation's derivative, at the pre-activation recomputed from x,
//   or
//                at the forward's y; nothing was stored for it
//   dx         = scale*g + (dx_slope*(x - mean_hi) + dx_offset)
//   frozen     dx = scale*g
//   dresidual  = g, if given
// finalize.cuh makes the constants between the two steps.
#pragma once
#include "apply.cuh"
#include "finalize.cuh"

namespace bnfast::cuda {

constexpr int gradient_in_flight = 2;  // of x, of dy and of the gate's input each; 4 spill at 128 registers

struct KeptPair {  // of one length
    Kept dy, x;
    __device__ __forceinline__ void keep(int number, const Raw& of_dy, const Raw& of_x) const {
        if (!x.holds(number)) return;
        dy.at[number] = of_dy;
        x.at[number] = of_x;
    }
};

template <Act act, class T> __device__ __forceinline__ T gate(T z, T dy, T bound, T slope) {
    if (act == Act::relu) return z <= T(0) ? T(0) : (z >= bound ? T(0) : dy);
    if (act == Act::leaky) return z > T(0) ? dy : dy * slope;
    return dy;
}

// Vectors of dy, x and the gate's input. what is not needed is not read: x only for the sums or a gate.
template <class X> struct GradientBatch {
    Raw dy[gradient_in_flight] = {}, x[gradient_in_flight] = {}, gate[gradient_in_flight] = {};
    Place place[gradient_in_flight] = {};

    __device__ __forceinline__ void load_one(int u, const GradientArgs& a, Index size, const Place& p, bool reads_x,
                                             bool reads_gate) {
        place[u] = p;
        if (!p.valid) return;
        dy[u] = load<X>(a.dy, size, p.at, p.valid, a.aligned);
        if (reads_x) x[u] = load<X>(a.x, size, p.at, p.valid, a.aligned);
        if (reads_gate) gate[u] = load<X>(a.gate_input, size, p.at, p.valid, a.aligned);
    }
    // From where load_one's vectors are kept.
    __device__ __forceinline__ void load_kept(int u, const GradientArgs& a, Index size, const Place& p,
                                              const Raw& kept_dy, const Raw& kept_x, bool reads_gate) {
        place[u] = p;
        if (!p.valid) return;
        dy[u] = kept_dy;
        x[u] = kept_x;
        if (reads_gate) gate[u] = load<X>(a.gate_input, size, p.at, p.valid, a.aligned);
    }
};

// g of one vector. step: 1 if every value has constants of its own (columns), 0 if they share one (rows).
template <class X, Act act, int step> struct Gate {
    using T = typename X::T;
    static constexpr int count = step ? X::V : 1;
    T mean_hi[count], scale[count], shift[count], bound, slope;
    bool has_input, input_is_y;

    // From the statistics, before finalize has made the constants. c: the first value's channel.
    __device__ __forceinline__ Gate(const GradientArgs& a, Index c) : Gate(a) {
        UNROLL for (int i = 0; i < count; ++i) {
            const Affine affine = Affine::of<T>(value_of(a.mean, c, 0), value_of(a.invstd, c, 0),
                                                value_of(a.gamma, c, 1), value_of(a.beta, c, 0));
            mean_hi[i] = T(affine.mean_hi);
            scale[i] = T(affine.scale);
            shift[i] = T(affine.shift);
            c = ColumnItem<X>::next(a.grid, c);
        }
    }
    // From the same constants, as finalize has stored them.
    __device__ __forceinline__ Gate(const GradientArgs& a, const Constants& constants, Index at) : Gate(a) {
        UNROLL for (int i = 0; i < count; ++i) {
            mean_hi[i] = load1<T>(constants.mean_hi, at);
            scale[i] = load1<T>(constants.scale, at);
            shift[i] = load1<T>(constants.shift, at);
            at = ColumnItem<X>::next(a.grid, at);
        }
    }
    __device__ __forceinline__ void operator()(const Raw& dy, const Raw& x, const Raw& input, T* g,
                                               T* centered_x) const {
        T r[X::V];
        X::unpack(dy, g);
        X::unpack(x, centered_x);
        X::unpack(input, r);
        UNROLL for (int i = 0; i < X::V; ++i) {
            if (act != Act::none) {
                T z = pre_activation(centered_x[i], mean_hi[i * step], scale[i * step], shift[i * step]);
                if (has_input) z = input_is_y ? r[i] : z + r[i];
                g[i] = gate<act>(z, g[i], bound, slope);
            }
            centered_x[i] -= mean_hi[i * step];
        }
    }

private:
    __device__ __forceinline__ explicit Gate(const GradientArgs& a)
        : bound(T(a.activation.bound)),
          slope(T(a.activation.negative_slope)),
          has_input(act != Act::none && a.gate_input),
          input_is_y(a.gate_input_is_y) {}
};

// ---- reduce ---------------------------------------------------------------------------------------------------------

template <class X> struct GradientShared {
    using T = typename X::T;
    static constexpr int columns = tile_vectors * X::V;
    T dy[tile_lanes][columns], dy_centered_x[tile_lanes][columns];
};

template <class X>
__device__ void write_gradient_column_parts(const Grid& g, Index item, const GradientShared<X>& s, const Parts& parts) {
    using T = typename X::T;
    const Index chunk = item / g.tiles, begin = item % g.tiles * s.columns;
    for (int k = int(threadIdx.x); k < s.columns && begin + k < g.row_size; k += block_threads) {
        T dy = s.dy[0][k], dy_centered_x = s.dy_centered_x[0][k];
        for (int lane = 1; lane < tile_lanes; ++lane) {
            dy += s.dy[lane][k];
            dy_centered_x += s.dy_centered_x[lane][k];
        }
        store1<T>(parts.offset, chunk * g.row_size + begin + k, dy);
        store1<T>(parts.m2, chunk * g.row_size + begin + k, dy_centered_x);
    }
}

template <class X, Act act>
__device__ void reduce_gradient_columns(const GradientArgs& a, Index item, GradientShared<X>& shared,
                                        const KeptPair& kept) {
    using T = typename X::T;
    const Grid& grid = a.grid;
    const ColumnItem<X> it(grid, item);
    const Index size = size_of(grid);
    T sum_dy[X::V] = {}, sum_dy_x[X::V] = {};
    if (it.rows > 0 || it.tail) {
        const Gate<X, act, 1> gated(a, it.channel(grid));
        auto add = [&](const GradientBatch<X>& b) {
            UNROLL for (int u = 0; u < gradient_in_flight; ++u) {
                T g[X::V], x[X::V];
                gated(b.dy[u], b.x[u], b.gate[u], g, x);
                UNROLL for (int i = 0; i < X::V; ++i) {
                    if (!has(b.place[u].valid, i)) continue;
                    sum_dy[i] += g[i];
                    sum_dy_x[i] = fma_rn(g[i], x[i], sum_dy_x[i]);
                }
            }
        };
        for (int base = it.lane; base < it.rows; base += tile_lanes * gradient_in_flight) {
            GradientBatch<X> batch;
            UNROLL for (int u = 0; u < gradient_in_flight; ++u) {
                const int row = base + u * tile_lanes;
                if (row >= it.rows) continue;
                batch.load_one(u, a, size, {it.at(grid, row), all_values<X>()}, true, gated.has_input);
                kept.keep(it.number(row), batch.dy[u], batch.x[u]);
            }
            add(batch);
        }
        if (it.tail && it.lane == 0) {
            GradientBatch<X> batch;
            batch.load_one(0, a, size, {it.tail_at(grid), it.tail}, true, gated.has_input);
            add(batch);
        }
    }
    const int k = int(threadIdx.x) % tile_vectors * X::V;
    UNROLL for (int i = 0; i < X::V; ++i) {
        shared.dy[it.lane][k + i] = sum_dy[i];
        shared.dy_centered_x[it.lane][k + i] = sum_dy_x[i];
    }
    __syncthreads();
    write_gradient_column_parts<X>(grid, item, shared, a.parts);
    __syncthreads();  // before the next item overwrites the shared memory
}

template <class T> struct GradientRowShared {
    T dy[block_threads / 32], dy_centered_x[block_threads / 32];
};

template <class X, Act act>
__device__ void reduce_gradient_rows(const GradientArgs& a, Index item, const Parts& parts, Index part_at,
                                     GradientRowShared<typename X::T>& shared, const KeptPair& kept) {
    using T = typename X::T;
    const Grid& grid = a.grid;
    const RowItem<X> it(grid, item);
    const Index size = size_of(grid);
    const Gate<X, act, 0> gated(a, it.channel);
    T sum_dy = 0, sum_dy_x = 0;
    int number = int(threadIdx.x);
    for (RowWalk<X> walk(grid, it); walk.more();) {
        GradientBatch<X> b;
        UNROLL for (int u = 0; u < gradient_in_flight; ++u) {
            if (!walk.more()) continue;
            b.load_one(u, a, size, walk.next(), true, gated.has_input);
            kept.keep(number + u * block_threads, b.dy[u], b.x[u]);
        }
        number += gradient_in_flight * block_threads;
        UNROLL for (int u = 0; u < gradient_in_flight; ++u) {
            T g[X::V], x[X::V];
            gated(b.dy[u], b.x[u], b.gate[u], g, x);
            UNROLL for (int i = 0; i < X::V; ++i) {
                if (!has(b.place[u].valid, i)) continue;
                sum_dy += g[i];
                sum_dy_x = fma_rn(g[i], x[i], sum_dy_x);
            }
        }
    }
    for (int d = 16; d > 0; d /= 2) {
        sum_dy += __shfl_down_sync(0xffffffffu, sum_dy, d);
        sum_dy_x += __shfl_down_sync(0xffffffffu, sum_dy_x, d);
    }
    if (threadIdx.x % 32 == 0) {
        shared.dy[threadIdx.x / 32] = sum_dy;
        shared.dy_centered_x[threadIdx.x / 32] = sum_dy_x;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < block_threads / 32; ++w) {
            sum_dy += shared.dy[w];
            sum_dy_x += shared.dy_centered_x[w];
        }
        store1<T>(parts.offset, part_at, sum_dy);
        store1<T>(parts.m2, part_at, sum_dy_x);
    }
    __syncthreads();
}

// ---- apply ----------------------------------------------------------------------------------------------------------

// dx of one vector, and dresidual.
template <class X, Act act, int step> struct GradientWriter {
    using T = typename X::T;
    static constexpr int count = step ? X::V : 1;
    Gate<X, act, step> gated;
    T dx_slope[count], dx_offset[count];
    bool frozen, reads_x;

    __device__ __forceinline__ GradientWriter(const GradientArgs& a, const Constants& constants, Index constant_at)
        : gated(a, constants, constant_at), frozen(!a.training), reads_x(!frozen || act != Act::none) {
        UNROLL for (int i = 0; i < count; ++i) {
            dx_slope[i] = load1<T>(constants.dx_slope, constant_at);
            dx_offset[i] = load1<T>(constants.dx_offset, constant_at);
            constant_at = ColumnItem<X>::next(a.grid, constant_at);
        }
    }
    __device__ __forceinline__ void write(const GradientArgs& a, const GradientBatch<X>& b) const {
        UNROLL for (int u = 0; u < gradient_in_flight; ++u) {
            const Place& p = b.place[u];
            if (!p.valid) continue;
            T g[X::V], x[X::V];
            gated(b.dy[u], b.x[u], b.gate[u], g, x);
            if (gated.has_input && a.dresidual) store<X>(a.dresidual, p.at, X::pack(g), p.valid, a.aligned);
            UNROLL for (int i = 0; i < X::V; ++i) {
                const int k = i * step;
                const T from_x = fma_rn(dx_slope[k], x[i], dx_offset[k]);
                g[i] = frozen ? gated.scale[k] * g[i] : fma_rn(gated.scale[k], g[i], from_x);
            }
            store<X>(a.dx, p.at, X::pack(g), p.valid, a.aligned);
        }
    }
};

template <class X, Act act>
__device__ void apply_gradient_columns(const GradientArgs& a, Index item, const KeptPair& kept) {
    const Grid& grid = a.grid;
    const ColumnItem<X> it(grid, item);
    if (it.rows == 0 && !it.tail) return;
    const Index size = size_of(grid);
    const GradientWriter<X, act, 1> writer(a, a.constants, it.channel(grid));
    const bool reads_gate = writer.gated.has_input;
    for (int base = it.lane; base < it.rows; base += tile_lanes * gradient_in_flight) {
        GradientBatch<X> batch;
        UNROLL for (int u = 0; u < gradient_in_flight; ++u) {
            const int row = base + u * tile_lanes;
            if (row >= it.rows) continue;
            const Place p{it.at(grid, row), all_values<X>()};
            const int number = it.number(row);
            if (kept.x.holds(number)) batch.load_kept(u, a, size, p, kept.dy.at[number], kept.x.at[number], reads_gate);
            else batch.load_one(u, a, size, p, writer.reads_x, reads_gate);
        }
        writer.write(a, batch);
    }
    if (it.tail && it.lane == 0) {
        GradientBatch<X> batch;
        batch.load_one(0, a, size, {it.tail_at(grid), it.tail}, writer.reads_x, reads_gate);
        writer.write(a, batch);
    }
}

template <class X, Act act>
__device__ void apply_gradient_rows(const GradientArgs& a, const Constants& constants, Index constant_at, Index item,
                                    const KeptPair& kept) {
    const Grid& grid = a.grid;
    const RowItem<X> it(grid, item);
    const Index size = size_of(grid);
    const GradientWriter<X, act, 0> writer(a, constants, constant_at);
    const bool reads_gate = writer.gated.has_input;
    int number = int(threadIdx.x);
    for (RowWalk<X> walk(grid, it); walk.more();) {
        GradientBatch<X> batch;
        UNROLL for (int u = 0; u < gradient_in_flight; ++u) {
            if (!walk.more()) continue;
            const Place p = walk.next();
            const int at = number + u * block_threads;
            if (kept.x.holds(at)) batch.load_kept(u, a, size, p, kept.dy.at[at], kept.x.at[at], reads_gate);
            else batch.load_one(u, a, size, p, writer.reads_x, reads_gate);
        }
        number += gradient_in_flight * block_threads;
        writer.write(a, batch);
    }
}

}  // namespace bnfast::cuda
