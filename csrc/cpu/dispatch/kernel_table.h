// The interface that every instruction set implements: one table of plain functions over plain structs.
//
// Layouts. rows (S > 1): a channel is N contiguous rows of S values. columns (S = 1): x is a matrix of N rows, and a
// channel is one of its columns. In the columns layout `pack` consecutive rows are treated as one packed row of
// K = pack*C columns, so that few or odd channels fill whole vectors. pack is part of the grid, because it fixes the
// order of summation.
//
// The functions are noexcept, allocate nothing, start no threads and write only the outputs in their arguments. Ranges
// are half open. Kernel translation units include this file, so it may include C headers only (kernels/simd.inl.h).
#pragma once
#include <stdint.h>

namespace bnfast {

// relu6 is relu with a bound of 6. act_function calls one of the functions below; only row norm's kernels call the
// first four, which the others have inlined.
enum KernelActivation { act_none = 0, act_relu = 1, act_leaky = 2, act_function = 3, act_count = 4 };
enum ActivationFunction {  // in the order of bnfast::Activation
    function_none,
    function_relu,
    function_relu6,
    function_leaky_relu,
    function_silu,
    function_hard_silu,
    function_sigmoid,
    function_hard_sigmoid,
    function_tanh,
    function_gelu,
    function_gelu_tanh,
    function_elu,
    function_selu,
    function_softplus,
    function_mish,
    function_count
};
enum GradMode { grad_batch = 0, grad_weighted = 1, grad_frozen = 2, grad_mode_count = 3 };

// The reduction grid. It fixes the order of summation, and with it the bits, so plan.cpp derives it from shape and
// dtype alone.
struct Grid {
    int64_t N, C, S;
    int64_t pack;                  // columns: rows per packed row; rows: 1
    int64_t block_rows;            // rows: rows of one channel per block (>= 1); columns: packed rows per block
    int64_t block_width;           // rows: values per row of a block (<= S); columns: unused
    int64_t blocks;                // in total; each covers a part of every channel
    int64_t chunk_blocks, chunks;  // blocks per chunk, and chunks; a reduce call handles one chunk
};

// Per-channel constants in the compute type T (float, or double for float64 x): pack*C values each.
struct Params {
    void *mean_hi, *scale, *shift;         // pre-activation: (x - mean_hi)*scale + shift
    void *mean_dy, *dx_slope, *dx_offset;  // dx = scale*(g - mean_dy) + (dx_slope*(x - mean_hi) + dx_offset)
};

struct ActivationArgs {
    double bound, negative_slope;  // relu: min(z, bound), NaN for no bound; leaky: z > 0 ? z : z*negative_slope
    int function;                  // act_function: an ActivationFunction
};

struct ReduceArgs {  // moments of one chunk over channels [c0, c1)
    Grid grid;
    const void *x, *mask;
    int64_t chunk, c0, c1;
    int prefetch_next;                     // prefetch the next block while reading one
    double *count, *center, *offset, *m2;  // count: [chunks], equal for all channels; others: [chunks][C]
    double* scratch;                       // 4*pack*C doubles per thread, needed if pack > 1 or with a mask
};

struct ApplyArgs {
    Grid grid;
    const void *x, *residual;
    void* y;
    Params params;
    ActivationArgs act;
    int stream;                 // non-temporal stores, if y is aligned
    int64_t begin, end;         // rows: range of flat indices; columns: of packed rows
    int64_t c0, c1;             // columns: range of packed columns; [0, K), or one group of channels
    int64_t prefetch_distance;  // rows layout: in values; 0 disables prefetching
};

struct GradReduceArgs {
    Grid grid;
    const void *dy, *x, *gate_input;  // gate_input: see gate_input_is_y; null: the gate reads x alone
    int gate_input_is_y;              // 1: the forward's y; 0: the residual
    Params params;                    // mean_hi, scale, shift
    ActivationArgs act;
    int64_t chunk, c0, c1;
    double *sum_dy, *sum_dy_centered_x;  // [chunks][C]: sum of g, sum of g*(x - mean_hi)
    double* scratch;                     // 2*pack*C doubles per thread, needed if pack > 1
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

struct ParamVector {  // (C,) float32 or float64; null data: absent
    const void* data;
    int is_double;
};

struct FinalizeArgs {  // channels [c0, c1) of C
    int64_t C, pack, c0, c1;
    ParamVector mean, variance_or_invstd, gamma, beta;
    int is_invstd;  // 1: variance_or_invstd holds invstd
    double epsilon;
    double* invstd;  // output; may be null
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

struct MergeArgs {  // merges the chunk results of channels [c0, c1), in chunk order
    int64_t C, chunks, c0, c1;
    const double *count, *center, *offset, *m2;  // the mean of a chunk is center + offset
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

constexpr int64_t row_block = 2048;  // columns per block of a row; a row_grad_reduce call handles one

// Columns [k0, k1) of `rows` rows, which are `stride` values apart. Row i has its constants at index i*constant_step.
struct RowArgs {
    const void *x, *dy, *residual;
    void *y, *dresidual;  // y: or dx
    ActivationArgs act;   // act.function is called, if the kernel is the active one
    int64_t rows, stride, k0, k1, constant_step;
    int64_t prefetch_distance;  // in values; 0 disables prefetching
    Params params;
    const void *gamma, *beta;              // per column, in the compute type
    double *row_sum, *row_sum_centered_x;  // sums of t = dy*gamma and t*(x - mean_hi), at i*constant_step
    double *sum_dy, *sum_dy_xhat;          // per column; the call adds to them
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
    void (*row_apply[2])(const RowArgs&) noexcept;  // [active: with an activation or a residual]
    void (*row_grad_reduce[2])(const RowArgs&) noexcept;
    void (*row_grad_apply[2])(const RowArgs&) noexcept;
};

struct KernelTable {
    const char* isa;                             // its name; the translation unit checks the compiler flags
    TypeKernels types[4];                        // indexed by DType
    double (*merge)(const MergeArgs&) noexcept;  // returns the total count
    void (*update_moving)(const MovingArgs&) noexcept;
};

}  // namespace bnfast
