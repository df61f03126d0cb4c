#include "plan.h"

#include <algorithm>
#include <atomic>
#include <numeric>

namespace bnfast {
namespace {

using std::int64_t;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Rows of a few or odd channels seen as one, so that K = pack*C fills vectors: multiples of 64 columns below 64
// channels, of 16 (a cache line of float32) up to 256; above, a partial vector at the end costs under 6 %.
int64_t rows_seen_as_one(int64_t N, int64_t C) {
    int64_t pack = 1;
    if (C < 64) pack = 64 / std::gcd(C, int64_t(64));
    else if (C <= 256) pack = 16 / std::gcd(C, int64_t(16));
    return N >= 8 * pack ? pack : 1;  // too few packed rows: merging the pack columns would cost more than it saves
}

Grid rows_grid(Shape s, DType dtype) {
    Grid g{s.N, s.C, s.S, 1, 1, 1, 0, 1, 1};
    const int64_t block = dtype == DType::float64 ? 2048 : 4096;  // 16 KiB: half of a 32 KiB L1
    g.block_width = std::min(s.S, block);
    // A lane adds at most 64 values in float32: (200000, 1, 2) had a variance wrong by 9e-6 with 2048.
    g.block_rows = s.S < block ? std::min(s.N, block / std::max<int64_t>(s.S, 64)) : 1;
    g.blocks = ceil_div(s.N, g.block_rows) * ceil_div(s.S, g.block_width);
    g.chunk_blocks = 64;  // 1 MiB of a channel: C = 1 still splits over threads
    g.chunks = ceil_div(g.blocks, g.chunk_blocks);
    return g;
}

Grid columns_grid(Shape s, DType dtype) {
    Grid g{s.N, s.C, 1, 1, 1, 1, 0, 1, 1};
    g.pack = rows_seen_as_one(s.N, s.C);
    g.block_rows = dtype == DType::float64 ? 64 : 128;  // 128 rows of 64 columns: 32 KiB
    const int64_t packed = s.N / g.pack;
    g.blocks = ceil_div(packed, g.block_rows);
    // A chunk holds about 256 KiB, but at least 2 blocks: its float64 results stay under 1/16 of what was read.
    const int64_t block_bytes = g.block_rows * g.pack * s.C * item_bytes(dtype);
    g.chunk_blocks = std::clamp<int64_t>((256 << 10) / block_bytes, 2, 64);
    g.chunks = ceil_div(g.blocks, g.chunk_blocks);
    return g;
}

std::atomic<int64_t> serial_override{-1};
constexpr int64_t default_serial_bytes = 256 << 10;

void schedule_groups(Plan& plan, const PlanRequest& request, const Machine& machine) {
    const Grid& g = plan.grid;
    const int64_t channel = g.N * g.S * item_bytes(request.dtype) * request.inputs;
    const int threads = plan.threads;
    if (plan.rows) {
        // A group: some 2 MiB (with 256 KiB the pieces of memory are so short that 13 to 26 MB took 1.1 times as long),
        // and at least 4 groups a thread for balance; one channel must fit its share of L3.
        plan.group = std::clamp<int64_t>((2 << 20) / std::max<int64_t>(channel, 1), 1,
                                         std::max<int64_t>(1, g.C / (4 * threads)));
        // In cache pieces below a page cost more than the second read: (256, 64, 5, 5) train 0.78, (1000, 16, 4, 4)
        // 0.82.
        const int64_t held = plan.group * channel, piece = plan.group * g.S * item_bytes(request.dtype);
        plan.by_groups = held <= std::max(machine.l2 / 2, machine.l3 / (2 * threads)) &&
                         (threads == 1 || g.C >= 4 * threads) && (plan.stream || g.N == 1 || piece >= 4096);
    } else if (g.pack == 1) {
        // A group must fit in half of L2, because its rows lie apart, and be 1 KiB wide: with rows of 256 bytes a
        // (1568, 2048) training step took 2.2 times as long as without groups.
        const int64_t least = std::min<int64_t>(g.C, 1024 / item_bytes(request.dtype));
        const int64_t most = machine.l2 / 2 / std::max<int64_t>(channel, 1) / 64 * 64;
        plan.group = std::min({most, round_up(ceil_div(g.C, threads), 64), g.C});
        plan.by_groups = plan.group >= least && (threads == 1 || g.C >= least * threads);
    } else {
        plan.group = g.C;
        plan.by_groups = threads == 1 && g.C * channel <= machine.l2 / 2;
    }
    if (request.whole_first || request.op == Op::infer) plan.by_groups = false;
    if (plan.by_groups) return;
    // Reduce units are chunks, cut by channels too where chunks alone can't feed the team.
    plan.group = g.C;
    if (g.chunks < 4 * threads && threads > 1 && g.pack == 1) {
        const int64_t wanted = ceil_div(4 * threads, std::max<int64_t>(1, g.chunks));
        plan.group = plan.rows ? ceil_div(g.C, wanted) : std::max<int64_t>(64, round_up(ceil_div(g.C, wanted), 64));
    }
}

void schedule_apply(Plan& plan, const PlanRequest& request) {
    const Grid& g = plan.apply_grid;
    const int64_t unit_bytes = 128 << 10;
    const int64_t item = item_bytes(request.dtype);
    if (plan.rows) {
        plan.apply_unit = round_up(unit_bytes / item, 64);
        plan.apply_units = ceil_div(g.N * g.C * g.S, plan.apply_unit);
    } else {
        plan.apply_unit = std::max<int64_t>(16, unit_bytes / std::max<int64_t>(1, g.pack * g.C * item) / 16 * 16);
        plan.apply_units = std::max<int64_t>(1, ceil_div(g.N / g.pack, plan.apply_unit));
    }
}

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
    const Grid& g = plan.grid;
    plan.rows = g.S > 1;
    const int64_t tensor = request.shape.size() * item_bytes(request.dtype);
    plan.threads = threads_for(tensor, request.threads, request.serial_bytes);
    plan.stream = streams(tensor * (request.inputs + request.outputs), machine);
    plan.prefetch_next = tensor > plan.threads * machine.l2;  // asking costs a quarter of the reduce where x lies in L2
    schedule_groups(plan, request, machine);
    plan.groups = ceil_div(g.C, std::max<int64_t>(1, plan.group));
    schedule_apply(plan, request);
    plan.slice = std::max<int64_t>(64, round_up(ceil_div(g.C, plan.threads), 64));
    plan.slices = ceil_div(g.C, plan.slice);
    const bool cached = plan.by_groups || tensor * request.inputs <= machine.l3 / 2;
    const int reads = request.op == Op::infer || request.op == Op::moments || cached ? 1 : 2;
    plan.bytes_read = tensor * request.inputs * reads;
    plan.bytes_written = tensor * request.outputs;
    return plan;
}

// Streaming loses while the consumer may still find y in cache: it starts where in- and outputs exceed five eighths of
// the LLC, for nobody has all of it. Against three quarters gradients of 7 to 8.4 MB took 0.59 to 0.93 of the time,
// 0.43 to 0.63 on one thread, trainings of 10.5 to 12 MB 0.96 to 1.06 and 0.61 to 0.72, infer 1.06 to 1.13 and 0.52 to
// 0.68. With half of it a training of 8 MB took 1.26.
bool streams(int64_t bytes, const Machine& machine) { return bytes > machine.l3 / 8 * 5; }

int threads_for(int64_t tensor_bytes, int threads, int64_t serial) {
    return tensor_bytes < (serial >= 0 ? serial : default_serial_bytes) ? 1 : std::max(1, threads);
}

void set_serial_bytes(int64_t bytes) { serial_override = bytes; }
int64_t serial_bytes() { return serial_override; }

}  // namespace bnfast
