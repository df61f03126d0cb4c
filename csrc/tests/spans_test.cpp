// Group norm's spans: each unit (a row or a sample) is in exactly one span, and tasks made by cut hold whole partial
// sums.
#include <doctest/doctest.h>

#include <algorithm>

#include "cases.h"
#include "cpu/spans.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

using std::int64_t;

const GroupShape group_shapes[] = {{1, 1, 6, 35, 3},    {100, 1, 4, 9, 2},   {700, 1, 12, 30, 4},  {65, 1, 1, 3000, 1},
                                   {9, 35, 6, 1, 3},    {130, 49, 8, 1, 1},  {3, 9000, 64, 1, 64}, {5000, 1, 24, 1, 4},
                                   {70, 1, 5000, 1, 1}, {2, 1, 300000, 1, 1}};

template <class Check> void each_spans(Check check) {
    for (const GroupShape& shape : group_shapes)
        for (DType dtype : all_dtypes)
            for (int threads : {1, 2, 7}) {
                const Settings settings(smallest_isa(), threads);
                with_spans(shape, dtype, 2, Activation::none, [&](auto spans) {
                    INFO(Case{{shape.N * shape.A, shape.C, shape.S}, dtype}.text() << " threads " << threads);
                    check(spans);
                });
            }
}

// Whether each unit is in exactly one span, and within a task all empty spans come last.
bool covers_units(const Spans& spans) {
    std::vector<int> seen(std::size_t(spans.num_units), 0);
    for (int64_t task = 0; task < spans.num_tasks(); ++task)
        for (int64_t k = 0; k < spans.spans_per_task && spans.span_units(task * spans.spans_per_task + k) > 0; ++k) {
            const int64_t span = task * spans.spans_per_task + k, first = spans.first_unit(span);
            if (spans.span_units(span) > spans.units_per_span) return false;
            for (int64_t u = first; u < first + spans.span_units(span); ++u) ++seen.at(std::size_t(u));
        }
    return std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; });
}

}  // namespace

TEST_CASE("each unit is in exactly one span, before and after cut") {
    each_spans([](auto spans) {
        CHECK(spans.num_units * spans.unit_size == spans.shape.size());
        CHECK(covers_units(spans));
        for (int64_t tasks : {int64_t(1), int64_t(8), spans.num_partials}) {
            if (tasks > spans.num_partials) continue;
            auto cut = spans;
            cut.cut(tasks);
            CHECK(cut.num_tasks() == tasks);
            CHECK(covers_units(cut));
        }
    });
}

TEST_CASE("each task made by cut holds whole partial sums") {
    each_spans([](auto spans) {
        const int64_t per_sample = spans.num_units / spans.shape.N;
        for (int64_t tasks : {int64_t(3), spans.num_partials}) {
            if (tasks > spans.num_partials) continue;
            spans.cut(tasks);
            for (int64_t task = 1; task < tasks; ++task) {
                const int64_t first = spans.first_unit(task * spans.spans_per_task), sample = first / per_sample;
                CHECK(first % per_sample == 0);
                CHECK(spans.partial_of(sample) == spans.partial_of(sample - 1) + 1);
            }
        }
    });
}

TEST_CASE("the example at Spans::cut") {
    ChannelsFirstSpans spans({100, 1, 4, 9, 2}, DType::float32, 2, 0);
    spans.set_units_per_span(10);
    spans.cut(8);
    CHECK(spans.num_units == 200);
    CHECK(spans.num_spans == 24);
    const int64_t firsts[] = {0, 24, 50, 74, 100, 124, 150, 174};
    for (int64_t task = 0; task < 8; ++task) CHECK(spans.first_unit(task * 3) == firsts[task]);
    const int64_t units[] = {9, 9, 6, 9, 9, 8};
    for (int64_t span = 0; span < 6; ++span) CHECK(spans.span_units(span) == units[span]);
}

TEST_CASE("the team shares a span where units are few or larger than a thread's cache, and never if it is one thread") {
    each_spans([](auto spans) {
        const int64_t bytes = 2 * spans.unit_size * item_bytes(spans.dtype);  // of x and a residual
        const bool few = spans.num_units<4 * spans.threads, large = bytes> cache_per_thread(machine(), spans.threads);
        CHECK(spans.by_steps == (spans.threads > 1 && (few || large)));
    });
}
