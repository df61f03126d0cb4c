// The CUDA kernels, run by the emulator: every call, form, dtype, activation and residual agrees with the oracle, with
// the same bits in every schedule (blocks, order of threads, alignment, form) and in place.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <set>

#include "tests/cuda/run.h"

using namespace bnfast;
using namespace bnfast::test;
using cuda::Call;
using cuda::Form;
using A = Activation;

namespace {

#ifdef BNFAST_TSAN
// A 16-byte load may contain values of the neighbouring row, which another block overwrites in place. They are not
// used, but ThreadSanitizer can't know that.
constexpr std::int64_t in_place_S = 64;
constexpr DType dtypes[] = {DType::float32, DType::bfloat16};
const std::vector<Shape> shapes = {{300, 8, 1}, {3, 5, 49}, {1, 2, 9000}};
#elif defined(BNFAST_ASAN)
constexpr std::int64_t in_place_S = 49;
constexpr const DType (&dtypes)[4] = all_dtypes;
const std::vector<Shape> shapes = {{1, 1, 1},   {7, 3, 1},  {300, 8, 1}, {70, 33, 1},
                                   {65, 65, 1}, {3, 5, 49}, {1, 2, 9000}};
#else
constexpr const DType (&dtypes)[4] = all_dtypes;
constexpr std::int64_t in_place_S = 49;
const std::vector<Shape> shapes = {
    {1, 1, 1},    {1, 23, 1},    {7, 3, 1},    {40, 64, 1},  {65, 257, 1},   // a partial packed row alone, or a few
    {2003, 3, 1}, {700, 33, 1},  {333, 65, 1}, {611, 64, 1}, {259, 100, 1},  // packed columns with a tail
    {1500, 8, 1}, {150, 257, 1},                                             // several chunks and tiles
    {2, 3, 49},   {5, 7, 2},     {9, 5, 196},  {1, 9, 500},  {33, 33, 7},    // short rows
    {3, 2, 4097}, {1, 3, 40000}, {3001, 1, 1}, {600, 2, 30},  // several chunks per row, and rows per chunk
};
#endif

std::vector<Case> cuda_cases(Shape shape, DType dtype) {
    if (shape.size() > 60000 || std::size(dtypes) < 4)
        return {{shape, dtype, A::relu6, true, true}, {shape, dtype, A::none, true, false, false, true, 100}};
    return {
        {shape, dtype, A::none, false, false},
        {shape, dtype, A::none, true, true, false, false, 100},
        {shape, dtype, A::relu, true, false},
        {shape, dtype, A::relu6, true, true},
        {shape, dtype, A::leaky_relu, true, true, false, false},
        {shape, dtype, A::leaky_relu, false, false, false, true, 100},
    };
}

// Other schedules than the first, which has one SM's blocks in forward order. With little shared memory, clusters of up
// to 8 blocks take a channel where it then fits, and the form resident keeps a part.
const std::vector<Schedule> schedules = {
    {Form::sweeps, 1, emu::Order::backward},
    {Form::channel, 1, emu::Order::backward},
    {Form::channel, 0, emu::Order::backward, -1, Schedule::test_device(1, 40)},
    {Form::resident, 0, emu::Order::backward},
#ifndef BNFAST_TSAN  // for which a launch takes long
    {Form::sweeps, 3, emu::Order::mixed},
    {Form::channel, 0, emu::Order::forward},
    {Form::channel, 2, emu::Order::mixed, -1, Schedule::test_device(3, 24)},
    {Form::resident, 1, emu::Order::forward},
    {Form::resident, 5, emu::Order::mixed, -1, Schedule::test_device(3, 40)},
#endif
};

}  // namespace

TEST_CASE("the schedules take every form, clusters of 2, 4 and 8 blocks, and keep all, a part and nothing") {
    std::set<std::pair<Form, int>> taken;
    std::set<int> kept;  // of a schedule with little shared memory
    for (Shape shape : shapes)
        for (DType dtype : dtypes)
            for (const Schedule& s : schedules)
                for (Call call : {Call::train, Call::gradient}) {
                    const cuda::Plan p = cuda::make_plan({shape, dtype, call, s.form}, s.device);
                    taken.insert({p.form, p.cluster});
                    if (p.form == Form::resident) kept.insert(p.kept_slots);
                }
    const int clusters = shapes.size() < 10 ? 2 : 8;  // few under sanitizers
    for (int cluster = 1; cluster <= clusters; cluster *= 2) CHECK(taken.count({Form::channel, cluster}) == 1);
    CHECK(taken.count({Form::sweeps, 1}) == 1);
    CHECK(taken.count({Form::resident, 1}) == 1);
    CHECK(kept.size() > 2);
}

