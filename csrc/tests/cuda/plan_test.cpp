// The plan of the CUDA calls: grids cover every value once, shared memory and scratch are what the kernels use, the
// form follows the table, and bytes are counted.
#include <doctest/doctest.h>

#include <numeric>

#include "tests/cuda/emulator.h"
#include "cuda/kernels/channel.cuh"
#include "cuda/kernels/resident.cuh"
#include "cuda/plan.h"
#include "tests/reference.h"

using namespace bnfast;
using namespace bnfast::test;
using cuda::Call;
using cuda::DeviceLimits;
using cuda::Form;
using cuda::Grid;
using cuda::Index;
using cuda::Plan;

namespace {

const std::vector<Shape> shapes = {
    {1, 1, 1},       {5, 3, 1},      {7, 100001, 1},  {100352, 256, 1}, {1000000, 3, 1},   {2003, 33, 1},
    {64, 2048, 1},   {256, 1000, 1}, {32, 64, 12544}, {256, 2048, 49},  {136000, 16, 16},  {1, 3, 1 << 26},
    {1 << 20, 2, 2}, {300, 1, 1},    {3, 7, 1000003}, {2, 5, 4097},     {1 << 25, 128, 1},
};

Plan plan_of(Shape shape, DType dtype, Call call, Form form = Form::automatic, DeviceLimits device = cuda::h100) {
    cuda::PlanRequest r;
    r.shape = shape;
    r.dtype = dtype;
    r.call = call;
    r.form = form;
    if (call == Call::gradient) r.inputs = 2;
    return cuda::make_plan(r, device);
}

template <class X> void check_shared_bytes(const Grid& g, DType dtype) {
    using T = typename X::T;
    const Index moments = g.columns ? sizeof(cuda::ColumnShared<X>) : sizeof(cuda::RowShared<T>);
    const Index gradient = g.columns ? sizeof(cuda::GradientShared<X>) : sizeof(cuda::GradientRowShared<T>);
    CHECK(cuda::moments_shared_bytes(g, dtype) == moments);
    CHECK(cuda::gradient_shared_bytes(g, dtype) == gradient);
    const Index slot = 16 * cuda::block_threads;
    CHECK(cuda::resident_shared_bytes(dtype, false, 3) == cuda::resident_kept_at<X>() + 3 * slot);
    CHECK(cuda::resident_shared_bytes(dtype, true, 3) == cuda::resident_kept_at<X>() + 6 * slot);
    if (g.columns) return;
    for (int cluster : {1, 2, 8}) {
        const Index kept = cuda::channel_layout<X>(g, cluster).kept_at;
        const Index vectors = cuda::chunks_per_block(g, cluster) * cuda::vectors_per_chunk(g);
        CHECK(cuda::channel_shared_bytes(g, dtype, false, cluster) == kept + 16 * vectors);
        CHECK(cuda::channel_shared_bytes(g, dtype, true, cluster) == kept + 32 * vectors);
    }
}

}  // namespace

TEST_CASE("the parts of a channel hold every value once, and a thread at most 64") {
    for (Shape shape : shapes)
        for (DType dtype : all_dtypes) {
            const Grid g = cuda::make_grid(shape, dtype);
            const Index parts = g.chunks * g.pack, V = dtype == DType::float64 ? 2 : dtype == DType::float32 ? 4 : 8;
            INFO(name_of(dtype) << " (" << shape.N << ", " << shape.C << ", " << shape.S << ")");
            CHECK(g.N * g.C * g.S == shape.size());
            if (parts < 1000000) {
                Index values = 0;
                for (Index p = 0; p < parts; ++p) {
                    const Index count = cuda::part_count(g, p);
                    CHECK(count >= 0);
                    values += count;
                }
                CHECK(values == shape.per_channel());
            }
            if (g.columns) {
                CHECK(g.row_size % V == 0);
                CHECK(g.chunk_rows <= 64 * cuda::tile_lanes);
            } else {
                CHECK(g.chunk_rows * g.row_vectors * V <= (64 + V) * cuda::block_threads);
                CHECK(g.row_step * g.row_vectors + g.vector_step == cuda::block_threads);
            }
        }
}

TEST_CASE("few or odd channels fill whole tiles") {
    const Grid three = cuda::make_grid({1000000, 3, 1}, DType::float32);
    CHECK(three.pack == 40);
    CHECK(three.row_vectors == 30);
    const Grid hundred = cuda::make_grid({100000, 100, 1}, DType::float32);
    CHECK(hundred.pack == 5);
    CHECK(hundred.tiles == 4);
    CHECK(cuda::make_grid({100000, 256, 1}, DType::float32).pack == 1);
    CHECK(cuda::make_grid({5, 100, 1}, DType::float32).pack == 1);  // too few rows to pack
}

