// What every CUDA kernel takes: one plain struct by value. The host fills it in (plan.h makes the grid), the device and
// the emulator of the tests read it. Like all files of this folder, it includes nothing.
//
// The grid fixes the order of summation, and with it the bits, so it is a function of shape and dtype alone. There are
// two layouts. columns (S = 1): x is a matrix of N rows; `pack` consecutive rows are one packed row of row_size =
// pack*C values, a whole number of 16-byte vectors; N % pack rows are left over as a partial packed row, the tail.
// rows (S > 1): a channel is N contiguous rows of S values.
#pragma once

namespace bnfast::cuda {

using Index = long long;

enum class Act : int { none, relu, leaky };  // relu6 is relu with a bound of 6

constexpr int block_threads = 256;  // the threads that share a chunk
constexpr int tile_vectors = 32;    // columns: vectors per tile, one per thread of a warp
constexpr int tile_lanes = block_threads / tile_vectors;

struct Grid {
    Index N, C, S;
    int columns;                // 1: columns, 0: rows
    Index pack, row_size;       // columns: rows per packed row, and its values; rows: 1 and S
    Index rows, tail;           // columns: full packed rows, and rows left over; rows: N and 0
    Index row_vectors;          // columns: vectors per packed row; rows: vectors that a chunk's row may touch
    Index tiles;                // columns: tiles per packed row; rows: C
    Index chunk_rows;           // packed rows or rows per chunk
    Index chunk_width;          // rows: values per row of a chunk (<= S)
    Index pieces;               // rows: chunks side by side in one row; more than 1 only if chunk_rows is 1
    Index chunks;               // each covers a part of every channel; 0 for an empty batch
    int row_step, vector_step;  // rows: how far 256 vectors are, in rows and vectors of a chunk
    int merge_lanes;            // threads that merge the parts of one channel: 32 or 256
};

struct ParamVector {  // (C,) float32 or float64; null data: absent
    const void* data;
    int is_double;
};
struct ParamOutput {
    void* data;
    int is_double;
};

struct ActivationArgs {
    double bound, negative_slope;  // relu: min(z, bound), NaN for no bound; leaky: z > 0 ? z : z*negative_slope
};

// Per-channel constants in the compute type T (float, or double for float64 x): C values each.
struct Constants {
    void *mean_hi, *scale, *shift;  // pre-activation: (x - mean_hi)*scale + shift
    void *dx_slope, *dx_offset;     // dx = scale*g + (dx_slope*(x - mean_hi) + dx_offset)
};

// Results of the reduce step, one per part and channel, in T: [parts][C], part = chunk*pack + row within packed row.
// moments: the mean is center + offset; gradient: only `offset` and `m2` are used, as sum(g) and sum(g*(x - mean_hi)).
struct Parts {
    void *center, *offset, *m2;
};

// How a launch is made up. It changes no bit.
struct LaunchArgs {
    int cluster;        // channel: blocks that share a channel, 1 without clusters
    int kept_slots;     // resident: 16-byte vectors per thread and tensor that stay on chip
    unsigned* arrived;  // resident: blocks that have come to a grid barrier; 0 before the launch
};

struct ForwardArgs {
    Grid grid;
    LaunchArgs launch;
    const void *x, *residual;  // residual is null if absent
    void* y;                   // exactly x, or disjoint from every input
    int aligned;               // 1: every tensor is 16-byte aligned
    ParamVector gamma, beta;
    ParamVector mean_in, variance_in;          // inference: the moving statistics
    ParamOutput moving_mean, moving_variance;  // training: updated, or null
    double momentum, epsilon;
    int correction, skip_non_finite;
    ActivationArgs activation;
    double *mean, *variance, *invstd;  // (C,) results; null if not wanted
    Parts parts;
    Constants constants;
};

struct GradientArgs {
    Grid grid;
    LaunchArgs launch;
    const void *dy, *x, *gate_input;  // gate_input: the residual or the forward's y; null: the gate reads x alone
    int gate_input_is_y;
    void *dx, *dresidual;  // dx: exactly dy or x, or disjoint from every input; dresidual may be null
    int aligned;
    ParamVector mean, invstd, gamma, beta, dmean, dvariance;
    int training;  // 0: mean and invstd are constants
    ActivationArgs activation;
    ParamOutput dgamma, dbeta;
    Parts parts;
    Constants constants;
};

}  // namespace bnfast::cuda