TEST_CASE("train agrees with the oracle, with the same bits in every schedule and alignment") {
    for (Shape shape : shapes)
        for (DType dtype : dtypes)
            for (const Case& c : cuda_cases(shape, dtype)) {
                INFO(c.text());
                const Inputs in(c), shifted = in.shifted();
                const Forward first = cuda_train(c, in, {});
                const Worst worst = check_forward(c, in, first);
                CHECK_MESSAGE(worst.ratio <= 1, worst.what);
                CHECK(first.y.guards_intact());
                CHECK(first.moving_mean.guards_intact());
                for (const Schedule& schedule : schedules) {
                    const bool off = schedule.order == emu::Order::backward;
                    const Forward f = cuda_train(c, off ? shifted : in, schedule, off ? 1 : 0);
                    CHECK(f.same_bits(first));
                    CHECK(f.y.guards_intact());
                }
            }
}

TEST_CASE("grad agrees with the oracle, with the same bits in every schedule and alignment") {
    for (Shape shape : shapes)
        for (DType dtype : dtypes)
            for (const Case& c : cuda_cases(shape, dtype)) {
                INFO(c.text());
                const Inputs in(c), shifted = in.shifted();
                const Forward forward = cuda_train(c, in, {});
                const Backward first = cuda_grad(c, in, forward, {});
                const Worst worst = check_backward(c, in, forward, first);
                CHECK_MESSAGE(worst.ratio <= 1, worst.what);
                CHECK(first.dx.guards_intact());
                CHECK(first.dresidual.guards_intact());
                for (const Schedule& schedule : schedules) {
                    const bool off = schedule.order == emu::Order::backward;
                    const Backward b = cuda_grad(c, off ? shifted : in, forward, schedule, off ? 1 : 0);
                    CHECK(b.same_bits(first));
                    CHECK(b.dx.guards_intact());
                }
            }
}

TEST_CASE("infer with the batch statistics has the same bits as train, moments the same statistics") {
    for (Shape shape : shapes)
        for (DType dtype : dtypes) {
            const Case c{shape, dtype, A::relu6, true, true};
            INFO(c.text());
            const Inputs in(c);
            const Forward f = cuda_train(c, in, {});
            CHECK(cuda_infer(c, in, f, {Form::automatic, 2, emu::Order::mixed}).same_bits(f.y));
            const Forward m = cuda_moments(c, in, {});
            CHECK(same(m.mean, f.mean));
            CHECK(same(m.variance, f.variance));
        }
}

TEST_CASE("large offsets cost no digits") {
    for (Shape shape : {Shape{700, 33, 1}, Shape{9, 5, 196}})
        for (double offset : {1e4, 1e6}) {
            const Case c{shape, DType::float32, A::none, true, false, false, true, offset};
            INFO(c.text());
            const Inputs in(c);
            const Forward f = cuda_train(c, in, {});
            const Moments m = moments_of(shape, in.x, nullptr);
            for (std::size_t k = 0; k < m.mean.size(); ++k)
                CHECK(std::fabs(double(f.variance[k] / m.variance[k] - 1)) <= (offset > 1e5 ? 1e-5 : 1e-6));
            const Worst worst = check_forward(c, in, f);
            CHECK_MESSAGE(worst.ratio <= (offset > 1e5 ? 10 : 1), worst.what);
        }
}

TEST_CASE("a constant channel has variance 0 exactly, and y is beta") {
    for (Shape shape : {Shape{700, 33, 1}, Shape{9, 5, 196}, Shape{3, 2, 4097}})
        for (DType dtype : dtypes) {
            const Case c{shape, dtype};
            INFO(c.text());
            Inputs in(c);
            for (std::int64_t i = 0; i < shape.size(); ++i) in.x.set(i, 1234.5 + double(channel_of(shape, i)));
            const Forward f = cuda_train(c, in, {});
            for (double v : f.variance) CHECK(v == 0);
            Array beta(dtype, 1);
            for (std::int64_t i = 0; i < shape.size(); ++i) {
                beta.set(0, in.beta.get(channel_of(shape, i)));
                REQUIRE(f.y.get(i) == beta.get(0));
            }
        }
}

