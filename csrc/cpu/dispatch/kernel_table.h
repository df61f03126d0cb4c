// What an instruction set must provide: one table of plain functions over plain structs.
//
// Layouts: "rows" (S > 1: a channel is N contiguous rows of S values) and "columns" (S = 1: a channel is a column of a
// matrix of N rows). In columns, `pack` consecutive rows are seen as one row of K = pack*C columns, so that few or odd
// channels fill whole vectors; pack belongs to the grid, because it decides the order of summation.
// All functions are noexcept, allocate nothing, start no threads. Ranges are half open. C headers only: this file is
// read by kernel translation units (see kernels/simd.inl.h).
#pragma once
#include <stdint.h>

namespace bnfast {

enum KernelActivation { act_none = 0, act_relu = 1, act_leaky = 2, act_count = 3 };  // relu6 is relu with a bound of 6
enum GradMode { grad_batch = 0, grad_weighted = 1, grad_frozen = 2, grad_mode_count = 3 };

// The reduction grid: a function of shape and dtype alone (plan.cpp), so it may decide bits.
struct Grid {
    int64_t N, C, S;
    int64_t pack;         // columns: rows seen as one; 1 in the rows layout
    int64_t block_rows;   // rows: rows of one channel in a block (>= 1); columns: packed rows in a block
    int64_t block_width;  // rows: values of a row in a block (<= S); columns: unused
    int64_t blocks;       // blocks in all (each a slice of every channel)
    int64_t chunk_blocks, chunks;
};

// Per-channel constants in the compute type T (float, or double for float64 x), each of pack*C values.
struct Params {
    void *mean_hi, *scale, *shift;         // pre-activation: (x - mean_hi)*scale + shift
    void *mean_dy, *dx_slope, *dx_offset;  // dx = scale*(g - mean_dy) + (dx_slope*(x - mean_hi) + dx_offset)
};

struct ActivationArgs {
    double bound, negative_slope;  // relu: min(z, bound); leaky: z > 0 ? z : z*negative_slope
};

struct ReduceArgs {  // moments of one chunk, channels [c0, c1)
    Grid grid;
    const void *x, *mask;
    int64_t chunk, c0, c1;
    int prefetch_next;                     // whether the next block is prefetched while one is read
    double *count, *center, *offset, *m2;  // count: [chunks], the same for every channel; the rest [chunks][C]
    double* scratch;                       // 4*pack*C doubles of this thread's own, where pack > 1 or mask
};

struct ApplyArgs {
    Grid grid;
    const void *x, *residual;
    void* y;
    Params params;
    ActivationArgs act;
    int stream;                 // non-temporal stores where y is aligned
    int64_t begin, end;         // rows: flat range of values; columns: packed rows
    int64_t c0, c1;             // columns: range of packed columns (0, K unless a channel group is applied)
    int64_t prefetch_distance;  // rows: in values; 0 disables prefetching
};

struct GradReduceArgs {
    Grid grid;
    const void *dy, *x, *gate_input;  // gate_input: residual or, where gate_input_is_y, the forward's y; null: neither
    int gate_input_is_y;
    Params params;  // mean_hi, scale, shift
    ActivationArgs act;
    int64_t chunk, c0, c1;
    double *sum_dy, *sum_dy_centered_x;  // [chunks][C]; sum of g and of g*(x - mean_hi)
    double* scratch;                     // 2*pack*C doubles, where pack > 1
};

struct GradApplyArgs {
    Grid grid;
    const void *dy, *x, *gate_input, *mask;
    int gate_input_is_y;
    void *dx, *dresidual;
    Params params;
    ActivationArgs act;
    int stream;
    int64_t begin, end, c0, c1, prefetch_distance;
};

struct ParamVector {  // (C,) float or double; null data: absent
    const void* data;
    int is_double;
};

struct FinalizeArgs {  // channels [c0, c1) of C
    int64_t C, pack, c0, c1;
    ParamVector mean, variance_or_invstd, gamma, beta;
    int is_invstd;  // whether variance_or_invstd is invstd
    double epsilon;
    double* invstd;  // written where not null
    Params params;
};

struct GradFinalizeArgs {
    int64_t C, pack, c0, c1, chunks;
    const double *sum_dy, *sum_dy_centered_x;
    ParamVector mean, invstd, gamma, dmean, dvariance;
    double count;
    int training;
    void *dgamma, *dbeta;
    int dgamma_is_double, dbeta_is_double;
    Params params;
};

struct MergeArgs {  // chunk results of channels [c0, c1), merged in chunk order
    int64_t C, chunks, c0, c1;
    const double *count, *center, *offset, *m2;  // a chunk's mean is center + offset
    double *mean_out, *variance_out;
};

struct MovingArgs {
    int64_t C;
    const double *mean, *variance;
    void *moving_mean, *moving_variance;
    int mean_is_double, variance_is_double;
    double momentum, correction_factor;
    int skip_non_finite;
};

constexpr int64_t row_block = 2048;  // columns of a row that are summed together

// `rows` rows, `stride` values apart, columns [k0, k1) of each; row i has the constants at i*constant_step.
struct RowArgs {
    const void *x, *dy;
    void* y;  // or dx
    int64_t rows, stride, k0, k1, constant_step;
    int64_t prefetch_distance;  // in values; 0 disables prefetching
    Params params;
    const void *gamma, *beta;              // by column, in the compute type
    double *row_sum, *row_sum_centered_x;  // of dy*gamma and dy*gamma*(x - mean_hi), at i*constant_step
    double *sum_dy, *sum_dy_xhat;          // by column; added to
    int stream;
};

struct TypeKernels {
    void (*reduce_rows[2])(const ReduceArgs&) noexcept;  // [masked]
    void (*reduce_columns[2])(const ReduceArgs&) noexcept;
    void (*apply_rows[act_count])(const ApplyArgs&) noexcept;
    void (*apply_columns[act_count])(const ApplyArgs&) noexcept;
    void (*grad_reduce_rows[act_count])(const GradReduceArgs&) noexcept;
    void (*grad_reduce_columns[act_count])(const GradReduceArgs&) noexcept;
    void (*grad_apply_rows[grad_mode_count][act_count])(const GradApplyArgs&) noexcept;
    void (*grad_apply_columns[grad_mode_count][act_count])(const GradApplyArgs&) noexcept;
    void (*finalize)(const FinalizeArgs&) noexcept;
    void (*grad_finalize)(const GradFinalizeArgs&) noexcept;
    void (*row_apply)(const RowArgs&) noexcept;
    void (*row_grad_reduce)(const RowArgs&) noexcept;
    void (*row_grad_apply)(const RowArgs&) noexcept;
};

struct KernelTable {
    const char* isa;                             // set by the translation unit from the compiler's own macros
    TypeKernels types[4];                        // indexed by DType
    double (*merge)(const MergeArgs&) noexcept;  // returns the summed count
    void (*update_moving)(const MovingArgs&) noexcept;
};

}  // namespace bnfast
