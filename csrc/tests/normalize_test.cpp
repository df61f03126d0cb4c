// The whole forward pass: y, statistics and moving statistics agree with the oracle, and have the same bits on every
// instruction set, team size and alignment, and in place.
#include <doctest/doctest.h>

#include <cmath>

#include "cases.h"
#include "cpu/dispatch/isa.h"
#include "cpu/parallel.h"

using namespace bnfast;
using namespace bnfast::test;

TEST_CASE("train agrees with the oracle, with the same bits on every instruction set, team size and alignment") {
    for (Shape shape : kernel_shapes())
        for (DType dtype : all_dtypes)
            for (const Case& c : cases_of(shape, dtype)) {
                const Inputs in(c), shifted = in.shifted();
                Forward first;
                {
                    const Settings settings(smallest_isa(), 1);
                    first = run_train(c, in);
                    INFO(c.text());
                    CHECK(last_isa() == smallest_isa());
                    CHECK(first.y.guards_intact());
                    CHECK(first.moving_mean.guards_intact());
                    CHECK(first.moving_variance.guards_intact());
                    const Worst worst = check_forward(c, in, first);
                    CHECK_MESSAGE(worst.ratio <= 1, worst.what);
                }
                for (const std::string& isa : usable_isas())
                    for (int threads : {1, 2, 3, 8}) {
                        if (shape.size() > 100000 && threads % 2 == 0 && isa != smallest_isa()) continue;
                        INFO(c.text() << " " << isa << " threads " << threads);
                        const Settings settings(isa, threads);
                        const Forward f = run_train(c, threads == 3 ? shifted : in, threads == 3 ? 1 : 0);
                        CHECK(last_isa() == isa);
                        CHECK(last_team_size() == threads);
                        CHECK(f.same_bits(first));
                        CHECK(f.y.guards_intact());
                    }
            }
}

TEST_CASE("infer with the batch statistics has the same bits as train") {
    for (Shape shape : kernel_shapes())
        for (DType dtype : all_dtypes)
            for (const std::string& isa : usable_isas()) {
                const Case c{shape, dtype, Activation::relu6, true, true};
                const Inputs in(c);
                INFO(c.text() << " " << isa);
                const Settings settings(isa, 2);
                const Forward f = run_train(c, in);
                Array y(dtype, shape.size(), 0, 64);
                InferArgs a;
                a.x = in.x.data();
                a.y = y.data();
                a.shape = shape;
                a.dtype = dtype;
                a.moving_mean = {f.mean.data(), DType::float64};
                a.moving_variance = {f.variance.data(), DType::float64};
                a.gamma = {in.gamma.data(), in.gamma.dtype};
                a.beta = {in.beta.data(), in.beta.dtype};
                a.activation = c.act;
                a.residual = in.residual.data();
                infer(a);
                CHECK(last_isa() == isa);
                CHECK(y.same_bits(f.y));
                CHECK(y.guards_intact());
            }
}

TEST_CASE("in place (y is x), the results have the same bits") {
    for (Shape shape : kernel_shapes())
        for (DType dtype : all_dtypes) {
            const Case c{shape, dtype, Activation::leaky_relu, false};
            Inputs in(c);
            const Forward f = run_train(c, in);
            std::vector<double> mean(f.mean.size()), variance(mean), invstd(mean);
            TrainArgs a;
            a.x = in.x.data();
            a.y = in.x.data();
            a.shape = shape;
            a.dtype = dtype;
            a.activation = c.act;
            a.mean = mean.data();
            a.variance = variance.data();
            a.invstd = invstd.data();
            const Settings settings("", 3);
            train(a);
            INFO(c.text());
            CHECK(in.x.same_bits(f.y));
            CHECK(same(mean, f.mean));
        }
}

TEST_CASE("with one value per channel, y is beta and the moving variance has no sample correction") {
    const Case c{{1, 70, 1}, DType::float32};
    const Inputs in(c);
    const Forward f = run_train(c, in);
    CHECK(f.y.same_bits(in.beta));
    CHECK(f.moving_variance.get(0) == 1.5);
}

TEST_CASE("activations propagate NaN; relu maps -0 to 0, leaky_relu with slope 0 -infinity to 0") {
    const float x[4] = {NAN, -INFINITY, INFINITY, -0.0f}, mean[4] = {}, variance[4] = {1, 1, 1, 1};
    const float beta[4] = {0, 0, 0, -0.0f};
    float y[4];
    InferArgs a;
    a.x = x;
    a.y = y;
    a.shape = {1, 4, 1};
    a.moving_mean = {mean, DType::float32};
    a.moving_variance = {variance, DType::float32};
    a.beta = {beta, DType::float32};
    a.epsilon = 0;
    for (const std::string& isa : usable_isas())
        for (Activation act : {Activation::relu, Activation::relu6, Activation::leaky_relu}) {
            const Settings settings(isa, 0);
            a.activation = act;
            a.negative_slope = 0;
            infer(a);
            CHECK(std::isnan(y[0]));
            CHECK(y[1] == 0);
            CHECK(y[2] == (act == Activation::relu6 ? 6 : INFINITY));
            CHECK((y[3] == 0 && !std::signbit(y[3])));
        }
}