TEST_CASE("one value per channel gives y = beta") {
    const Case c{{1, 33, 1}, DType::float32};
    const Inputs in(c);
    const Forward f = cuda_train(c, in, {});
    for (std::int64_t i = 0; i < 33; ++i) CHECK(f.y.get(i) == in.beta.get(i));
}

TEST_CASE("an empty batch has mean and variance 0 and leaves the moving statistics") {
    for (Shape shape : {Shape{0, 5, 1}, Shape{0, 5, 7}, Shape{3, 5, 0}})
        for (DType dtype : dtypes) {
            const Case c{shape, dtype};
            Inputs in(Case{{1, 5, 1}, dtype});
            const Forward f = cuda_train(c, in, {});
            for (std::size_t k = 0; k < 5; ++k) {
                CHECK(f.mean[k] == 0);
                CHECK(f.variance[k] == 0);
                CHECK(f.invstd[k] == 1 / std::sqrt(1e-3));
                CHECK(f.moving_mean.get(std::int64_t(k)) == 0.25);
                CHECK(f.moving_variance.get(std::int64_t(k)) == 2);
            }
            const Backward b = cuda_grad(c, in, f, {});
            for (std::int64_t k = 0; k < 5; ++k) CHECK(b.dbeta.get(k) == 0);
        }
}

TEST_CASE("a non-finite value stays in its channel, and skip_update keeps that channel's moving statistics") {
    for (Shape shape : {Shape{70, 33, 1}, Shape{9, 33, 30}})
        for (double value : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL})
            for (std::int64_t at : {std::int64_t(0), shape.size() / 2, shape.size() - 1}) {
                const Case c{shape, DType::float32, A::relu};
                const Inputs clean(c);
                Inputs in(c);
                in.x.set(at, value);
                const std::int64_t hit = channel_of(shape, at);
                const Forward good = cuda_train(c, clean, {}), f = cuda_train(c, in, {});
                for (std::int64_t k = 0; k < shape.C; ++k) {
                    CHECK(std::isnan(f.variance[std::size_t(k)]) == (k == hit));
                    if (k == hit) CHECK((f.mean[std::size_t(k)] == value || std::isnan(value)));
                    if (k != hit) CHECK(f.moving_mean.get(k) == good.moving_mean.get(k));
                    else CHECK(!std::isfinite(f.moving_mean.get(k)));
                }
                for (std::int64_t i = 0; i < shape.size(); ++i)
                    REQUIRE((channel_of(shape, i) == hit ? std::isnan(f.y.get(i)) : f.y.get(i) == good.y.get(i)));
                for (Form form : {Form::sweeps, Form::channel, Form::resident}) {
                    Forward kept = cuda_train(c, in, {form});
                    CHECK(kept.same_bits(f));
                    std::vector<double> mean(std::size_t(shape.C), 7), variance = mean, results(mean.size() * 3);
                    cuda::ForwardArgs a{};
                    a.x = in.x.data();
                    a.y = kept.y.data();
                    a.moving_mean = {mean.data(), 1};
                    a.moving_variance = {variance.data(), 1};
                    a.skip_non_finite = 1;
                    a.mean = results.data();
                    a.variance = a.mean + shape.C;
                    a.invstd = a.variance + shape.C;
                    cuda_forward(Call::train, shape, c.dtype, c.act, 0, a, {form});
                    for (std::size_t k = 0; k < mean.size(); ++k) {
                        CHECK((mean[k] == 7) == (std::int64_t(k) == hit));
                        CHECK((variance[k] == 7) == (std::int64_t(k) == hit));
                    }
                }
            }
}

