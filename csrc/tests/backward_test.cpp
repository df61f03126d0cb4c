// The whole backward pass: dx, dgamma, dbeta and dresidual agree with the closed form, and have the same bits on every
// instruction set, team size and alignment, and in place.
#include <doctest/doctest.h>

#include <cmath>

#include "cases.h"
#include "cpu/dispatch/isa.h"
#include "cpu/parallel.h"

using namespace bnfast;
using namespace bnfast::test;

TEST_CASE("grad agrees with the closed form, with the same bits on every instruction set, team size and alignment") {
    for (Shape shape : kernel_shapes())
        for (DType dtype : all_dtypes)
            for (const Case& c : cases_of(shape, dtype)) {
                const Inputs in(c), shifted = in.shifted();
                Forward forward;
                Backward first;
                {
                    const Settings settings(smallest_isa(), 1);
                    forward = run_train(c, in);
                    first = run_grad(c, in, forward);
                    INFO(c.text());
                    CHECK(first.dx.guards_intact());
                    CHECK(first.dresidual.guards_intact());
                    const Worst worst = check_backward(c, in, forward, first);
                    CHECK_MESSAGE(worst.ratio <= 1, worst.what);
                }
                for (const std::string& isa : usable_isas())
                    for (int threads : {1, 2, 3, 8}) {
                        if (shape.size() > 100000 && threads % 2 == 0 && isa != smallest_isa()) continue;
                        INFO(c.text() << " " << isa << " threads " << threads);
                        const Settings settings(isa, threads);
                        const bool shift = threads == 3;
                        const Backward b = run_grad(c, shift ? shifted : in, forward, shift);
                        CHECK(last_isa() == isa);
                        CHECK(last_team_size() == threads);
                        CHECK(b.same_bits(first));
                        // Given y instead of residual, the gate is the same only if y wasn't rounded to a half type: y
                        // may round to 0 or 6 although the pre-activation is neither.
                        const bool exact =
                            gated_by_y(c.act) && (c.dtype == DType::float32 || c.dtype == DType::float64);
                        if (c.residual && exact) CHECK(run_grad(c, in, forward, shift, true).same_bits(first));
                        CHECK(b.dx.guards_intact());
                        CHECK(b.dresidual.guards_intact());
                    }
            }
}

namespace {

GradArgs plain_grad(const Case& c, const Inputs& in, const Forward& f, Array& dgamma, Array& dbeta) {
    GradArgs a;
    a.dy = in.dy.data();
    a.x = in.x.data();
    a.shape = c.shape;
    a.dtype = c.dtype;
    a.mean = {f.mean.data(), DType::float64};
    a.invstd = {f.invstd.data(), DType::float64};
    a.dgamma = {dgamma.data(), dgamma.dtype};
    a.dbeta = {dbeta.data(), dbeta.dtype};
    return a;
}

}  // namespace

TEST_CASE("in place (dx is dy or x), the results have the same bits") {
    for (Shape shape : kernel_shapes())
        for (DType dtype : all_dtypes)
            for (bool over_x : {false, true}) {
                const Case c{shape, dtype, Activation::none, false};
                Inputs in(c);
                const Forward f = run_train(c, in);
                const Backward b = run_grad(c, in, f);
                Array dgamma(DType::float64, shape.C), dbeta(DType::float32, shape.C);
                GradArgs a = plain_grad(c, in, f, dgamma, dbeta);
                a.dx = over_x ? in.x.data() : in.dy.data();
                const Settings settings("", 3);
                grad(a);
                INFO(c.text() << (over_x ? " over x" : " over dy"));
                CHECK((over_x ? in.x : in.dy).same_bits(b.dx));
                CHECK(dgamma.same_bits(b.dgamma));
                CHECK(dbeta.same_bits(b.dbeta));
            }
}

TEST_CASE("a mask of ones changes no bits") {
    for (Shape shape : kernel_shapes())
        for (DType dtype : all_dtypes) {
            Case c{shape, dtype, Activation::relu};
            Inputs in(c);
            const Forward f = run_train(c, in);
            const Backward without = run_grad(c, in, f);
            for (std::int64_t i = 0; i < in.mask.size; ++i) in.mask.set(i, 1);
            c.mask = true;
            INFO(c.text());
            CHECK(run_grad(c, in, f).same_bits(without));
        }
}

// For dy = 0 and weights w: dx = w/W * (dmean + 2*dvariance*(x - mean)), with W the sum of the weights.
TEST_CASE("the upstream gradients of mean and variance are passed on to dx") {
    for (Shape shape : kernel_shapes())
        for (bool masked : {false, true}) {
            const Case c{shape, DType::float64, Activation::none, false, false, masked};
            Inputs in(c);
            const Forward f = run_train(c, in);
            for (std::int64_t i = 0; i < in.dy.size; ++i) in.dy.set(i, 0);
            std::vector<double> dmean(f.mean.size()), dvariance(dmean);
            for (std::size_t k = 0; k < dmean.size(); ++k) {
                dmean[k] = 1 + double(k % 7);
                dvariance[k] = 2 - double(k % 5);
            }
            Array dgamma(DType::float64, shape.C), dbeta(DType::float64, shape.C), dx(DType::float64, shape.size());
            GradArgs a = plain_grad(c, in, f, dgamma, dbeta);
            a.dx = dx.data();
            a.mask = masked ? in.mask.data() : nullptr;
            a.dmean = {dmean.data(), DType::float64};
            a.dvariance = {dvariance.data(), DType::float64};
            grad(a);
            Worst worst;
            for (std::int64_t i = 0; i < dx.size; ++i) {
                const auto k = std::size_t(channel_of(shape, i));
                const long double share = (masked ? in.mask.get(weight_of(shape, i)) : 1) / (long double)f.count;
                const long double d = in.x.get(i) - (long double)f.mean[k];
                const long double expected = share * (dmean[k] + dvariance[k] * 2 * d);
                const long double size = std::fabs(dmean[k]) + 2 * std::fabs(dvariance[k]) * (std::fabs(d) + 1);
                worst.add("dx", i, dx.get(i), expected, 8 * 0x1p-52L * share * size);
            }
            INFO(c.text());
            CHECK_MESSAGE(worst.ratio <= 1, worst.what);
        }
}

TEST_CASE("the gradients of an empty batch are zero") {
    for (Shape shape : {Shape{0, 3, 1}, Shape{2, 3, 0}}) {
        const double zeros[3] = {};
        float dgamma[3] = {1, 1, 1}, dbeta[3] = {1, 1, 1};
        GradArgs a;
        a.shape = shape;
        a.mean = {zeros, DType::float64};
        a.invstd = {zeros, DType::float64};
        a.dgamma = {dgamma, DType::float32};
        a.dbeta = {dbeta, DType::float32};
        grad(a);
        for (int k = 0; k < 3; ++k) CHECK((dgamma[k] == 0 && dbeta[k] == 0));
    }
}
