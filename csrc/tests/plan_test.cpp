// The plan touches no data, so that shapes may be huge. Its grid depends only on shape and dtype. Under every schedule
// each value is reduced once, each channel finalized once and each value applied once.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>

#include "cases.h"
#include "cpu/steps.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

using std::int64_t;

constexpr int64_t G = int64_t(1) << 30;

const std::vector<Shape>& shapes() {
    static const std::vector<Shape> list = [] {
        std::vector<Shape> s = kernel_shapes();
        for (int64_t N : {0, 1, 2, 63, 65, 1000})
            for (int64_t C : {0, 1, 3, 23, 48, 64, 100, 257, 1000})
                for (int64_t S : {0, 1, 2, 49}) s.push_back({N, C, S});
        return s;
    }();
    return list;
}
const Shape huge_shapes[] = {{4 * G, 3, 1}, {5, 4 * G, 1},     {2, 3, 4 * G},      {3 * G, 2, 7}, {1, 1, 8 * G},
                             {G, 257, 1},   {3 * G, 1000, 50}, {2, 4 * G + 1, 49}, {7 * G, 64, 1}};

const Machine& small_machine() {
    static const Machine m{1 << 10, 1 << 11, 1 << 12, 1, ""};
    return m;
}
const Machine& usual_machine() {
    static const Machine m{32 << 10, 1 << 20, 32 << 20, 2, ""};
    return m;
}

bool same_grid(const Grid& a, const Grid& b) {
    return a.N == b.N && a.C == b.C && a.S == b.S && a.pack == b.pack && a.block_rows == b.block_rows &&
           a.block_width == b.block_width && a.blocks == b.blocks && a.chunk_blocks == b.chunk_blocks &&
           a.chunks == b.chunks;
}

std::string text(Shape s, DType d) { return Case{s, d}.text(); }

PlanRequest request_of(Shape shape, DType dtype, Op op, int threads, bool masked = false) {
    PlanRequest r;
    r.shape = shape;
    r.dtype = dtype;
    r.op = op;
    r.threads = threads;
    r.masked = masked;
    r.serial_bytes = 0;
    return r;
}

template <class Check> void each_plan(Shape shape, DType dtype, Check check) {
    for (const Machine* m : {&small_machine(), &usual_machine()})
        for (int threads : {1, 2, 7, 64})
            for (Op op : {Op::train, Op::infer, Op::grad, Op::moments})
                for (bool flag : {false, true}) {
                    PlanRequest r = request_of(shape, dtype, op, threads, flag && op == Op::grad);
                    r.whole_first = flag && op == Op::train;
                    r.serial_bytes = flag ? int64_t(1) << 20 : 0;
                    r.inputs = flag ? 3 : 1;
                    check(r, make_plan(r, *m));
                }
}

}  // namespace

TEST_CASE("the grid depends only on shape and dtype") {
    for (const auto& list : {shapes(), std::vector<Shape>(std::begin(huge_shapes), std::end(huge_shapes))})
        for (Shape shape : list)
            for (DType dtype : all_dtypes) {
                const Grid expected = make_grid(shape, dtype);
                bool same = true;
                each_plan(shape, dtype,
                          [&](const PlanRequest&, const Plan& p) { same = same && same_grid(p.grid, expected); });
                INFO(text(shape, dtype));
                CHECK(same);
            }
}

TEST_CASE("canonical merges a single channel into one row and keeps the number of values") {
    CHECK((canonical({5, 1, 7}).S == 35 && canonical({5, 1, 7}).N == 1));
    CHECK((canonical({5, 2, 7}).S == 7 && canonical({5, 2, 7}).N == 5));
    for (Shape s : shapes()) CHECK(canonical(s).size() == s.size());
}

TEST_CASE("a task of the apply step has at most apply_task_bytes of x, unless 16 rows or 64 values have more") {
    for (const auto& list : {shapes(), std::vector<Shape>(std::begin(huge_shapes), std::end(huge_shapes))})
        for (Shape shape : list)
            for (DType dtype : all_dtypes) {
                int violations = 0;
                each_plan(shape, dtype, [&](const PlanRequest&, const Plan& p) {
                    const Grid& g = p.apply_grid;
                    const int64_t row = item_bytes(dtype) * (p.rows ? 1 : g.pack * g.C), step = p.rows ? 64 : 16;
                    const bool fits = p.apply_task_size * row <= apply_task_bytes || p.apply_task_size == step;
                    const bool fills = (p.apply_task_size + step) * row > apply_task_bytes;
                    violations += shape.size() > 0 && !(fits && fills);
                });
                INFO(text(shape, dtype));
                CHECK(violations == 0);
            }
}

