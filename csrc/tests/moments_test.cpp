// The reduce step: moments agree with the oracle and across instruction sets, and are accurate or exact for large
// offsets, outliers, constants, weights and NaN.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cases.h"
#include "cpu/dispatch/isa.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

struct Result {
    double count = 0;
    std::vector<double> mean, variance;
};
Result run(Shape shape, const Array& x, const Array* mask = nullptr) {
    Result r;
    r.mean.assign(std::size_t(shape.C), -1);
    r.variance.assign(std::size_t(shape.C), -1);
    MomentsArgs a;
    a.x = x.data();
    a.shape = shape;
    a.dtype = x.dtype;
    a.mask = mask ? mask->data() : nullptr;
    a.mean = r.mean.data();
    a.variance = r.variance.data();
    r.count = moments(a);
    return r;
}
bool same_result(const Result& a, const Result& b) {
    return a.count == b.count && same(a.mean, b.mean) && same(a.variance, b.variance);
}

// The largest relative error of the variance over all channels.
long double variance_error(Shape shape, const Array& x, const Array* mask = nullptr) {
    const Result r = run(shape, x, mask);
    const Moments m = moments_of(shape, x, mask);
    long double worst = 0;
    for (std::size_t c = 0; c < r.variance.size(); ++c) {
        const long double error = std::fabs(r.variance[c] - m.variance[c]) / m.variance[c];
        worst = std::isnan(error) ? HUGE_VALL : std::max(worst, error);
    }
    return worst;
}

const Shape layouts[] = {{3000, 64, 1}, {3001, 5, 1}, {3000, 300, 1}, {8, 16, 784}, {2, 3, 20000}, {500, 3, 10}};

Array offset_values(Shape shape, DType dtype, double mean, int shift = 0) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal(0, 1);
    Array x(dtype, shape.size(), shift);
    for (std::int64_t i = 0; i < x.size; ++i) x.set(i, mean + normal(random));
    return x;
}

}  // namespace

TEST_CASE("moments have the same bits on every instruction set, team and alignment") {
    for (Shape shape : kernel_shapes())
        for (DType dtype : all_dtypes)
            for (bool masked : {false, true}) {
                const Case c{shape, dtype, Activation::none, false, false, masked};
                const Inputs in(c), shifted = in.shifted();
                const Array* mask = masked ? &in.mask : nullptr;
                Result first;
                {
                    const Settings settings(smallest_isa(), 1);
                    first = run(shape, in.x, mask);
                }
                for (const std::string& isa : usable_isas())
                    for (int threads : {1, 3}) {
                        INFO(c.text() << " " << isa << " threads " << threads);
                        const Settings settings(isa, threads);
                        const Result r = run(shape, in.x, mask);
                        CHECK(last_isa() == isa);
                        CHECK(last_team_size() == threads);
                        CHECK(same_result(r, first));
                        CHECK(same_result(run(shape, shifted.x, masked ? &shifted.mask : nullptr), first));
                    }
            }
}

TEST_CASE("the variance stays accurate at large offsets") {
    for (Shape shape : layouts) {
        CAPTURE(shape.S);
        CAPTURE(shape.C);
        CHECK(variance_error(shape, offset_values(shape, DType::float32, 1e4)) <= 1e-6L);
        CHECK(variance_error(shape, offset_values(shape, DType::float32, 1e6)) <= 1e-5L);
        CHECK(variance_error(shape, offset_values(shape, DType::float64, 1e4)) <= 1e-12L);
        CHECK(variance_error(shape, offset_values(shape, DType::float64, 1e6)) <= 1e-12L);
    }
}

TEST_CASE("the variance stays accurate with an outlier as the shift, a trend, or two clusters") {
    for (Shape shape : layouts)
        for (DType dtype : {DType::float32, DType::float64}) {
            CAPTURE(shape.S);
            CAPTURE(name_of(dtype));
            const long double bound = dtype == DType::float64 ? 1e-12L : 1e-6L;
            Array x = offset_values(shape, dtype, 0);
            for (std::int64_t i = 0; i < x.size; i += 4096 * shape.S) x.set(i, 1e4);
            for (std::int64_t c = 0; c < shape.C; ++c) x.set(c * shape.S, 1e4);
            CHECK(variance_error(shape, x) <= bound);
            for (std::int64_t i = 0; i < x.size; ++i) x.set(i, 1000 + 3 * double(weight_of(shape, i)));
            CHECK(variance_error(shape, x) <= bound);
            for (std::int64_t i = 0; i < x.size; ++i) x.set(i, weight_of(shape, i) % 2 ? 1e5 : -1e5 + 1e-2);
            CHECK(variance_error(shape, x) <= bound);
            // The sample that gives the center is 0, all else is not: the center is a standard deviation off.
            for (const std::int64_t piece : {std::int64_t(64), shape.S}) {
                for (std::int64_t i = 0; i < x.size; ++i)
                    x.set(i, weight_of(shape, i) / piece % 4 == 0 ? double(i % 7) : 1e4 + double(i % 5));
                CHECK(variance_error(shape, x) <= bound);
            }
        }
}