#ifndef BNFAST_TSAN
// docs/states.md: finite values whose sums or squares overflow the compute type, and infinities.
TEST_CASE("the states of a channel are those of the CPU, in every form") {
    struct State {
        std::vector<double> values;  // repeated; 0 elsewhere
        double mean, variance;
    };
    const double inf = HUGE_VAL, nan = std::numeric_limits<double>::quiet_NaN();
    const auto states_of = [&](DType dtype) -> std::vector<State> {
        const double large = dtype == DType::float64 ? 0x1p1023 : 0x1p127,
                     root = dtype == DType::float64 ? 0x1p510 : 0x1p62;
        std::vector<State> all = {
            {{1, nan}, nan, nan}, {{inf}, inf, nan}, {{-inf, 1}, -inf, nan}, {{inf, -inf}, nan, nan}};
        if (dtype == DType::float16) return all;
        all.push_back({{large, large, 0, 0}, large / 2, inf});
        all.push_back({{large, large / 2}, 0.75 * large, inf});
        all.push_back({{large, -large}, 0, inf});
        all.push_back({{large}, large, 0});
        all.push_back({{root, -root}, 0, root * root});  // the squares' sum overflows, the variance doesn't
        return all;
    };
    for (Shape shape : {Shape{1024, 3, 1}, Shape{700, 9, 1}, Shape{4, 3, 600}, Shape{4, 3, 30}, Shape{4, 1, 1}})
        for (DType dtype : dtypes)
            for (const State& state : states_of(dtype)) {
                const Case c{shape, dtype};
                INFO(c.text() << " mean " << state.mean << " variance " << state.variance);
                Inputs in(c);
                const std::int64_t hit = shape.C / 2;
                std::int64_t count = 0;
                for (std::int64_t i = 0; i < shape.size(); ++i)
                    if (channel_of(shape, i) == hit)
                        in.x.set(i, state.values[std::size_t(count++) % state.values.size()]);
                const Forward f = cuda_train(c, in, {});
                const std::size_t k = std::size_t(hit);
                CHECK((f.mean[k] == state.mean || (std::isnan(f.mean[k]) && std::isnan(state.mean))));
                if (std::isfinite(state.variance))
                    CHECK(f.variance[k] == doctest::Approx(state.variance).epsilon(1e-6));
                else
                    CHECK(
                        (f.variance[k] == state.variance || (std::isnan(f.variance[k]) && std::isnan(state.variance))));
                const Backward b = cuda_grad(c, in, f, {});
                Array beta(dtype, 1);
                beta.set(0, in.beta.get(hit));
                for (std::int64_t i = 0; i < shape.size(); ++i) {
                    const double y = f.y.get(i), dx = b.dx.get(i);
                    if (channel_of(shape, i) != hit) REQUIRE((std::isfinite(y) && std::isfinite(dx)));
                    else if (std::isnan(state.variance)) REQUIRE((std::isnan(y) && std::isnan(dx)));
                    else if (std::isinf(state.variance)) REQUIRE((y == beta.get(0) && dx == 0));
                    else REQUIRE((std::isfinite(y) && std::isfinite(dx)));
                }
                if (std::isinf(state.variance)) CHECK(b.dgamma.get(hit) == 0);
                for (Schedule s :
                     {Schedule{Form::channel},
                      Schedule{Form::resident, 3, emu::Order::mixed, -1, Schedule::test_device(3)},
                      Schedule{Form::channel, 0, emu::Order::backward, -1, Schedule::test_device(1, 24)}}) {
                    CHECK(cuda_train(c, in, s).same_bits(f));
                    CHECK(cuda_grad(c, in, f, s).same_bits(b));
                }
                CHECK(same(cuda_moments(c, in, {}).mean, f.mean));
            }
}
#endif

TEST_CASE("in place has the same bits") {
    for (Shape shape : {Shape{700, 33, 1}, Shape{9, 5, in_place_S}})
        for (DType dtype : dtypes)
            for (Form form : {Form::sweeps, Form::channel, Form::resident}) {
                const Case c{shape, dtype, A::relu, true, false};
                INFO(c.text());
                Inputs in(c);
                const Forward f = cuda_train(c, in, {});
                const Backward b = cuda_grad(c, in, f, {});
                for (int over_x = 0; over_x < 2; ++over_x) {
                    Inputs work = in;
                    Array& target = over_x ? work.x : work.dy;
                    std::vector<double> dgamma(std::size_t(shape.C)), dbeta = dgamma;
                    cuda::GradientArgs g{};
                    g.dy = work.dy.data();
                    g.x = work.x.data();
                    g.dx = target.data();
                    g.mean = {f.mean.data(), 1};
                    g.invstd = {f.invstd.data(), 1};
                    g.gamma = {in.gamma.data(), in.gamma.dtype == DType::float64};
                    g.beta = {in.beta.data(), in.beta.dtype == DType::float64};
                    g.training = 1;
                    g.dgamma = {dgamma.data(), 1};
                    g.dbeta = {dbeta.data(), 1};
                    cuda_gradient(shape, dtype, c.act, 0, g, {form, 2});
                    CHECK(target.same_bits(b.dx));
                }
                cuda::ForwardArgs a{};
                std::vector<double> results(std::size_t(shape.C) * 3);
                a.x = in.x.data();
                a.y = in.x.data();
                a.gamma = {in.gamma.data(), in.gamma.dtype == DType::float64};
                a.beta = {in.beta.data(), in.beta.dtype == DType::float64};
                a.epsilon = 1e-3;
                a.mean = results.data();
                a.variance = a.mean + shape.C;
                a.invstd = a.variance + shape.C;
                cuda_forward(Call::train, shape, dtype, c.act, 0, a, {form, 2});
                CHECK(in.x.same_bits(f.y));
            }
}