// Marks each (n, s) of the blocks that kernel_table.h describes.
TEST_CASE("blocks and chunks cover each value of a channel once") {
    for (Shape shape : shapes())
        for (DType dtype : all_dtypes) {
            const Grid g = make_grid(shape, dtype);
            INFO(text(shape, dtype));
            if (shape.size() == 0) {
                CHECK((g.chunks == 0 && g.blocks == 0));
                continue;
            }
            std::vector<int> seen(std::size_t(g.N * g.S), 0);
            auto mark = [&](int64_t n, int64_t s) { ++seen[std::size_t(n * g.S + s)]; };
            const int64_t per_row = (g.S + g.block_width - 1) / g.block_width;
            for (int64_t k = 0; k < g.chunks; ++k)
                for (int64_t b = k * g.chunk_blocks; b < std::min(g.blocks, (k + 1) * g.chunk_blocks); ++b) {
                    if (g.S > 1) {
                        const int64_t n = b / per_row * g.block_rows, s = b % per_row * g.block_width;
                        for (int64_t i = n; i < std::min(g.N, n + g.block_rows); ++i)
                            for (int64_t j = s; j < std::min(g.S, s + g.block_width); ++j) mark(i, j);
                    } else {
                        for (int64_t i = b * g.block_rows; i < std::min(g.N / g.pack, (b + 1) * g.block_rows); ++i)
                            for (int64_t p = 0; p < g.pack; ++p) mark(i * g.pack + p, 0);
                    }
                }
            for (int64_t n = g.N - g.N % g.pack; n < g.N && g.S == 1; ++n) mark(n, 0);  // rows left over from packing
            CHECK(g.N * g.S == shape.per_channel());
            CHECK(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
        }
}

TEST_CASE("a block of one channel fits in L1, and the results per chunk are small compared with the values read") {
    for (const auto& list : {shapes(), std::vector<Shape>(std::begin(huge_shapes), std::end(huge_shapes))})
        for (Shape shape : list)
            for (DType dtype : all_dtypes) {
                const Grid g = make_grid(shape, dtype);
                INFO(text(shape, dtype));
                if (shape.size() == 0) continue;
                const int64_t block = g.S > 1 ? g.block_rows * g.block_width : g.block_rows * 64;
                CHECK(block * item_bytes(dtype) <= 32 << 10);
                CHECK(g.blocks > (g.chunks - 1) * g.chunk_blocks);
                CHECK(g.blocks <= g.chunks * g.chunk_blocks);
                // two doubles per channel and chunk
                if (g.chunks > 1) CHECK(g.chunks * 16 <= shape.per_channel() * item_bytes(dtype) / 8);
            }
}

TEST_CASE("huge shapes: every count stays positive and consistent") {
    for (Shape shape : huge_shapes)
        for (DType dtype : all_dtypes)
            each_plan(shape, dtype, [&](const PlanRequest& r, const Plan& p) {
                const Grid& g = p.grid;
                const Grid& a = p.apply_grid;
                const int64_t apply_size = p.rows ? g.N * g.C * g.S : a.N / a.pack;
                const bool consistent =
                    g.N * g.C * g.S == shape.size() && g.chunks > 0 && g.chunk_blocks > 0 && p.channels_per_group > 0 &&
                    p.num_groups * p.channels_per_group >= g.C && (p.num_groups - 1) * p.channels_per_group < g.C &&
                    p.num_finalize_tasks * p.channels_per_finalize_task >= g.C &&
                    (p.num_finalize_tasks - 1) * p.channels_per_finalize_task < g.C &&
                    p.channels_per_finalize_task % 64 == 0 && p.apply_task_size > 0 &&
                    p.num_apply_tasks * p.apply_task_size >= apply_size &&
                    (p.num_apply_tasks - 1) * p.apply_task_size < apply_size && p.threads == r.threads && p.stream &&
                    p.bytes_written > 0 && p.bytes_read >= shape.size() * item_bytes(dtype) * r.inputs;
                INFO(text(shape, dtype));
                CHECK(consistent);
            });
}

namespace {

// Steps that only count how often run_steps calls them for each value and channel.
class CountingSteps {
public:
    explicit CountingSteps(const Plan& p)
        : plan_(p),
          reduced_(std::size_t(p.grid.chunks * p.grid.C)),
          finalized_(std::size_t(p.grid.C)),
          applied_(std::size_t(p.grid.N * p.grid.C * p.grid.S)) {}

    void reduce(int, int64_t chunk, int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) ++reduced_[std::size_t(chunk * plan_.grid.C + c)];
    }
    void finalize(int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) {
            for (int64_t chunk = 0; chunk < plan_.grid.chunks; ++chunk)
                if (reduced_[std::size_t(chunk * plan_.grid.C + c)] != 1) in_order_ = false;
            ++finalized_[std::size_t(c)];
        }
    }
    bool proceed() const { return true; }
    void apply_group(int64_t c0, int64_t c1) {
        with_apply([&](const auto& step) { step.group(c0, c1); });
    }
    void apply_task(int64_t task) {
        with_apply([&](const auto& step) { step.task(task); });
    }

    bool all_once() const {
        auto once = [](const std::vector<std::atomic<int>>& counts) {
            return std::all_of(counts.begin(), counts.end(), [](const std::atomic<int>& n) { return n == 1; });
        };
        return in_order_ && once(reduced_) && once(finalized_) && once(applied_);
    }

private:
    template <class Call> void with_apply(Call call) {
        const Grid &g = plan_.grid, &a = plan_.apply_grid;
        auto rows = [&](const ApplyArgs& args) {
            for (int64_t i = args.begin; i < args.end; ++i) apply(i, i / g.S % g.C);
        };
        auto columns = [&](const ApplyArgs& args) {
            const int64_t K = a.pack * a.C;
            for (int64_t r = args.begin; r < args.end; ++r)
                for (int64_t k = args.c0; k < args.c1; ++k) apply(r * K + k, k % g.C);
        };
        ApplyArgs args{};
        args.grid = a;
        call(ApplyStep{plan_, args, rows, columns});
    }
    void apply(int64_t i, int64_t c) {
        if (finalized_[std::size_t(c)] != 1) in_order_ = false;
        ++applied_[std::size_t(i)];
    }

    const Plan& plan_;
    std::vector<std::atomic<int>> reduced_, finalized_, applied_;
    std::atomic<bool> in_order_{true};
};

}  // namespace

