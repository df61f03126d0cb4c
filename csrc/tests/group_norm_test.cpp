// Group norm and its special cases: agreement with the formulas in long double; the same bits on every instruction set
// and team; the same bits as batch norm for a single sample; empty input; bad arguments.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>

#include "cases.h"
#include "cpu/dispatch/isa.h"
#include "cpu/parallel.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

using std::int64_t;

struct Norm {
    GroupShape shape;
    DType dtype;
    bool affine;
    Array x, dy, gamma, beta;
    Activation act = Activation::none;
    double negative_slope = 0.2;
    Array residual;  // none if its size is 0
    Norm(GroupShape s, DType type, bool has_affine, double offset = 0)
        : shape(s),
          dtype(type),
          affine(has_affine),
          x(type, s.size()),
          dy(type, s.size()),
          gamma(compute_type(type), s.C),
          beta(compute_type(type), s.C) {
        std::mt19937 random(unsigned(s.size() + s.G));
        std::normal_distribution<double> normal(0, 1);
        for (int64_t i = 0; i < x.size; ++i) {
            x.set(i, offset + 0.5 + normal(random));
            dy.set(i, normal(random));
        }
        for (int64_t c = 0; c < s.C; ++c) {
            gamma.set(c, normal(random));
            beta.set(c, normal(random));
        }
    }
    int64_t channel(int64_t i) const { return i / shape.S % shape.C; }
    int64_t row(int64_t i) const {
        return i / (shape.A * shape.C * shape.S) * shape.G + channel(i) / (shape.C / shape.G);
    }
};

struct Out {
    Array y, dx, dgamma, dbeta;
    std::vector<double> mean, invstd;
    Array dresidual = {};
    bool same_bits(const Out& o) const {
        return y.same_bits(o.y) && dresidual.same_bits(o.dresidual) && dx.same_bits(o.dx) &&
               dgamma.same_bits(o.dgamma) && dbeta.same_bits(o.dbeta) && same(mean, o.mean) && same(invstd, o.invstd);
    }
};

Out run(const Norm& n, int shift = 0) {
    const int64_t rows = n.shape.N * n.shape.G, C = n.shape.C;
    Out o{Array(n.dtype, n.x.size, shift, 64),
          Array(n.dtype, n.x.size, shift, 64),
          Array(n.gamma.dtype, C, 0, 64),
          Array(n.gamma.dtype, C, 0, 64),
          std::vector<double>(std::size_t(rows), -7),
          std::vector<double>(std::size_t(rows), -7),
          Array(n.dtype, n.residual.size, shift, 64)};
    GroupNormArgs a;
    a.x = n.x.data();
    a.y = o.y.data();
    a.shape = n.shape;
    a.dtype = n.dtype;
    if (n.affine) {
        a.gamma = {n.gamma.data(), n.gamma.dtype};
        a.beta = {n.beta.data(), n.beta.dtype};
    }
    a.mean = o.mean.data();
    a.invstd = o.invstd.data();
    a.activation = n.act;
    a.negative_slope = n.negative_slope;
    a.residual = n.residual.size ? n.residual.data() : nullptr;
    group_norm(a);
    GroupNormGradArgs g;
    g.activation = a.activation;
    g.negative_slope = a.negative_slope;
    g.residual = a.residual;
    g.dresidual = a.residual && n.act != Activation::none ? o.dresidual.data() : nullptr;
    g.beta = a.beta;
    g.dy = n.dy.data();
    g.x = n.x.data();
    g.dx = o.dx.data();
    g.shape = n.shape;
    g.dtype = n.dtype;
    g.mean = o.mean.data();
    g.invstd = o.invstd.data();
    g.gamma = a.gamma;
    g.dgamma = {o.dgamma.data(), o.dgamma.dtype};
    g.dbeta = {o.dbeta.data(), o.dbeta.dtype};
    group_norm_grad(g);
    CHECK((o.y.guards_intact() && o.dx.guards_intact() && o.dgamma.guards_intact() && o.dbeta.guards_intact()));
    CHECK((!o.dresidual.size || o.dresidual.guards_intact()));
    return o;
}

long double& at(Wide& w, int64_t i) { return w[std::size_t(i)]; }

// The formulas in long double: statistics of the rows, and what one value becomes.
struct Oracle {
    const Norm& n;
    const long double M;  // values per row
    Wide mean, variance, invstd;

