// Plans of any shape that check.cpp admits, for any machine: every value is reduced, finalized and applied once, no
// count overflows (UndefinedBehaviorSanitizer sees that), and the grid depends on shape and dtype alone.
#include <algorithm>
#include <stdexcept>

#include "check.h"
#include "cpu/plan.h"
#include "cuda/plan.h"
#include "input.h"

using namespace bnfast;
using fuzz::expect;
using fuzz::Input;
using std::int64_t;

namespace {

bool admitted(const Shape& shape, DType dtype) {
    MomentsArgs a;
    char memory[8];
    a.x = a.mean = a.variance = reinterpret_cast<double*>(memory);
    a.shape = shape;
    a.dtype = dtype;
    try {
        check(a);
    } catch (const std::invalid_argument&) {
        return false;
    }
    return true;
}

// Whether `parts` parts of `each` hold `all`, and one part fewer doesn't.
bool covers(int64_t all, int64_t each, int64_t parts) {
    return each > 0 && (all == 0 ? parts <= 1 : (parts - 1) * each < all && all - (parts - 1) * each <= each);
}

void expect_cpu_plan(const PlanRequest& r, const Plan& p) {
    const Grid &g = p.grid, &a = p.apply_grid;
    const Shape s = canonical(r.shape);
    expect(s.size() == r.shape.size() && g.C == s.C, "the grid has the shape's values");
    expect(p.threads >= 1 && p.threads <= std::max(1, r.threads), "no more threads than asked for");
    expect(covers(g.C, std::max<int64_t>(1, p.channels_per_group), p.num_groups), "groups cover the channels");
    expect(covers(g.C, p.channels_per_finalize_task, p.num_finalize_tasks), "finalize covers the channels");
    expect(p.group_end(p.num_groups - 1) <= g.C, "the last group ends with the channels");
    if (s.size() == 0) return expect(g.chunks == 0 && g.blocks == 0, "nothing is read of an empty batch");
    expect(p.bytes_read > 0 && p.bytes_written > 0, "traffic is positive");
    expect(g.N == s.N && g.S == s.S && p.rows == (s.S > 1), "the layout is the shape's");
    expect(covers(g.blocks, g.chunk_blocks, g.chunks), "chunks cover the blocks");
    if (p.rows) {
        const int64_t per_row = ceil_div(g.S, g.block_width);
        expect(covers(g.S, g.block_width, per_row), "blocks cover a row");
        expect(g.blocks % per_row == 0 && covers(g.N, g.block_rows, g.blocks / per_row), "blocks cover the rows");
        expect(covers(g.N * g.C * g.S, p.apply_task_size, p.num_apply_tasks), "apply covers the values");
    } else {
        expect(g.pack >= 1 && (a.pack == g.pack || (r.masked && a.pack == 1)), "rows are packed");
        expect(covers(g.N / g.pack, g.block_rows, g.blocks), "blocks cover the packed rows");
        expect(covers(a.N / a.pack, p.apply_task_size, p.num_apply_tasks), "apply covers the packed rows");
    }
}

void fuzz_cpu(Input& in, Shape shape, DType dtype) {
    PlanRequest r;
    r.shape = shape;
    r.dtype = dtype;
    r.op = Op(in.below(4));
    r.threads = 1 + (in.flag() ? in.below(8) : in.raw<std::uint16_t>() % 4096);
    r.masked = in.flag() && r.op == Op::grad;
    r.whole_first = in.flag() && r.op == Op::train;
    r.inputs = 1 + in.below(3);
    r.outputs = 1 + in.below(2);
    r.operations = in.below(65);
    r.serial_bytes = in.flag() ? -1 : std::int64_t(in.raw<std::uint32_t>());
    const auto cache = [&] { return 1 + int64_t(in.raw<std::uint64_t>() & ((std::uint64_t(1) << in.below(41)) - 1)); };
    const Machine m{cache(), cache(), cache(), 1 + in.below(64), ""};
    const Plan p = make_plan(r, m);
    expect_cpu_plan(r, p);
    const Grid g = make_grid(shape, dtype);
    expect(g.pack == p.grid.pack && g.block_rows == p.grid.block_rows && g.block_width == p.grid.block_width &&
               g.chunk_blocks == p.grid.chunk_blocks && g.chunks == p.grid.chunks,
           "the grid depends on shape and dtype alone");
}

void expect_cuda_grid(const cuda::Grid& g, Shape shape, DType dtype) {
    const int64_t V = dtype == DType::float64 ? 2 : dtype == DType::float32 ? 4 : 8;
    expect(g.N * g.C * g.S == shape.size() && g.chunks >= 0, "the grid has the shape's values");
    if (shape.size() == 0) return expect(g.chunks == 0, "nothing is read of an empty batch");
    expect(g.chunks > 0 && g.pieces > 0 && g.pack > 0 && g.tiles > 0 && g.row_vectors > 0, "counts are positive");
    if (g.columns) {
        expect(g.rows * g.pack + g.tail == g.N && g.tail < g.pack, "packed rows and the tail are all rows");
        expect(g.row_size == g.pack * g.C && g.row_vectors * V == g.row_size, "a packed row is whole vectors");
        expect(covers(g.row_vectors, cuda::tile_vectors, g.tiles), "tiles cover a packed row");
        expect(covers(g.rows, g.chunk_rows, g.chunks), "chunks cover the packed rows");
    } else {
        expect(covers(g.S, g.chunk_width, g.pieces), "pieces cover a row");
        expect(g.chunks % g.pieces == 0 && covers(g.N, g.chunk_rows, g.chunks / g.pieces), "chunks cover the rows");
        expect(g.row_step * g.row_vectors + g.vector_step == cuda::block_threads, "a step is 256 vectors");
    }
}

void fuzz_cuda(Input& in, Shape shape, DType dtype) {
    cuda::PlanRequest r;
    r.shape = shape;
    r.dtype = dtype;
    r.call = cuda::Call(in.below(4));
    r.form = cuda::Form(in.below(4));
    r.inputs = 1 + in.below(3);
    r.outputs = 1 + in.below(2);
    cuda::DeviceLimits device;
    device.sms = 1 + in.byte();
    device.shared_per_block = (in.flag() ? 48 : 227) << 10;
    device.shared_per_sm = device.shared_per_block + (1 << 10);
    device.clusters = in.flag();
    device.cooperative = in.flag();
    const cuda::Plan p = cuda::make_plan(r, device);
    expect_cuda_grid(p.grid, shape, dtype);
    expect(p.reduce_shared <= device.shared_per_block, "shared memory fits");
    expect(p.bytes_read >= 0 && p.bytes_written >= 0 && p.scratch.bytes >= 0, "sizes are positive");
    if (p.scratch.bytes > 0) {
        expect(p.scratch.constants_at == 3 * p.scratch.part_bytes, "parts, then constants");
        expect(p.scratch.arrived_at == p.scratch.constants_at + 5 * p.scratch.constant_bytes, "then the counters");
        expect(p.scratch.bytes > p.scratch.arrived_at, "which are the end");
    }
    if (p.form != cuda::Form::sweeps) return expect(p.reduce_blocks >= 1, "one launch has blocks");
    if (shape.size() > 0 && r.call != cuda::Call::infer) expect(p.reduce_blocks >= 1, "the reduce step has blocks");
    if (shape.size() > 0 && r.call != cuda::Call::moments) expect(p.apply_blocks >= 1, "the apply step has blocks");
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input in(data, size);
    const bool on_cuda = in.flag();
    const auto dtype = DType(in.below(4));
    const int most = in.flag() ? 255 : 9;
    const Shape shape{in.extent(most), in.extent(most), in.extent(most)};
    if (!admitted(shape, dtype)) return 0;
    if (!on_cuda) fuzz_cpu(in, shape, dtype);
    else if (has_at_most(shape, (int64_t(1) << 48) - 1)) fuzz_cuda(in, shape, dtype);  // csrc/cuda/launch.cpp
    return 0;
}