TEST_CASE("each chunk is reduced, then each channel finalized, then each value applied, exactly once") {
    int by_groups = 0, by_steps = 0;
    for (Shape shape : shapes()) {
        if (shape.size() > 100000) continue;
        for (DType dtype : {DType::float32, DType::float64})
            for (const Machine* m : {&small_machine(), &usual_machine()})
                for (int threads : {1, 3})
                    for (bool masked : {false, true}) {
                        const Plan plan = make_plan(request_of(shape, dtype, Op::grad, threads, masked), *m);
                        (plan.by_groups ? by_groups : by_steps) += 1;
                        CountingSteps steps(plan);
                        run_steps(plan, steps);
                        INFO(text(shape, dtype) << " threads " << threads << " masked " << masked);
                        CHECK(steps.all_once());
                    }
    }
    CHECK(by_groups > 100);  // both schedules occurred
    CHECK(by_steps > 100);
}

TEST_CASE("masked gradients apply without packing, and reduce on the same grid") {
    const Shape shape{4000, 3, 1};
    const Plan plain = make_plan(request_of(shape, DType::float32, Op::grad, 1, false), usual_machine());
    const Plan masked = make_plan(request_of(shape, DType::float32, Op::grad, 1, true), usual_machine());
    CHECK(plain.grid.pack == 64);
    CHECK(same_grid(plain.grid, masked.grid));
    CHECK(masked.apply_grid.pack == 1);
}