TEST_CASE("the mean of a constant channel is exact and its variance is 0") {
    for (Shape shape : kernel_shapes())
        for (DType dtype : all_dtypes)
            for (double value : {0.0, 0.1, -1e4, 1e-7, 6e4}) {
                Array x(dtype, shape.size()), mask(compute_type(dtype), shape.per_channel());
                for (std::int64_t i = 0; i < x.size; ++i) x.set(i, value);
                for (std::int64_t i = 0; i < mask.size; ++i) mask.set(i, i % 3 ? 0.7 : 0);
                if (mask.size == 1) mask.set(0, 1);
                for (const Array* w : {static_cast<const Array*>(nullptr), static_cast<const Array*>(&mask)}) {
                    const Result r = run(shape, x, w);
                    bool correct = true;
                    for (std::size_t c = 0; c < r.mean.size(); ++c)
                        correct = correct && r.mean[c] == x.get(0) && r.variance[c] == 0;
                    INFO(name_of(dtype) << " " << value << " (" << shape.N << ", " << shape.C << ", " << shape.S
                                        << ") masked " << (w != nullptr));
                    CHECK(correct);
                }
            }
}

TEST_CASE("a mask of ones changes no bits; values of weight 0 are ignored, even NaN") {
    for (Shape shape : kernel_shapes())
        for (DType dtype : all_dtypes) {
            const Case c{shape, dtype};
            Inputs in(c);
            INFO(c.text());
            Array ones(compute_type(dtype), shape.per_channel());
            for (std::int64_t i = 0; i < ones.size; ++i) ones.set(i, 1);
            CHECK(same_result(run(shape, in.x, &ones), run(shape, in.x)));
            const Result before = run(shape, in.x, &in.mask);
            for (std::int64_t i = 0; i < in.x.size; ++i)
                if (in.mask.get(weight_of(shape, i)) == 0) in.x.set(i, std::numeric_limits<double>::quiet_NaN());
            CHECK(same_result(run(shape, in.x, &in.mask), before));
        }
}

TEST_CASE("NaN and infinity affect only their own channel, on every instruction set") {
    for (Shape shape : {Shape{2000, 3, 1}, Shape{100, 70, 1}, Shape{4, 5, 300}})
        for (DType dtype : all_dtypes)
            for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL})
                for (const std::string& isa : usable_isas()) {
                    INFO(name_of(dtype) << " " << bad << " " << isa << " S " << shape.S);
                    const Settings settings(isa, 2);
                    Inputs in(Case{shape, dtype});
                    const Result clean = run(shape, in.x);
                    in.x.set(1 * shape.S, bad);  // channel 1
                    const Result r = run(shape, in.x);
                    for (std::size_t c = 0; c < r.mean.size(); ++c)
                        if (c != 1) CHECK((r.mean[c] == clean.mean[c] && r.variance[c] == clean.variance[c]));
                    CHECK_FALSE(std::isfinite(r.mean[1]));
                    CHECK(std::isnan(r.variance[1]));
                }
}

#if defined(__linux__)
// x ends at an unreadable page. The CTest run with tiny caches covers the code that prefetches beyond the current rows.
TEST_CASE("nothing is read past the end of x") {
    for (Shape shape : {Shape{1, 1, 320}, Shape{9, 3, 1000}, Shape{2, 2, 4500}, Shape{40, 5, 49}, Shape{300, 70, 1}})
        for (DType dtype : all_dtypes)
            for (const std::string& isa : usable_isas()) {
                const Settings settings(isa, 2);
                const Inputs in(Case{shape, dtype});
                const std::size_t page = 4096, bytes = std::size_t(shape.size() * item_bytes(dtype));
                const std::size_t readable = (bytes + page - 1) / page * page;
                void* map = mmap(nullptr, readable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                REQUIRE(map != MAP_FAILED);
                char* end = static_cast<char*>(map) + readable;
                REQUIRE(mprotect(end, page, PROT_NONE) == 0);
                std::memcpy(end - bytes, in.x.data(), bytes);
                std::vector<double> mean(std::size_t(shape.C)), variance(mean);
                MomentsArgs a;
                a.x = end - bytes;
                a.shape = shape;
                a.dtype = dtype;
                a.mean = mean.data();
                a.variance = variance.data();
                const double count = moments(a);
                const Result expected = run(shape, in.x);
                CHECK(same_result({count, mean, variance}, expected));
                munmap(map, readable + page);
            }
}
#endif

TEST_CASE("without values or weights, count, mean and variance are zero") {
    for (Shape shape : {Shape{0, 3, 1}, Shape{0, 3, 5}, Shape{4, 3, 0}}) {
        const Result r = run(shape, Array(DType::float32, 0));
        CHECK(r.count == 0);
        CHECK(r.mean == std::vector<double>(3, 0));
        CHECK(r.variance == std::vector<double>(3, 0));
    }
    CHECK(run({4, 0, 3}, Array(DType::float32, 0)).count == 0);
    for (Shape shape : {Shape{300, 3, 1}, Shape{4, 3, 50}}) {
        const Inputs in(Case{shape});
        Array none(DType::float32, shape.per_channel());
        for (std::int64_t i = 0; i < none.size; ++i) none.set(i, 0);
        const Result r = run(shape, in.x, &none);
        CHECK(r.count == 0);
        CHECK(r.mean == std::vector<double>(3, 0));
        CHECK(r.variance == std::vector<double>(3, 0));
    }
}