    explicit Oracle(const Norm& norm)
        : n(norm),
          M((long double)(norm.shape.A * (norm.shape.C / norm.shape.G) * norm.shape.S)),
          mean(std::size_t(norm.shape.N * norm.shape.G)),
          variance(mean),
          invstd(mean) {
        for (int64_t i = 0; i < n.x.size; ++i) at(mean, n.row(i)) += n.x.get(i) / M;
        for (int64_t i = 0; i < n.x.size; ++i) {
            const long double d = n.x.get(i) - at(mean, n.row(i));
            at(variance, n.row(i)) += d * d / M;
        }
        for (std::size_t r = 0; r < invstd.size(); ++r) invstd[r] = 1 / std::sqrt(variance[r] + (long double)1e-3);
    }
    long double gamma(int64_t i) const { return n.affine ? n.gamma.get(n.channel(i)) : 1; }
    long double xhat(int64_t i) { return (n.x.get(i) - at(mean, n.row(i))) * at(invstd, n.row(i)); }
    long double z(int64_t i) {
        const double beta = n.affine ? n.beta.get(n.channel(i)) : 0, residual = n.residual.size ? n.residual.get(i) : 0;
        return xhat(i) * gamma(i) + beta + residual;
    }
    long double y(int64_t i) {
        return n.act == Activation::none ? z(i) : activated(z(i), n.act, (long double)n.negative_slope);
    }
    long double gated_dy(int64_t i) {
        if (n.act == Activation::none) return n.dy.get(i);
        return n.dy.get(i) * activation_slope(z(i), n.act, (long double)n.negative_slope);
    }
    // The slope's error is relative to 1 + |z|, where the slope itself may be near 0.
    long double size_of_dy(int64_t i) {
        return std::fabs(n.act == Activation::none ? (long double)n.dy.get(i) : n.dy.get(i) * (1 + std::fabs(z(i))));
    }
};

// The largest ratio of error to bound.
Worst check(const Norm& n, const Out& o) {
    Oracle f(n);
    const long double eps = compute_type(n.dtype) == DType::float64 ? 0x1p-52L : 0x1p-23L;
    const long double half_eps = n.dtype == DType::float16 ? 0x1p-11L : n.dtype == DType::bfloat16 ? 0x1p-8L : 0;
    const long double subnormal = half_eps > 0 ? 6e-8L : 0;
    const auto stored = [&](long double value) { return half_eps * std::fabs(value) + subnormal; };
    const std::size_t channels = std::size_t(n.shape.C);
    Wide mean_g(f.mean.size()), mean_g_xhat(mean_g), size_g(mean_g), dgamma(channels), dbeta(channels),
        size_gamma(channels), size_beta(channels);
    Worst worst;
    for (std::size_t r = 0; r < f.mean.size(); ++r) {
        worst.add("mean", int64_t(r), o.mean[r], f.mean[r],
                  4 * eps * (std::fabs(f.mean[r]) + std::sqrt(f.variance[r])));
        worst.add("invstd", int64_t(r), o.invstd[r], f.invstd[r], f.invstd[r] * (eps > 1e-10L ? 1e-6L : 1e-12L));
    }
    for (int64_t i = 0; i < n.x.size; ++i) {
        const long double dy = f.gated_dy(i), h = f.xhat(i), g = dy * f.gamma(i);
        at(mean_g, n.row(i)) += g / f.M;
        at(mean_g_xhat, n.row(i)) += g * h / f.M;
        at(size_g, n.row(i)) += std::fabs(g) * (1 + std::fabs(h)) / f.M;
        at(dbeta, n.channel(i)) += dy;
        at(dgamma, n.channel(i)) += dy * h;
        at(size_beta, n.channel(i)) += f.size_of_dy(i);
        at(size_gamma, n.channel(i)) += f.size_of_dy(i) * (1 + std::fabs(h));
    }
    for (int64_t i = 0; i < n.x.size; ++i) {
        const long double h = f.xhat(i), dy = f.gated_dy(i), g = dy * f.gamma(i), s1 = at(f.invstd, n.row(i));
        const long double y = f.y(i), dx = s1 * (g - at(mean_g, n.row(i)) - h * at(mean_g_xhat, n.row(i)));
        worst.add("y", i, o.y.get(i), y, 16 * eps * (1 + std::fabs(h)) * (std::fabs(f.gamma(i)) + 1) + stored(y));
        worst.add("dx", i, o.dx.get(i), dx,
                  16 * eps * s1 * (std::fabs(g) + (1 + std::fabs(h)) * at(size_g, n.row(i))) + stored(dx));
        if (n.residual.size && n.act != Activation::none)
            worst.add("dresidual", i, o.dresidual.get(i), dy, 16 * eps * f.size_of_dy(i) + stored(dy));
    }
    for (int64_t c = 0; c < n.shape.C; ++c) {
        worst.add("dgamma", c, o.dgamma.get(c), at(dgamma, c), 16 * eps * at(size_gamma, c));
        worst.add("dbeta", c, o.dbeta.get(c), at(dbeta, c), 16 * eps * at(size_beta, c));
    }
    return worst;
}

