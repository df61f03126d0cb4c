// Every float16 and bfloat16 value through the public API. infer with mean 0, variance 1, epsilon 0 and beta -0 gives
// y = x, including the sign of zero. With x = -0 it gives y = beta, rounded from float32 to the half type.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "cases.h"
#include "cpu/dispatch/isa.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

constexpr DType halves[] = {DType::float16, DType::bfloat16};

// Every bit pattern in order.
Array every_half(DType dtype) {
    Array x(dtype, 65536);
    for (int i = 0; i < 65536; ++i) {
        const auto bits = std::uint16_t(i);
        std::memcpy(static_cast<char*>(x.data()) + 2 * i, &bits, 2);
    }
    return x;
}

struct Vectors {
    std::vector<float> mean, variance, beta;
    Vectors(std::int64_t C, float b) : mean(std::size_t(C), 0), variance(std::size_t(C), 1), beta(std::size_t(C), b) {}
};

void run(Shape shape, const Array& x, Array& y, const Vectors& v) {
    InferArgs a;
    a.x = x.data();
    a.y = y.data();
    a.shape = shape;
    a.dtype = x.dtype;
    a.moving_mean = {v.mean.data(), DType::float32};
    a.moving_variance = {v.variance.data(), DType::float32};
    a.beta = {v.beta.data(), DType::float32};
    a.epsilon = 0;
    infer(a);
}

// For every half value, with both signs: the value, the midpoint to the next value, and the midpoint's float32
// neighbours; this includes values around overflow and the smallest subnormal. Then every 2011th bit pattern of
// float32, and special values.
std::vector<float> float32_values(DType dtype) {
    std::vector<float> values;
    const Array halves_in_order = every_half(dtype);
    for (int i = 0; i + 1 < 32768; ++i) {
        const double low = halves_in_order.get(i), high = halves_in_order.get(i + 1);
        if (!std::isfinite(low)) break;
        const double midpoint = std::isfinite(high) ? (low + high) / 2 : low + (low - halves_in_order.get(i - 1)) / 2;
        const float t = float(midpoint);
        for (float v : {float(low), t, std::nextafter(t, 0.0f), std::nextafter(t, INFINITY)}) {
            values.push_back(v);
            values.push_back(-v);
        }
    }
    for (std::uint64_t bits = 0; bits < 0x100000000u; bits += 2011) {
        const auto b = std::uint32_t(bits);
        float v;
        std::memcpy(&v, &b, 4);
        values.push_back(v);
    }
    for (float v : {INFINITY, -INFINITY, NAN, 3.4028235e38f, 1e-45f, -1e-45f}) values.push_back(v);
    return values;
}

}  // namespace

TEST_CASE("the oracle's conversions are correct at known values") {
    std::uint16_t bits = 0;
    auto narrowed = [&](DType d, double v) {
        narrow(d, v, &bits);
        return bits;
    };
    CHECK(narrowed(DType::float16, 1) == 0x3c00);
    CHECK(narrowed(DType::float16, 65519.99) == 0x7bff);
    CHECK(narrowed(DType::float16, 65520) == 0x7c00);
    CHECK(narrowed(DType::float16, 0x1p-25) == 0);
    CHECK(narrowed(DType::float16, 0x1.8p-24) == 2);
    CHECK(narrowed(DType::bfloat16, 1) == 0x3f80);
    CHECK(narrowed(DType::bfloat16, 1 + 0x1p-8) == 0x3f80);
    CHECK(narrowed(DType::bfloat16, 1 + 0x1.8p-7) == 0x3f82);
    CHECK(narrowed(DType::bfloat16, 3.4e38) == 0x7f80);
    for (DType dtype : halves)
        for (int i = 0; i < 65536; ++i) {
            const auto b = std::uint16_t(i);
            const double v = widen(dtype, &b);
            if (!std::isnan(v) && narrowed(dtype, v) != b) FAIL("oracle: " << name_of(dtype) << " " << i);
        }
}

TEST_CASE("every half value widens and narrows back exactly, on every instruction set and in both layouts") {
    for (DType dtype : halves)
        for (const std::string& isa : usable_isas())
            for (Shape shape : {Shape{1, 65536, 1}, Shape{1, 1, 65536}, Shape{16, 4096, 1}, Shape{1024, 1, 64}}) {
                const Settings settings(isa, 1);
                const Array x = every_half(dtype);
                Array y(dtype, 65536, 0, 64);
                run(shape, x, y, Vectors(shape.C, -0.0f));
                INFO(name_of(dtype) << " " << isa << " C " << shape.C);
                CHECK(last_isa() == isa);
                CHECK(y.same_bits(x));
                CHECK(y.guards_intact());
            }
}

// Tests widening without the store: the mean of one value is that value in float64.
TEST_CASE("the mean of one half value is exact") {
    for (DType dtype : halves)
        for (const std::string& isa : usable_isas()) {
            const Settings settings(isa, 1);
            const Array x = every_half(dtype);
            std::vector<double> mean(65536), variance(65536);
            MomentsArgs a;
            a.x = x.data();
            a.shape = {1, 65536, 1};
            a.dtype = dtype;
            a.mean = mean.data();
            a.variance = variance.data();
            moments(a);
            int wrong = 0;
            for (int i = 0; i < 65536; ++i) {
                const double v = x.get(i);
                wrong += std::isfinite(v) ? mean[std::size_t(i)] != v : std::isfinite(mean[std::size_t(i)]);
            }
            INFO(name_of(dtype) << " " << isa);
            CHECK(wrong == 0);
        }
}

TEST_CASE("float32 is rounded to the nearest half, ties to even, on every instruction set") {
    for (DType dtype : halves) {
        const std::vector<float> values = float32_values(dtype);
        const auto C = std::int64_t(values.size());
        Array expected(dtype, C), x(dtype, C);
        for (std::int64_t i = 0; i < C; ++i) {
            expected.set(i, values[std::size_t(i)]);
            x.set(i, -0.0);
        }
        Vectors v(C, 0);
        v.beta = values;
        for (const std::string& isa : usable_isas())
            for (Shape shape : {Shape{1, C, 1}, Shape{1, C - 3, 1}}) {
                const Settings settings(isa, 1);
                Array y(dtype, C);
                for (std::int64_t i = shape.C; i < C; ++i) y.set(i, expected.get(i));
                run(shape, x, y, v);
                INFO(name_of(dtype) << " " << isa);
                CHECK(last_isa() == isa);
                CHECK(y.same_bits(expected));
            }
    }
}
