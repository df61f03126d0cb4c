// The plan of one call: a pure function of shape, dtype, threads and cache sizes; it touches no data.
//
// The grid decides the order of summation, so it comes from shape and dtype alone (make_grid sees nothing else). The
// schedule (who does what, in which order, through which stores) may depend on the machine: it can't change a bit.
//   by_groups: each thread reduces, finalizes and applies one group of channels at a time, which stays in cache between
//              the steps: one read and one write of memory.
//   otherwise: all chunks are reduced, the team meets, finalizes, meets, and applies: the last-read part of x is still
//              cached and is applied first, the rest is read again.
#pragma once
#include <cstdint>

#include "bnfast/bnfast.h"
#include "dispatch/kernel_table.h"
#include "machine.h"

namespace bnfast {

enum class Op { train, infer, grad, moments };

int item_bytes(DType dtype);

// (N, C, S) without extents that merge: C = 1 is one long row; S = 1 or N = 1 stay as they are.
Shape canonical(Shape shape);
Grid make_grid(Shape shape, DType dtype);

struct Plan {
    Grid grid{};        // of the reduce step
    Grid apply_grid{};  // the same but for weighted gradients (pack 1)
    bool rows = false;  // the rows layout
    bool by_groups = false;
    bool stream = false;         // non-temporal stores
    bool prefetch_next = false;  // moments: prefetch the next block while one is read
    int threads = 1;
    std::int64_t group = 1, groups = 1;              // channels a group
    std::int64_t apply_unit = 1, apply_units = 1;    // rows: values; columns: packed rows
    std::int64_t slice = 1, slices = 1;              // channels per finalize slice
    std::int64_t bytes_read = 0, bytes_written = 0;  // of memory beyond the caches, as the plan expects

    std::int64_t group_end(std::int64_t g) const { return (g + 1) * group < grid.C ? (g + 1) * group : grid.C; }
};

struct PlanRequest {
    Shape shape;
    DType dtype = DType::float32;
    Op op = Op::train;
    int threads = 1;
    bool masked = false;
    bool whole_first = false;        // every statistic before any output (NanPolicy::raise)
    int inputs = 1, outputs = 1;     // tensors of x's size that the apply step reads and writes
    std::int64_t serial_bytes = -1;  // tensors below this run on one thread; -1: the measured default
};
Plan make_plan(const PlanRequest& request, const Machine& machine);

// Whether a call that reads and writes so many bytes stores past the caches.
bool streams(std::int64_t bytes, const Machine& machine);

int threads_for(std::int64_t tensor_bytes, int threads, std::int64_t serial_bytes);  // 1 below serial_bytes

void set_serial_bytes(std::int64_t bytes);  // tests only; -1: the default
std::int64_t serial_bytes();

}  // namespace bnfast