TEST_CASE("memory is read once if a group of channels fits in cache, otherwise twice") {
    const auto bytes = [](const Plan& p, Shape s) { return double(p.bytes_read) / double(s.size() * 4); };
    for (int threads : {1, 2, 8}) {
        const Shape first{32, 256, 56 * 56};  // 103 MB, a channel 401 KiB: fits in its share of 32 MiB
        Plan p = make_plan(request_of(first, DType::float32, Op::train, threads), usual_machine());
        CHECK(p.by_groups);
        CHECK(p.channels_per_group * 32 * 56 * 56 * 4 <= cache_per_thread(usual_machine(), threads));
        CHECK(bytes(p, first) == 1);
        CHECK(p.bytes_written == first.size() * 4);
        PlanRequest raising = request_of(first, DType::float32, Op::train, threads);
        raising.whole_first = true;  // computes all statistics before any output
        CHECK(bytes(make_plan(raising, usual_machine()), first) == 2);

        const Shape last{32 * 56 * 56, 256, 1};  // 64 columns are 25 MB: more than L2
        p = make_plan(request_of(last, DType::float32, Op::train, threads), usual_machine());
        CHECK_FALSE(p.by_groups);
        CHECK(bytes(p, last) == 2);
        CHECK(bytes(make_plan(request_of(last, DType::float32, Op::moments, threads), usual_machine()), last) == 1);
        CHECK(bytes(make_plan(request_of(last, DType::float32, Op::infer, threads), usual_machine()), last) == 1);

        const Shape dense{32, 4096, 1};  // 512 KiB in all
        CHECK(bytes(make_plan(request_of(dense, DType::float32, Op::train, threads), usual_machine()), dense) == 1);
    }
    const Shape wide{1, 8, 10000000};  // a channel of 40 MB fits in no cache
    CHECK(bytes(make_plan(request_of(wide, DType::float32, Op::train, 2), usual_machine()), wide) == 2);
}

TEST_CASE("a group of channels never exceeds the cache it was planned for") {
    for (Shape shape : shapes())
        for (DType dtype : all_dtypes)
            each_plan(shape, dtype, [&](const PlanRequest& r, const Plan& p) {
                if (!p.by_groups || r.serial_bytes != 0) return;
                for (const Machine* m : {&small_machine(), &usual_machine()}) {
                    const Plan q = make_plan(r, *m);
                    const int64_t channel = shape.per_channel() * item_bytes(dtype) * r.inputs;
                    const int64_t held = std::min(q.channels_per_group, q.grid.C) * channel;
                    if (q.by_groups) CHECK(held <= cache_per_thread(*m, q.threads));
                }
            });
}

TEST_CASE("stores stream if and only if inputs and outputs exceed five eighths of the last-level cache") {
    const int64_t fit = usual_machine().l3 / 8 * 5 / 8;  // float32 values; x and y together just fit
    for (int64_t S : {fit - 1, fit, fit + 1, 2 * fit}) {
        const PlanRequest r = request_of({1, 1, S}, DType::float32, Op::train, 2);
        CHECK(make_plan(r, usual_machine()).stream == (8 * S > usual_machine().l3 * 5 / 8));
    }
    PlanRequest r = request_of({1, 1, fit}, DType::float32, Op::grad, 2);
    r.inputs = 2;
    CHECK(make_plan(r, usual_machine()).stream);
    CHECK_FALSE(make_plan(request_of({8, 3, 1}, DType::float32, Op::train, 1), usual_machine()).stream);
}

TEST_CASE("usable last-level cache: max(32 MiB, 4 MiB per processor), at most the reported size") {
    constexpr int64_t MiB = 1 << 20;
    CHECK(usable_llc_bytes(8 * MiB, 2) == 8 * MiB);
    CHECK(usable_llc_bytes(260 * MiB, 2) == 32 * MiB);  // a virtual machine that reports the whole socket's cache
    CHECK(usable_llc_bytes(260 * MiB, 60) == 240 * MiB);
    CHECK(usable_llc_bytes(260 * MiB, 120) == 260 * MiB);
}

TEST_CASE("tensors below serial_bytes run on one thread") {
    PlanRequest r = request_of({64, 1024, 1}, DType::float32, Op::train, 8);  // 256 KiB
    CHECK(make_plan(r, usual_machine()).threads == 8);
    r.serial_bytes = (256 << 10) + 1;
    CHECK(make_plan(r, usual_machine()).threads == 1);
    r.serial_bytes = -1;
    r.shape.N = 1;
    CHECK(make_plan(r, usual_machine()).threads == 1);
}