const GroupShape shapes[] = {
    {5, 1, 6, 35, 3},     {3, 1, 4, 5000, 2},  {70, 1, 12, 3, 12}, {2, 1, 1, 300000, 1},  // pieces
    {4, 35, 6, 1, 3},     {3, 700, 23, 1, 23}, {9, 49, 64, 1, 8},  {2, 9000, 3, 1, 1},    // columns
    {300, 1, 100, 1, 1},  {500, 1, 24, 1, 4},  {7, 1, 5000, 1, 1}, {90, 1, 3, 1, 1},      // vectors
    {1, 1, 100003, 1, 1}, {40, 1, 7, 1, 7},    {3, 11, 1, 1, 1},   {131, 7, 12, 1, 4},
    {150, 1, 12, 5, 4},   {65, 9, 20, 1, 1},  // more samples than partial sums
};

std::string text(const Norm& n) {
    const GroupShape s = n.shape;
    std::string t = name_of(n.dtype);
    for (int64_t e : {s.N, s.A, s.C, s.S, s.G}) t += " " + std::to_string(e);
    return t + (n.affine ? " affine" : "");
}

}  // namespace

TEST_CASE("group norm agrees with the oracle, with the same bits on every instruction set, team and alignment") {
    for (const GroupShape& shape : shapes)
        for (DType dtype : all_dtypes)
            for (bool affine : {true, false}) {
                const Norm n(shape, dtype, affine);
                INFO(text(n));
                Out first;
                {
                    const Settings settings(smallest_isa(), 1);
                    first = run(n);
                }
                const Worst worst = check(n, first);
                INFO(worst.what);
                CHECK(worst.ratio <= 1);
                for (const std::string& isa : usable_isas())
                    for (int threads : {1, 2, 3, 8}) {
                        INFO(isa << " threads " << threads);
                        const Settings settings(isa, threads);
                        CHECK(run(n, threads == 3).same_bits(first));
                        CHECK(last_isa() == isa);
                    }
            }
}

TEST_CASE("group norm with an activation, a residual or both, in every layout") {
    for (const GroupShape& shape : {GroupShape{5, 1, 6, 35, 3}, GroupShape{4, 35, 6, 1, 3}, GroupShape{90, 1, 24, 1, 4},
                                    GroupShape{40, 1, 3, 1, 1}, GroupShape{3, 1, 2000, 1, 1}})
        for (DType dtype : all_dtypes)
            for (Activation act : {Activation::none, Activation::relu, Activation::relu6, Activation::leaky_relu,
                                   Activation::silu, Activation::hard_silu})
                for (bool residual : {false, true})
                    for (double negative_slope : {0.0, 0.25}) {
                        if (act != Activation::leaky_relu && negative_slope == 0) continue;
                        Norm n(shape, dtype, act != Activation::relu6);
                        n.act = act;
                        n.negative_slope = negative_slope;
                        if (residual) {
                            n.residual = Array(dtype, n.x.size);
                            for (int64_t i = 0; i < n.x.size; ++i) n.residual.set(i, double(i * 37 % 101 - 45) / 8);
                        }
                        INFO(text(n) << " activation " << int(act) << " residual " << residual);
                        const Settings one(smallest_isa(), 1);
                        const Out first = run(n);
                        const Worst worst = check(n, first);
                        INFO(worst.what);
                        CHECK(worst.ratio <= 1);
                        for (const std::string& isa : usable_isas()) {
                            const Settings settings(isa, 3);
                            CHECK(run(n, 1).same_bits(first));
                        }
                    }
}

TEST_CASE("group norm: the variance stays accurate at large offsets") {
    for (const GroupShape& shape : shapes) {
        if (shape.A * (shape.C / shape.G) * shape.S < 3) continue;
        const Norm n(shape, DType::float64, false, 1e4);
        const Out o = run(n);
        Norm centered = n;
        for (int64_t i = 0; i < n.x.size; ++i) centered.x.set(i, n.x.get(i) - 1e4);
        const Out expected = run(centered);
        for (std::size_t r = 0; r < o.invstd.size(); ++r)
            CHECK(std::fabs(o.invstd[r] / expected.invstd[r] - 1) < 1e-12);
    }
}