TEST_CASE("the gradient takes the forward's y in place of the residual") {
    for (Shape shape : {Shape{70, 33, 1}, Shape{9, 5, 49}})
        for (Form form : {Form::sweeps, Form::channel, Form::resident}) {
            const Case c{shape, DType::float32, A::relu6, true, true};
            const Inputs in(c);
            const Forward f = cuda_train(c, in, {});
            CHECK(cuda_grad(c, in, f, {form}, 0, true).same_bits(cuda_grad(c, in, f, {})));
        }
}

#ifndef BNFAST_TSAN  // which reports them: planted_test.cpp
// Other bits, or a launch that the emulator ends.
template <class F> bool is_found(F same_bits) {
    try {
        return !same_bits();
    } catch (const emu::Error&) {
        return true;
    }
}

TEST_CASE("a missing barrier of the kernels changes their bits") {
    struct Plant {
        Shape shape;
        cuda::Form form;
        std::vector<int> barriers;
        cuda::DeviceLimits device;
    };
    const cuda::DeviceLimits one = Schedule::test_device();
    cuda::DeviceLimits small = one;
    small.shared_per_block = 36600;  // two blocks for a channel of 9000 values, in the gradient too
    // Two barriers per item in a reduce step, one more per channel. The last of a block guards nothing any more, so
    // these are the barriers of the first item or, with three chunks, of the first channel, and at least one item
    // follows. Of a cluster with one chunk per block: the chunk's first, the cluster's own, the one before the
    // constants are read. A barrier that only some blocks of a cluster skip leaves the others waiting, which is found,
    // too.
    for (const Plant& p :
         {Plant{{1500, 8, 1}, Form::sweeps, {0, 1}, one}, Plant{{9, 5, 196}, Form::sweeps, {0, 1}, one},
          Plant{{1, 3, 20001}, Form::channel, {0, 1, 2, 3, 4, 5, 6}, one},
          Plant{{1, 3, 9000}, Form::channel, {0, 2, 3}, small}, Plant{{9, 5, 196}, Form::resident, {0, 1, 2}, one},
          Plant{{600, 2, 30}, Form::resident, {0}, one}}) {
        const Case c{p.shape, DType::float32, A::none, true, false, false, true, 100};
        const Inputs in(c);
        const unsigned blocks = p.form == Form::resident ? 0 : 1;
        const Forward good = cuda_train(c, in, {});
        const Backward gradient = cuda_grad(c, in, good, {});
        for (int skip : p.barriers) {
            INFO(c.text() << " form " << int(p.form) << " barrier " << skip);
            int found = 0, found_in_gradient = 0;
            for (emu::Order order : emu::all_orders) {
                const Schedule schedule{p.form, blocks, order, skip, p.device};
                found += is_found([&] { return cuda_train(c, in, schedule).same_bits(good); });
                found_in_gradient += is_found([&] { return cuda_grad(c, in, good, schedule).same_bits(gradient); });
            }
            // Parts that are read too early are NaN, which train mends from x without a trace.
            if (skip != 5) CHECK(found > 0);
            CHECK(found_in_gradient > 0);
        }
    }
}

TEST_CASE("a missing wait of a grid barrier changes the bits of the form resident") {
    for (Shape shape : {Shape{2003, 3, 1}, Shape{9, 5, 196}, Shape{1, 2, 9000}}) {
        const Case c{shape, DType::float32};
        const Inputs in(c);
        const Forward good = cuda_train(c, in, {});
        const Backward gradient = cuda_grad(c, in, good, {});
        for (int skip : {0, 1}) {
            INFO(c.text() << " wait " << skip);
            int found = 0, found_in_gradient = 0;
            for (emu::Order order : emu::all_orders) {
                const Schedule schedule{Form::resident, 0, order, -1, Schedule::test_device(2), skip};
                found += !cuda_train(c, in, schedule).same_bits(good);
                found_in_gradient += !cuda_grad(c, in, good, schedule).same_bits(gradient);
            }
            CHECK(found > 0);
            CHECK(found_in_gradient > 0);
        }
    }
}
#endif