TEST_CASE("the grid depends on shape and dtype alone") {
    for (Shape shape : shapes)
        for (DType dtype : all_dtypes) {
            const Grid g = cuda::make_grid(shape, dtype);
            for (const DeviceLimits& device : {cuda::a100, cuda::h100, cuda::b200, DeviceLimits{1, 0, 0}})
                for (Form form : {Form::automatic, Form::sweeps, Form::channel, Form::resident})
                    for (Call call : {Call::train, Call::infer, Call::gradient, Call::moments}) {
                        const Plan p = plan_of(shape, dtype, call, form, device);
                        CHECK(std::memcmp(&p.grid, &g, sizeof g) == 0);
                        CHECK(p.reduce_shared <= std::max<Index>(device.shared_per_block, 48 << 10));
                        CHECK(p.reduce_blocks <= 8u * unsigned(device.sms));
                    }
        }
}

TEST_CASE("shared memory is what the kernels lay out") {
    for (Shape shape : shapes) {
        check_shared_bytes<cuda::F32>(cuda::make_grid(shape, DType::float32), DType::float32);
        check_shared_bytes<cuda::F64>(cuda::make_grid(shape, DType::float64), DType::float64);
        check_shared_bytes<cuda::F16>(cuda::make_grid(shape, DType::float16), DType::float16);
        check_shared_bytes<cuda::BF16>(cuda::make_grid(shape, DType::bfloat16), DType::bfloat16);
    }
    CHECK(plan_of({64, 64, 1}, DType::float32, Call::moments).finalize_shared == sizeof(cuda::FinalizeShared));
}

TEST_CASE("channels_first takes the form channel where a channel fits, and then reads x once") {
    const Shape fits{64, 256, 784};  // ResNet-50, 28x28, batch 64: 100 KB per channel in bfloat16
    const Index X = fits.size() * 2;
    const Plan channel = plan_of(fits, DType::bfloat16, Call::train);
    CHECK(channel.form == Form::channel);
    CHECK(channel.bytes_read == X);
    CHECK(channel.bytes_written == X);
    CHECK(channel.scratch.bytes == 0);
    const Plan sweeps = plan_of(fits, DType::bfloat16, Call::train, Form::sweeps);
    CHECK(sweeps.form == Form::sweeps);
    CHECK(sweeps.bytes_read == 2 * X);
    CHECK(sweeps.scratch.bytes > 0);
    CHECK(plan_of(fits, DType::bfloat16, Call::gradient).form == Form::channel);
    CHECK(plan_of(fits, DType::bfloat16, Call::gradient).bytes_read == 2 * X);
    CHECK(plan_of(fits, DType::bfloat16, Call::gradient, Form::sweeps).bytes_read == 4 * X);
    CHECK(plan_of(fits, DType::float32, Call::train).form == Form::channel);
    CHECK(plan_of({50176, 256, 1}, DType::bfloat16, Call::train, Form::channel).form == Form::sweeps);  // columns
    CHECK(plan_of({256, 8, 300}, DType::bfloat16, Call::train).form == Form::resident);  // 8 blocks for 132 SMs
    CHECK(plan_of({2, 8, 300}, DType::bfloat16, Call::train).form == Form::channel);     // small: one launch
    for (Call call : {Call::infer, Call::moments}) CHECK(plan_of(fits, DType::bfloat16, call).form == Form::sweeps);
    CHECK(plan_of(fits, DType::bfloat16, Call::infer).bytes_read == X);
    CHECK(plan_of(fits, DType::bfloat16, Call::moments).bytes_written == 0);
}