TEST_CASE("group norm: gamma and beta change no bits of the statistics") {
    for (const GroupShape& shape : shapes)
        for (DType dtype : all_dtypes)
            for (int threads : {1, 2}) {
                Norm n(shape, dtype, true);
                INFO(text(n) << " threads " << threads);
                const Settings settings(smallest_isa(), threads);
                const Out with = run(n);
                n.affine = false;
                const Out without = run(n);
                CHECK((same(with.mean, without.mean) && same(with.invstd, without.invstd)));
            }
}

TEST_CASE("instance norm of one sample has the same bits as batch norm") {
    for (GroupShape shape : {GroupShape{1, 1, 5, 700, 5}, GroupShape{1, 700, 5, 1, 5}, GroupShape{1, 1, 9, 20, 9}})
        for (DType dtype : all_dtypes) {
            const Norm n(shape, dtype, true);
            const Out o = run(n);
            const Shape s{shape.A, shape.C, shape.S};
            Array y(dtype, n.x.size), dx(dtype, n.x.size), dgamma(n.gamma.dtype, s.C), dbeta(n.gamma.dtype, s.C);
            std::vector<double> mean(std::size_t(s.C)), variance(mean), invstd(mean);
            TrainArgs t;
            t.x = n.x.data();
            t.y = y.data();
            t.shape = s;
            t.dtype = dtype;
            t.gamma = {n.gamma.data(), n.gamma.dtype};
            t.beta = {n.beta.data(), n.beta.dtype};
            t.mean = mean.data();
            t.variance = variance.data();
            t.invstd = invstd.data();
            train(t);
            GradArgs g;
            g.dy = n.dy.data();
            g.x = n.x.data();
            g.dx = dx.data();
            g.shape = s;
            g.dtype = dtype;
            g.mean = {mean.data(), DType::float64};
            g.invstd = {invstd.data(), DType::float64};
            g.gamma = t.gamma;
            g.dgamma = {dgamma.data(), dgamma.dtype};
            g.dbeta = {dbeta.data(), dbeta.dtype};
            grad(g);
            INFO(text(n));
            CHECK(Out{y, dx, dgamma, dbeta, mean, invstd, Array(dtype, 0)}.same_bits(o));
        }
}

TEST_CASE("group norm of empty input: zero mean, zero gradients") {
    for (GroupShape shape : {GroupShape{0, 1, 4, 3, 2}, GroupShape{2, 1, 4, 0, 2}, GroupShape{2, 0, 4, 1, 4}}) {
        const Out o = run(Norm(shape, DType::float32, true));
        for (double m : o.mean) CHECK(m == 0);
        for (double v : o.invstd) CHECK(v == doctest::Approx(1 / std::sqrt(1e-3)));
        for (int64_t c = 0; c < 4; ++c) CHECK((o.dgamma.get(c) == 0 && o.dbeta.get(c) == 0));
    }
}

TEST_CASE("group norm throws for bad arguments and writes nothing") {
    float x[6] = {1, 2, 3, 4, 5, 6}, y[6] = {-7, -7, -7, -7, -7, -7};
    double mean[3] = {-7, -7, -7}, invstd[3] = {-7, -7, -7};
    GroupNormArgs good;
    good.x = x;
    good.y = y;
    good.shape = {1, 1, 3, 2, 3};
    good.mean = mean;
    good.invstd = invstd;
    auto check_throws = [](const GroupNormArgs& args, const char* message) {
        CHECK_THROWS_WITH_AS(group_norm(args), doctest::Contains(message), std::invalid_argument);
    };
    GroupNormArgs a = good;
    a.shape.G = 2;
    check_throws(a, "G must divide C = 3. Received: 2");
    a = good;
    a.shape = {1, 2, 3, 2, 3};
    check_throws(a, "A = 1 or S = 1");
    a = good;
    a.epsilon = std::numeric_limits<double>::infinity();
    check_throws(a, "epsilon");
    a = good;
    a.mean = nullptr;
    check_throws(a, "mean and invstd must not be null");
    a = good;
    a.y = nullptr;
    check_throws(a, "y must not be null");
    CHECK((y[0] == -7 && mean[0] == -7 && invstd[0] == -7));
}
