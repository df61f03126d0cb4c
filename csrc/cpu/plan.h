// The plan of one call: a pure function of shape, dtype, thread count and cache sizes. It touches no data.
//
// The grid fixes the order of summation, and with it the bits, so it depends on shape and dtype alone: make_grid gets
// nothing else. The schedule (which thread does what, in which order, with which stores) may depend on the machine,
// because it changes no bit. There are two schedules:
//   by groups     A thread reduces, finalizes and applies one group of channels at a time. The group stays in cache
//                 between the steps, so memory is read once and written once.
//   step by step  The team reduces all chunks, finalizes all channels, then applies. Apply starts with the part of x
//                 that was read last and is still cached; the rest is read from memory a second time.
#pragma once
#include <cstdint>

#include "bnfast/bnfast.h"
#include "dispatch/kernel_table.h"
#include "machine.h"

namespace bnfast {

enum class Op { train, infer, grad, moments };

int item_bytes(DType dtype);

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// (N, C, S) with the extents merged that can be: C = 1 becomes one long row. S = 1 and N = 1 stay as they are.
Shape canonical(Shape shape);
Grid make_grid(Shape shape, DType dtype);

// A task is what Team::for_each hands to a thread at once.
struct Plan {
    Grid grid{};        // of the reduce step
    Grid apply_grid{};  // of the apply step: the same, except that weighted gradients have pack 1
    bool rows = false;  // rows layout, otherwise columns
    bool by_groups = false;
    bool stream = false;         // non-temporal stores
    bool prefetch_next = false;  // reduce prefetches the next block while it reads one
    int threads = 1;
    std::int64_t channels_per_group = 1, num_groups = 1;
    std::int64_t apply_task_size = 1, num_apply_tasks = 1;  // rows: values; columns: packed rows
    std::int64_t channels_per_finalize_task = 1, num_finalize_tasks = 1;
    std::int64_t bytes_read = 0, bytes_written = 0;  // expected memory traffic beyond the caches

    std::int64_t group_end(std::int64_t g) const {
        const std::int64_t end = (g + 1) * channels_per_group;
        return end < grid.C ? end : grid.C;
    }
};

struct PlanRequest {
    Shape shape;
    DType dtype = DType::float32;
    Op op = Op::train;
    int threads = 1;
    bool masked = false;
    bool whole_first = false;        // no output before every statistic is known (NanPolicy::raise)
    int inputs = 1, outputs = 1;     // tensors of x's size that the apply step reads and writes
    int operations = 0;              // of an activation function, per value; 0 for the relus, which memory hides
    std::int64_t serial_bytes = -1;  // smaller tensors run on one thread; -1: the measured default
};
Plan make_plan(const PlanRequest& request, const Machine& machine);

// The bytes that each of `threads` may expect to find again in cache: half of its L2, or its share of half the L3.
std::int64_t cache_per_thread(const Machine& machine, int threads);

// Whether a call that reads and writes so many bytes uses non-temporal stores.
bool streams(std::int64_t bytes, const Machine& machine);

int threads_for(std::int64_t tensor_bytes, int threads, std::int64_t serial_bytes);  // 1 below serial_bytes

// The bytes whose reading and writing in cache takes as long as a call over so many values: arithmetic counted too. 16
// operations take as long as a float32 (docs/performance/activations.md).
std::int64_t work_bytes(std::int64_t values, DType dtype, int operations);

void set_serial_bytes(std::int64_t bytes);  // tests only; -1: the measured default
std::int64_t serial_bytes();

// The least number of tasks per thread: a thread that is done takes over others' tasks, so the team waits for at most a
// fourth of one thread's work.
constexpr int tasks_per_thread = 4;
constexpr std::int64_t apply_task_bytes = 128 << 10;  // of x: two threads get four tasks each from 1 MiB on

}  // namespace bnfast
