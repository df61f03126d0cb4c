// Where the values of one item lie. An item is what 256 threads reduce or write together: one chunk of one tile of
// columns, or one chunk of one channel in the rows layout. Both layouts see the tensor as 16-byte vectors from its
// first value on. In the rows layout a row may begin and end inside a vector, which its neighbour then reads as well.
#pragma once
#include "types.cuh"

namespace bnfast::cuda {

// Columns: thread (tx, ty) takes vector tx of the tile, in the packed rows ty, ty + 8, ... of the chunk.
template <class X> struct ColumnItem {
    Index chunk, first;  // chunk, and its first packed row
    Index column;        // this thread's first column within the packed row
    int rows;            // full packed rows in this chunk, for this thread: 0 beyond the last vector
    int lane;            // ty
    unsigned tail;       // values of the partial packed row after the last chunk, if it is this thread's; else 0

    __device__ __forceinline__ ColumnItem(const Grid& g, Index item) {
        const int tx = int(threadIdx.x) % tile_vectors;
        lane = int(threadIdx.x) / tile_vectors;
        chunk = item / g.tiles;
        first = chunk * g.chunk_rows;
        const Index vector = item % g.tiles * tile_vectors + tx, left = g.rows - first;
        column = vector * X::V;
        const bool inside = vector < g.row_vectors;
        rows = inside ? int(least(left, g.chunk_rows)) : 0;
        const Index tail_values = chunk == g.chunks - 1 && inside ? g.tail * g.C - column : 0;
        tail = tail_values > 0 ? values_between(0, int(least(tail_values, Index(X::V)))) : 0;
    }
    __device__ __forceinline__ Index at(const Grid& g, int row) const { return (first + row) * g.row_size + column; }
    // The number of this thread's vector in a row of the chunk (struct Kept).
    __device__ __forceinline__ int number(int row) const {
        return row * tile_vectors + int(threadIdx.x) % tile_vectors;
    }
    __device__ __forceinline__ Index tail_at(const Grid& g) const { return g.rows * g.row_size + column; }
    // The channels of this thread's V columns, in turn: next(c) follows c.
    __device__ __forceinline__ Index channel(const Grid& g) const { return column % g.C; }
    static __device__ __forceinline__ Index next(const Grid& g, Index c) { return c + 1 == g.C ? 0 : c + 1; }
};

// Rows: the vectors that the chunk's rows touch are numbered row by row, row_vectors per row. Thread t takes numbers t,
// t + 256, ...
template <class X> struct RowItem {
    Index chunk, channel, first;  // first: flat index of the chunk's first value
    int rows, width;

    __device__ __forceinline__ RowItem(const Grid& g, Index item) {
        chunk = item / g.C;
        channel = item % g.C;
        const Index n = chunk / g.pieces * g.chunk_rows, s = chunk % g.pieces * g.chunk_width;
        rows = int(least(g.N - n, g.chunk_rows));
        width = int(least(g.S - s, g.chunk_width));
        first = (n * g.C + channel) * g.S + s;
    }
};

// One vector of a row item: its first value's flat index (a multiple of V), and which values belong to the row.
struct Place {
    Index at;
    unsigned valid;
};

template <class X> struct RowWalk {
    const Grid& grid;
    RowItem<X> item;
    int row_vectors, row, vector;

    __device__ __forceinline__ RowWalk(const Grid& g, const RowItem<X>& it)
        : grid(g), item(it), row_vectors(int(g.row_vectors)) {
        row = int(threadIdx.x) / row_vectors;
        vector = int(threadIdx.x) % row_vectors;
    }
    __device__ __forceinline__ bool more() const { return row < item.rows; }
    // The current place; then goes on to the vector 256 numbers further.
    __device__ __forceinline__ Place next() {
        const Index begin = item.first + row * (grid.C * grid.S);
        Place p;
        p.at = (begin / X::V + vector) * X::V;
        const Index low = begin - p.at, high = low + item.width;
        p.valid = values_between(low > 0 ? int(low) : 0, high < X::V ? int(high) : X::V);
        row += grid.row_step;
        vector += grid.vector_step;
        if (vector >= row_vectors) {
            vector -= row_vectors;
            ++row;
        }
        return p;
    }
};

// Vectors of an item that its block keeps on chip. Every thread reads back only those that it kept itself, so no
// barrier is needed. Vectors are numbered such that thread t has t, t + 256, ... in the order of its walk.
struct Kept {
    Raw* at = nullptr;
    unsigned count = 0;
    __device__ __forceinline__ bool holds(int number) const { return unsigned(number) < count; }
    // Where vector `number` is kept, or null.
    __device__ __forceinline__ Raw* find(int number) const { return holds(number) ? at + number : nullptr; }
};

// The most vectors that a thread walks over in one item; a tail of columns is left out, and never kept.
__device__ __forceinline__ int item_slots(const Grid& g) {
    if (g.columns) return int(g.chunk_rows / tile_lanes);
    return int((g.chunk_rows * g.row_vectors + block_threads - 1) / block_threads);
}

__device__ __forceinline__ Index size_of(const Grid& g) { return g.N * g.C * g.S; }
__device__ __forceinline__ Index items_of(const Grid& g) { return g.chunks * g.tiles; }
__device__ __forceinline__ Index parts_of(const Grid& g) { return g.chunks * g.pack; }

// How many values of one channel part `part` holds.
__device__ __forceinline__ Index part_count(const Grid& g, Index part) {
    if (g.columns) {
        const Index chunk = part / g.pack, full = least(g.rows - chunk * g.chunk_rows, g.chunk_rows);
        return full + (chunk == g.chunks - 1 && part % g.pack < g.tail ? 1 : 0);
    }
    const Index n = part / g.pieces * g.chunk_rows, s = part % g.pieces * g.chunk_width;
    return least(g.N - n, g.chunk_rows) * least(g.S - s, g.chunk_width);
}

// The flat index of value i of part `part` in channel c, 0 <= i < part_count.
__device__ __forceinline__ Index part_value(const Grid& g, Index part, Index c, Index i) {
    if (g.columns) return ((part / g.pack * g.chunk_rows + i) * g.pack + part % g.pack) * g.C + c;
    const Index n = part / g.pieces * g.chunk_rows, s = part % g.pieces * g.chunk_width;
    const Index width = least(g.S - s, g.chunk_width);
    return ((n + i / width) * g.C + c) * g.S + s + i % width;
}

}  // namespace bnfast::cuda
