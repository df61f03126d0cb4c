#include "plan.h"

#include <algorithm>
#include <atomic>
#include <numeric>

namespace bnfast {
namespace {

using std::int64_t;

constexpr int64_t KiB = 1 << 10, MiB = 1 << 20;

// ---- the grid: shape and dtype alone -------------------------------------------------------------------------------

// How many rows of few or odd channels are joined into one, so that K = pack*C columns fill vectors: K is a multiple of
// 64 below 64 channels, of 16 (a cache line of float32) up to 256. Above that a partial vector costs less than 6 %.
int64_t pack_of(int64_t N, int64_t C) {
    int64_t pack = 1;
    if (C < 64) pack = 64 / std::gcd(C, int64_t(64));
    else if (C <= 256) pack = 16 / std::gcd(C, int64_t(16));
    return N >= 8 * pack ? pack : 1;  // with fewer packed rows, adding up `pack` columns costs more than it saves
}

Grid rows_grid(Shape s, DType dtype) {
    Grid g{s.N, s.C, s.S, 1, 1, 1, 0, 1, 1};
    const int64_t block = dtype == DType::float64 ? 2048 : 4096;  // values; 16 KiB: half of a 32 KiB L1
    g.block_width = std::min(s.S, block);
    // A lane adds at most 64 values in float32. With 2048 the variance of (200000, 1, 2) was wrong by 9e-6.
    g.block_rows = s.S < block ? std::min(s.N, block / std::max<int64_t>(s.S, 64)) : 1;
    g.blocks = ceil_div(s.N, g.block_rows) * ceil_div(s.S, g.block_width);
    g.chunk_blocks = 64;  // 1 MiB of a channel, so that even C = 1 is divided among threads
    g.chunks = ceil_div(g.blocks, g.chunk_blocks);
    return g;
}

Grid columns_grid(Shape s, DType dtype) {
    Grid g{s.N, s.C, 1, 1, 1, 1, 0, 1, 1};
    g.pack = pack_of(s.N, s.C);
    g.block_rows = dtype == DType::float64 ? 64 : 128;  // 128 rows of 64 columns of float32: 32 KiB
    const int64_t packed_rows = s.N / g.pack;
    g.blocks = ceil_div(packed_rows, g.block_rows);
    // A chunk is about 256 KiB, but at least 2 blocks, so that its float64 results stay below 1/16 of what was read.
    // 256 Ki columns and more are 2 blocks in any case, and 2^54 would overflow.
    const int64_t block_bytes = g.block_rows * item_bytes(dtype) * std::min(g.pack * s.C, 256 * KiB);
    g.chunk_blocks = std::clamp<int64_t>(256 * KiB / block_bytes, 2, 64);
    g.chunks = ceil_div(g.blocks, g.chunk_blocks);
    return g;
}

// ---- groups of channels: the schedule ------------------------------------------------------------------------------

struct Grouping {
    int64_t channels;  // per group
    bool pays;         // whether going by groups is faster than step by step
};

// Rows layout: a group takes channels_per_group*S contiguous values out of each of N samples.
Grouping group_rows(const Plan& plan, int64_t channel_bytes, int64_t item, const Machine& machine) {
    // With groups of 256 KiB so few values are contiguous that training of 13 to 26 MB took 1.1x the time.
    constexpr int64_t group_bytes = 2 * MiB;
    // In cache, less than a contiguous page costs more than a second read: without groups (256, 64, 5, 5) trains in
    // 0.78x the time, (1000, 16, 4, 4) in 0.82x. Beyond the cache the second read costs more.
    constexpr int64_t least_contiguous_bytes = 4 * KiB;
    const Grid& g = plan.grid;
    const int64_t at_least_groups = tasks_per_thread * plan.threads;
    const int64_t channels = std::clamp<int64_t>(group_bytes / std::max<int64_t>(channel_bytes, 1), 1,
                                                 std::max<int64_t>(1, g.C / at_least_groups));
    const bool fits = channels * channel_bytes <= cache_per_thread(machine, plan.threads);
    const bool feeds_team = plan.threads == 1 || g.C >= at_least_groups;
    const bool long_enough = plan.stream || g.N == 1 || channels * g.S * item >= least_contiguous_bytes;
    return {channels, fits && feeds_team && long_enough};
}

// Columns layout: a group takes some columns of every row.
Grouping group_columns(const Plan& plan, int64_t channel_bytes, int64_t item, const Machine& machine) {
    // The prefetchers need wide groups: with 256 bytes of each row a (1568, 2048) training step took 2.2x the time that
    // it takes without groups.
    constexpr int64_t least_width_bytes = 1 * KiB;
    constexpr int64_t step = 64;  // columns: whole vectors and cache lines for every dtype and instruction set
    const Grid& g = plan.grid;
    const int64_t least = std::min<int64_t>(g.C, least_width_bytes / item);
    // Half of L2 and not the share of L3, because the rows of a group lie apart.
    const int64_t most = machine.l2 / 2 / std::max<int64_t>(channel_bytes, 1) / step * step;
    const int64_t channels = std::min({most, round_up(ceil_div(g.C, plan.threads), step), g.C});
    return {channels, channels >= least && (plan.threads == 1 || g.C >= least * plan.threads)};
}

// Columns layout with packed rows: channels can't be separated, so that the only group is all of them.
Grouping group_packed(const Plan& plan, int64_t channel_bytes, const Machine& machine) {
    return {plan.grid.C, plan.threads == 1 && plan.grid.C * channel_bytes <= machine.l2 / 2};
}

// Step by step, a reduce task is a chunk of all channels; where the chunks alone can't feed the team, of fewer.
int64_t channels_per_reduce_task(const Plan& plan) {
    const Grid& g = plan.grid;
    const int64_t wanted_tasks = tasks_per_thread * plan.threads;
    if (plan.threads == 1 || g.pack > 1 || g.chunks >= wanted_tasks) return g.C;
    const int64_t channels = ceil_div(g.C, ceil_div(wanted_tasks, std::max<int64_t>(1, g.chunks)));
    return plan.rows ? channels : std::max<int64_t>(64, round_up(channels, 64));
}

void schedule_groups(Plan& plan, const PlanRequest& request, const Machine& machine) {
    const Grid& g = plan.grid;
    const int64_t item = item_bytes(request.dtype), channel_bytes = g.N * g.S * item * request.inputs;
    const Grouping grouping = plan.rows     ? group_rows(plan, channel_bytes, item, machine)
                              : g.pack == 1 ? group_columns(plan, channel_bytes, item, machine)
                                            : group_packed(plan, channel_bytes, machine);
    plan.by_groups = grouping.pays && !request.whole_first && request.op != Op::infer;
    plan.channels_per_group = plan.by_groups ? grouping.channels : channels_per_reduce_task(plan);
    plan.num_groups = ceil_div(g.C, std::max<int64_t>(1, plan.channels_per_group));
}

// ---- tasks of finalize and apply -----------------------------------------------------------------------------------

void schedule_finalize(Plan& plan) {
    const int64_t C = plan.grid.C;
    // 64 doubles are whole cache lines: no two threads write to the same one.
    plan.channels_per_finalize_task = std::max<int64_t>(64, round_up(ceil_div(C, plan.threads), 64));
    plan.num_finalize_tasks = ceil_div(C, plan.channels_per_finalize_task);
}

void schedule_apply(Plan& plan, const PlanRequest& request) {
    const Grid& g = plan.apply_grid;
    // What a task's bytes amount to per value, so that tasks of much arithmetic are as long as others.
    const int64_t item = work_bytes(1, request.dtype, request.operations);
    if (plan.rows) {
        plan.apply_task_size = round_up(apply_task_bytes / item, 64);
        plan.num_apply_tasks = ceil_div(g.N * g.C * g.S, plan.apply_task_size);
    } else {
        const int64_t rows = apply_task_bytes / std::max<int64_t>(1, g.pack * g.C * item);
        plan.apply_task_size = std::max<int64_t>(16, rows / 16 * 16);
        plan.num_apply_tasks = std::max<int64_t>(1, ceil_div(g.N / g.pack, plan.apply_task_size));
    }
}

std::atomic<int64_t> serial_override{-1};
// A DenseNet121 step took 189 to 195 ms with thresholds of 256 KiB to 4 MiB and 197 ms on one thread alone.
constexpr int64_t default_serial_bytes = 256 * KiB;

}  // namespace

int item_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

Shape canonical(Shape s) {
    if (s.C == 1 && s.N != 0 && s.S != 0) return {1, 1, s.N * s.S};
    return s;
}

Grid make_grid(Shape shape, DType dtype) {
    const Shape s = canonical(shape);
    if (s.size() == 0) return Grid{0, s.C, 1, 1, 1, 1, 0, 1, 0};  // nothing to read: no chunks
    return s.S > 1 ? rows_grid(s, dtype) : columns_grid(s, dtype);
}

Plan make_plan(const PlanRequest& request, const Machine& machine) {
    Plan plan;
    plan.grid = plan.apply_grid = make_grid(request.shape, request.dtype);
    if (request.masked) plan.apply_grid.pack = 1;
    plan.rows = plan.grid.S > 1;
    const int64_t tensor = request.shape.size() * item_bytes(request.dtype);
    const int64_t work = work_bytes(request.shape.size(), request.dtype, request.operations);
    plan.threads = threads_for(work, request.threads, request.serial_bytes);
    plan.stream = streams(tensor * (request.inputs + request.outputs), machine);
    // Where x lies in L2, prefetching costs a quarter of the reduce step.
    plan.prefetch_next = tensor > plan.threads * machine.l2;
    schedule_groups(plan, request, machine);
    schedule_finalize(plan);
    schedule_apply(plan, request);
    const bool cached = plan.by_groups || tensor * request.inputs <= machine.l3 / 2;
    const int reads = request.op == Op::infer || request.op == Op::moments || cached ? 1 : 2;
    plan.bytes_read = tensor * request.inputs * reads;
    plan.bytes_written = tensor * request.outputs;
    return plan;
}

int64_t cache_per_thread(const Machine& machine, int threads) {
    return std::max(machine.l2 / 2, machine.l3 / (2 * threads));
}

// Non-temporal stores lose while the consumer may still find y in cache. They start where inputs and outputs exceed
// five eighths of the LLC, because other processes share the LLC. Compared with three quarters: gradients of 7 to 8.4
// MB took 0.59 to 0.93x the time (0.43 to 0.63x on one thread), trainings of 10.5 to 12 MB 0.96 to 1.06x (0.61 to
// 0.72x), infer 1.06 to 1.13x (0.52 to 0.68x). With a half, a training of 8 MB took 1.26x.
bool streams(int64_t bytes, const Machine& machine) { return bytes > machine.l3 / 8 * 5; }

int threads_for(int64_t tensor_bytes, int threads, int64_t serial) {
    return tensor_bytes < (serial >= 0 ? serial : default_serial_bytes) ? 1 : std::max(1, threads);
}

int64_t work_bytes(int64_t values, DType dtype, int operations) {
    const int64_t compute = dtype == DType::float64 ? 8 : 4;
    return values * (item_bytes(dtype) + compute * operations / 16);
}

void set_serial_bytes(int64_t bytes) { serial_override = bytes; }
int64_t serial_bytes() { return serial_override; }

}  // namespace bnfast
