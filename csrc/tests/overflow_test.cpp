// Finite values whose sums overflow the compute type: the mean is finite and right to rounding, the variance too where
// it is representable, else infinite. Values that aren't finite keep their effect.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "reference.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

using std::int64_t;

constexpr Shape layouts[] = {{7, 3, 1}, {300, 5, 1}, {2, 3, 40}, {1, 2, 9000}, {400, 2, 3}};
constexpr double infinity = std::numeric_limits<double>::infinity();

double largest_of(DType dtype) {
    return dtype == DType::float64   ? std::numeric_limits<double>::max()
           : dtype == DType::float16 ? 65504
                                     : double(std::numeric_limits<float>::max());
}
// Channel 0 reaches the end of the dtype, channel 1 is ordinary; the others reach beyond the root of the end.
double value_of(DType dtype, int64_t c, int64_t i) {
    const double unit = double(i * 37 % 101 - 40) / 64, end = largest_of(dtype);
    if (c == 1) return unit;
    return unit * (c == 0 ? end * 0.9375 : std::sqrt(end) * 0.75);
}
Array values_of(Shape shape, DType dtype) {
    Array x(dtype, shape.size());
    for (int64_t i = 0; i < x.size; ++i) x.set(i, value_of(dtype, channel_of(shape, i), i));
    return x;
}
Array weights_of(Shape shape, DType dtype, double first) {
    Array w(compute_type(dtype), shape.per_channel());
    for (int64_t i = 0; i < w.size; ++i) w.set(i, i == 0 ? first : i % 3 * 0.5);
    return w;
}

struct Result {
    double count;
    std::vector<double> mean, variance;
};
Result run(Shape shape, const Array& x, const Array* mask) {
    Result r{0, std::vector<double>(std::size_t(shape.C)), std::vector<double>(std::size_t(shape.C))};
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

bool near(double actual, long double expected, long double scale) {
    return std::isfinite(actual) && std::fabs(actual - expected) <= scale * 1e-6L;
}

void check_against_oracle(Shape shape, const Array& x, const Array* mask) {
    const Result actual = run(shape, x, mask);
    const Moments expected = moments_of(shape, x, mask);
    const long double end = largest_of(compute_type(x.dtype));
    for (std::size_t c = 0; c < actual.mean.size(); ++c) {
        CAPTURE(c);
        const long double variance = expected.variance[c];
        CHECK(near(actual.mean[c], expected.mean[c], std::sqrt(variance) + std::fabs(expected.mean[c])));
        if (variance > end * 1.001L) CHECK(actual.variance[c] == infinity);
        else CHECK(near(actual.variance[c], variance, variance));
    }
}

}  // namespace

TEST_CASE("the mean of finite values is finite and right; a variance that can't be stored is infinite") {
    for (Shape shape : layouts)
        for (DType dtype : all_dtypes) {
            INFO(name_of(dtype) << " (" << shape.N << ", " << shape.C << ", " << shape.S << ")");
            const Array x = values_of(shape, dtype), weights = weights_of(shape, dtype, 1);
            check_against_oracle(shape, x, nullptr);
            check_against_oracle(shape, x, &weights);
        }
}

TEST_CASE("a value that isn't finite keeps its effect beside values that overflow, unless its weight is 0") {
    for (Shape shape : layouts)
        for (DType dtype : all_dtypes)
            for (double bad : {infinity, -infinity, std::nan("")}) {
                INFO(name_of(dtype) << " (" << shape.N << ", " << shape.C << ", " << shape.S << ") " << bad);
                Array x = values_of(shape, dtype);
                x.set(0, bad);
                const Array with = weights_of(shape, dtype, 1), without = weights_of(shape, dtype, 0);
                for (const Array* mask : {static_cast<const Array*>(nullptr), &with}) {
                    const Result r = run(shape, x, mask);
                    CHECK_FALSE(std::isfinite(r.mean[0]));
                    CHECK(std::isnan(r.variance[0]));
                    CHECK(std::isfinite(r.mean[1]));
                }
                check_against_oracle(shape, x, &without);
            }
}

TEST_CASE("weights that overflow leave a mean that isn't finite") {
    const Shape shape{4, 1, 1};
    for (double value : {0.0, 3.0}) {
        Array x(DType::float32, 4), weights(DType::float32, 4);
        for (int64_t i = 0; i < 4; ++i) {
            x.set(i, value);
            weights.set(i, infinity);
        }
        CHECK_FALSE(std::isfinite(run(shape, x, &weights).mean[0]));
    }
}

TEST_CASE("group norm: a row that overflows has a right mean and invstd 0, so that y is beta") {
    const GroupShape shape{3, 1, 4, 6, 2};
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
        Array x(dtype, shape.size()), y(dtype, shape.size());
        for (int64_t i = 0; i < x.size; ++i) x.set(i, i < 12 ? value_of(dtype, 0, i) : double(i % 5));
        double mean[6], invstd[6];
        GroupNormArgs a;
        a.x = x.data();
        a.y = y.data();
        a.shape = shape;
        a.dtype = dtype;
        a.mean = mean;
        a.invstd = invstd;
        group_norm(a);
        CHECK(std::isfinite(mean[0]));
        CHECK(std::fabs(mean[0]) > 1e36);
        CHECK(invstd[0] == 0);
        for (int64_t i = 0; i < 12; ++i) CHECK(y.get(i) == 0);
        CHECK(invstd[1] > 0);
    }
}