TEST_CASE("a channel that is too long for a block takes a cluster of 2, 4 or 8 where the device has clusters") {
    const auto cluster = [](Index H, Index C, DType dtype, Call call, const DeviceLimits& device) {
        const Plan p = plan_of({64, C, H * H}, dtype, call, Form::automatic, device);
        CHECK(p.form == (p.cluster > 1 ? Form::channel : p.form));
        CHECK(p.reduce_blocks % unsigned(p.cluster) == 0);
        CHECK(p.reduce_shared <= device.shared_per_block);
        if (p.cluster > 1) {
            CHECK(p.bytes_read ==
                  (call == Call::gradient ? 2 : 1) * 64 * C * H * H * (dtype == DType::float32 ? 4 : 2));
            const Plan sweeps = plan_of({64, C, H * H}, dtype, call, Form::sweeps, device);
            CHECK(p.scratch.bytes == sweeps.scratch.bytes);  // where the launcher goes if no cluster fits
        }
        return p.cluster;
    };
    // ResNet-50 at batch 64: 28x28, 56x56 and 112x112 have 100, 401 and 1606 KB per channel in bfloat16.
    CHECK(cluster(28, 256, DType::bfloat16, Call::train, cuda::h100) == 1);
    CHECK(cluster(56, 64, DType::bfloat16, Call::train, cuda::h100) == 2);
    CHECK(cluster(56, 64, DType::bfloat16, Call::gradient, cuda::h100) == 8);  // 13 chunks: 4 per block are too many
    CHECK(cluster(56, 64, DType::float32, Call::train, cuda::h100) == 4);
    CHECK(cluster(112, 64, DType::bfloat16, Call::train, cuda::h100) == 8);
    CHECK(cluster(112, 64, DType::float32, Call::train, cuda::h100) == 1);  // 3.2 MB: too long
    CHECK(cluster(56, 64, DType::bfloat16, Call::train, cuda::a100) == 1);
    CHECK(plan_of({64, 64, 3136}, DType::bfloat16, Call::train, Form::automatic, cuda::a100).form != Form::channel);
}

TEST_CASE("the form resident is taken where a quarter is kept, and all of its blocks fit the device") {
    for (Shape shape : shapes)
        for (DType dtype : all_dtypes)
            for (const DeviceLimits& device : {cuda::a100, cuda::h100, cuda::b200})
                for (Call call : {Call::train, Call::gradient}) {
                    const Plan p = plan_of(shape, dtype, call, Form::resident, device);
                    INFO(name_of(dtype) << " (" << shape.N << ", " << shape.C << ", " << shape.S << ")");
                    REQUIRE(p.form == Form::resident);
                    CHECK(p.reduce_blocks <= unsigned(cuda::resident_blocks_per_sm * device.sms));
                    CHECK(Index(p.reduce_blocks) <= p.grid.chunks * p.grid.tiles);
                    CHECK(p.reduce_shared <= cuda::resident_shared_limit(device));
                    CHECK(cuda::resident_blocks_per_sm * (p.reduce_shared + device.reserved_per_block) <=
                          device.shared_per_sm);
                    const Plan sweeps = plan_of(shape, dtype, call, Form::sweeps, device);
                    CHECK(p.scratch.bytes == sweeps.scratch.bytes);  // where the launcher goes if the grid doesn't fit
                    CHECK(p.bytes_read <= sweeps.bytes_read);
                }
    const auto form = [](Index rows, const DeviceLimits& device, Call call = Call::train) {
        return plan_of({rows, 256, 1}, DType::bfloat16, call, Form::automatic, device).form;
    };
    const auto read = [](Index rows, Call call) {  // in units of x
        const Plan p = plan_of({rows, 256, 1}, DType::bfloat16, call);
        return double(p.bytes_read) / double(rows * 512);
    };
    CHECK(form(64, cuda::h100) == Form::resident);  // 32 KB: one launch
    CHECK(form(50176, cuda::h100) == Form::resident);
    CHECK(form(200704, cuda::h100) == Form::resident);  // 103 MB, of which 26 MB are kept
    CHECK(form(401408, cuda::h100) == Form::sweeps);
    CHECK(form(50176, cuda::h100, Call::gradient) == Form::resident);
    CHECK(read(12544, Call::train) == 1);  // 6.4 MB
    CHECK(read(12544, Call::gradient) == 2);
    CHECK(read(50176, Call::train) < 1.1);  // 25.7 MB
    CHECK(read(50176, Call::gradient) > 2);
    DeviceLimits alone = cuda::h100;
    alone.cooperative = false;
    CHECK(form(64, alone) == Form::sweeps);
    CHECK(plan_of({64, 256, 1}, DType::bfloat16, Call::train, Form::resident, alone).form == Form::sweeps);
    for (Call call : {Call::infer, Call::moments})
        CHECK(plan_of({64, 256, 1}, DType::bfloat16, call, Form::resident).form == Form::sweeps);
}

TEST_CASE("an empty batch plans the finalize step alone") {
    for (Shape shape : {Shape{0, 5, 1}, Shape{3, 5, 0}}) {
        const Plan p = plan_of(shape, DType::float32, Call::train);
        CHECK(p.reduce_blocks == 0);
        CHECK(p.finalize_blocks == 1);
        CHECK(p.apply_blocks == 0);
    }
    CHECK(plan_of({4, 0, 1}, DType::float32, Call::train).finalize_blocks == 0);
}
