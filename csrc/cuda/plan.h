// The plan of one CUDA call: a pure function of shape, dtype, call and device limits. It touches no data and no device.
//
// The grid fixes the order of summation, and with it the bits, so make_grid gets shape and dtype alone. The rest of the
// plan is schedule: the form, how many blocks, how much shared memory. It changes no bit.
#pragma once
#include <cstdint>

#include "bnfast/cuda.h"
#include "cuda/kernels/arguments.h"

namespace bnfast::cuda {

enum class Form { automatic, sweeps, channel, resident };

struct DeviceLimits {
    int sms = 1;
    Index shared_per_block = 48 << 10;  // the most that a kernel can opt in to
    Index l2_bytes = 0;
    Index shared_per_sm = 0, reserved_per_block = 1 << 10;  // of shared_per_sm, beside what a kernel asks for
    bool cooperative = false, clusters = false;             // launches that are possible
};

constexpr DeviceLimits a100{108, 163 << 10, 40 << 20, 164 << 10, 1 << 10, true, false},
    h100{132, 227 << 10, 50 << 20, 228 << 10, 1 << 10, true, true},
    b200{148, 227 << 10, 126 << 20, 228 << 10, 1 << 10, true, true};

Grid make_grid(Shape shape, DType dtype);

struct PlanRequest {
    Shape shape;
    DType dtype = DType::float32;
    Call call = Call::train;
    Form form = Form::automatic;  // a form that is not possible here becomes sweeps
    int inputs = 1, outputs = 1;  // tensors of x's size that the apply step reads and writes
};

// Where the parts and constants of kernels/arguments.h lie, in bytes from the beginning of the call's scratch memory.
struct ScratchLayout {
    Index part_bytes = 0, constants_at = 0, constant_bytes = 0, arrived_at = 0, bytes = 0;
    Parts parts(void* scratch) const;
    unsigned* arrived(void* scratch) const;  // the counter of the form resident
    Constants constants(void* scratch) const;
};

struct Plan {
    Grid grid{};
    Form form = Form::sweeps;
    // sweeps: blocks of the reduce, finalize and apply steps, 0 for a step that the call doesn't have. channel and
    // resident: of the one launch, in reduce_blocks.
    unsigned reduce_blocks = 0, finalize_blocks = 0, apply_blocks = 0;
    Index reduce_shared = 0, finalize_shared = 0;  // dynamic shared memory, in bytes
    int cluster = 1;                               // channel: blocks that share a channel
    int kept_slots = 0;                            // resident: vectors per thread and tensor that stay on chip
    ScratchLayout scratch;
    Index bytes_read = 0, bytes_written = 0;  // of tensors, from and to global memory, L2 hits left out of account
};
Plan make_plan(const PlanRequest& request, const DeviceLimits& device);

// The blocks of the form resident per SM, and the most shared memory that it gives one of them.
constexpr int resident_blocks_per_sm = 2;
Index resident_shared_limit(const DeviceLimits& device);

// Shared memory of the reduce steps; of a block of the form `channel`, if `cluster` of them keep a channel; of the form
// `resident`, if each thread keeps `slots` vectors of each tensor.
Index moments_shared_bytes(const Grid& grid, DType dtype);
Index gradient_shared_bytes(const Grid& grid, DType dtype);
Index channel_shared_bytes(const Grid& grid, DType dtype, bool gradient, int cluster);
Index resident_shared_bytes(DType dtype, bool gradient, int slots);

}  // namespace bnfast::cuda
