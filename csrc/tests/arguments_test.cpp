// A bad argument throws std::invalid_argument with a message that names the requirement, and nothing is written.
// NonFiniteError leaves y and the moving statistics unchanged.
#include <doctest/doctest.h>

#include <cmath>
#include <functional>

#include "bnfast/bnfast.h"

using namespace bnfast;

namespace {

constexpr float untouched = -77;

struct Buffers {
    float x[6] = {1, 2, 3, 4, 5, 7}, y[6], moving_mean[2] = {untouched, untouched},
          moving_variance[2] = {untouched, untouched}, vector[2] = {1, 1}, dgamma[2] = {untouched, untouched},
          dbeta[2] = {untouched, untouched};
    double mean[2] = {untouched, untouched}, variance[2] = {untouched, untouched}, invstd[2] = {untouched, untouched};
    Buffers() {
        for (float& v : y) v = untouched;
    }
    bool outputs_untouched() const {
        bool intact = true;
        for (float v : y) intact = intact && v == untouched;
        for (int k = 0; k < 2; ++k)
            intact = intact && moving_mean[k] == untouched && moving_variance[k] == untouched &&
                     dgamma[k] == untouched && dbeta[k] == untouched;
        return intact;
    }
    bool statistics_untouched() const {
        return mean[0] == untouched && variance[0] == untouched && invstd[0] == untouched;
    }
};

TrainArgs train_args(Buffers& b) {
    TrainArgs a;
    a.x = b.x;
    a.y = b.y;
    a.shape = {3, 2, 1};
    a.moving_mean = {b.moving_mean, DType::float32};
    a.moving_variance = {b.moving_variance, DType::float32};
    a.mean = b.mean;
    a.variance = b.variance;
    a.invstd = b.invstd;
    return a;
}
InferArgs infer_args(Buffers& b) {
    InferArgs a;
    a.x = b.x;
    a.y = b.y;
    a.shape = {3, 2, 1};
    a.moving_mean = a.moving_variance = {b.vector, DType::float32};
    return a;
}
GradArgs grad_args(Buffers& b) {
    GradArgs a;
    a.dy = b.x;
    a.x = b.x;
    a.dx = b.y;
    a.shape = {3, 2, 1};
    a.mean = a.invstd = {b.vector, DType::float32};
    a.dgamma = {b.dgamma, DType::float32};
    a.dbeta = {b.dbeta, DType::float32};
    return a;
}
MomentsArgs moments_args(Buffers& b) {
    MomentsArgs a;
    a.x = b.x;
    a.shape = {3, 2, 1};
    a.mean = b.mean;
    a.variance = b.variance;
    return a;
}

template <class Args> struct Bad {
    const char* message;  // a part of the expected error text
    std::function<void(Args&)> make_bad;
};

template <class Args, class Call> void check_all(Args (*make)(Buffers&), Call call, const std::vector<Bad<Args>>& bad) {
    for (const auto& b : bad) {
        Buffers buffers;
        Args args = make(buffers);
        b.make_bad(args);
        INFO(b.message);
        CHECK_THROWS_WITH_AS(call(args), doctest::Contains(b.message), std::invalid_argument);
        CHECK(buffers.outputs_untouched());
        CHECK(buffers.statistics_untouched());
    }
    Buffers buffers;
    CHECK_NOTHROW(call(make(buffers)));
}

// Bad arguments of every function: the tensor x, its shape and its dtype.
template <class Args> std::vector<Bad<Args>> common() {
    return {
        {"x must not be null", [](Args& a) { a.x = nullptr; }},
        {"shape must have extents >= 0. Received: (-3, 2, 1)", [](Args& a) { a.shape.N = -3; }},
        {"shape must have extents >= 0", [](Args& a) { a.shape.C = -2; }},
        {"shape must have extents >= 0", [](Args& a) { a.shape.S = -1; }},
        {"fewer than 2^57 values", [](Args& a) { a.shape = {std::int64_t(1) << 30, std::int64_t(1) << 20, 1 << 20}; }},
        {"fewer than 2^57 values", [](Args& a) { a.shape = {45, 0, std::int64_t(1) << 62}; }},
        {"fewer than 2^57 values", [](Args& a) { a.shape = {std::int64_t(1) << 62, 14, 0}; }},
        {"dtype must be a valid DType. Received: 7", [](Args& a) { a.dtype = DType(7); }},
        {"dtype must be a valid DType. Received: -1", [](Args& a) { a.dtype = DType(-1); }},
    };
}
// The same, plus those of functions with an activation, gamma and beta.
template <class Args> std::vector<Bad<Args>> affine() {
    auto list = common<Args>();
    const std::vector<Bad<Args>> more = {
        {"activation must be a valid Activation. Received: 99", [](Args& a) { a.activation = Activation(99); }},
        {"negative_slope must be finite and >= 0", [](Args& a) { a.negative_slope = -0.1; }},
        {"negative_slope must be finite and >= 0", [](Args& a) { a.negative_slope = NAN; }},
        {"negative_slope must be finite and >= 0", [](Args& a) { a.negative_slope = INFINITY; }},
        {"activation must be a valid Activation. Received: -1", [](Args& a) { a.activation = Activation(-1); }},
        {"gamma must be float32 or float64", [](Args& a) { a.gamma = {a.x, DType::float16}; }},
        {"beta must be float32 or float64", [](Args& a) { a.beta = {a.x, DType::bfloat16}; }},
    };
    list.insert(list.end(), more.begin(), more.end());
    return list;
}

}  // namespace

TEST_CASE("train throws for bad arguments") {
    auto bad = affine<TrainArgs>();
    const std::vector<Bad<TrainArgs>> more = {
        {"y must not be null", [](TrainArgs& a) { a.y = nullptr; }},
        {"moving_mean and moving_variance must be given together", [](TrainArgs& a) { a.moving_mean = {}; }},
        {"moving_mean must be float32 or float64", [](TrainArgs& a) { a.moving_mean.dtype = DType::float16; }},
        {"momentum must lie in [0, 1]", [](TrainArgs& a) { a.momentum = 1.5; }},
        {"momentum must lie in [0, 1]", [](TrainArgs& a) { a.momentum = NAN; }},
        {"epsilon must be finite and >= 0", [](TrainArgs& a) { a.epsilon = -1e-3; }},
        {"epsilon must be finite and >= 0", [](TrainArgs& a) { a.epsilon = INFINITY; }},
        {"correction must be 0 or 1. Received: 2", [](TrainArgs& a) { a.correction = 2; }},
        {"nan_policy must be a valid NanPolicy. Received: 3", [](TrainArgs& a) { a.nan_policy = NanPolicy(3); }},
        {"nan_policy must be a valid NanPolicy. Received: -1", [](TrainArgs& a) { a.nan_policy = NanPolicy(-1); }},
        {"mean, variance and invstd must not be null", [](TrainArgs& a) { a.mean = nullptr; }},
        {"mean, variance and invstd must not be null", [](TrainArgs& a) { a.variance = nullptr; }},
        {"mean, variance and invstd must not be null", [](TrainArgs& a) { a.invstd = nullptr; }},
    };
    bad.insert(bad.end(), more.begin(), more.end());
    check_all<TrainArgs>(train_args, [](const TrainArgs& a) { train(a); }, bad);
}

TEST_CASE("infer throws for bad arguments") {
    auto bad = affine<InferArgs>();
    const std::vector<Bad<InferArgs>> more = {
        {"y must not be null", [](InferArgs& a) { a.y = nullptr; }},
        {"moving_mean and moving_variance must not be null", [](InferArgs& a) { a.moving_mean = {}; }},
        {"moving_mean and moving_variance must not be null", [](InferArgs& a) { a.moving_variance = {}; }},
        {"epsilon must be finite and >= 0", [](InferArgs& a) { a.epsilon = NAN; }},
    };
    bad.insert(bad.end(), more.begin(), more.end());
    check_all<InferArgs>(infer_args, [](const InferArgs& a) { infer(a); }, bad);
}

TEST_CASE("grad throws for bad arguments") {
    auto bad = affine<GradArgs>();
    const std::vector<Bad<GradArgs>> more = {
        {"dy must not be null", [](GradArgs& a) { a.dy = nullptr; }},
        {"dx must not be null", [](GradArgs& a) { a.dx = nullptr; }},
        {"mean, invstd, dgamma and dbeta must not be null", [](GradArgs& a) { a.mean = {}; }},
        {"mean, invstd, dgamma and dbeta must not be null", [](GradArgs& a) { a.invstd = {}; }},
        {"mean, invstd, dgamma and dbeta must not be null", [](GradArgs& a) { a.dgamma = {}; }},
        {"mean, invstd, dgamma and dbeta must not be null", [](GradArgs& a) { a.dbeta = {}; }},
        {"residual and y must not be given together", [](GradArgs& a) { a.residual = a.y = a.x; }},
        {"y must be null for an activation whose gradient it doesn't tell",
         [](GradArgs& a) {
             a.y = a.x;
             a.activation = Activation::silu;
         }},
        {"invstd must be float32 or float64", [](GradArgs& a) { a.invstd.dtype = DType::bfloat16; }},
        {"dvariance must be float32 or float64", [](GradArgs& a) { a.dvariance = {a.x, DType::float16}; }},
    };
    bad.insert(bad.end(), more.begin(), more.end());
    check_all<GradArgs>(grad_args, [](const GradArgs& a) { grad(a); }, bad);
}

TEST_CASE("moments throws for bad arguments") {
    auto bad = common<MomentsArgs>();
    bad.push_back({"mean and variance must not be null", [](MomentsArgs& a) { a.variance = nullptr; }});
    check_all<MomentsArgs>(moments_args, [](const MomentsArgs& a) { moments(a); }, bad);
}

TEST_CASE("shape_of merges the extents before and after the axis, and throws for an axis out of range") {
    const std::int64_t dims[] = {2, 3, 5, 7};
    const Shape s = shape_of(dims, 4, 1);
    CHECK((s.N == 2 && s.C == 3 && s.S == 35));
    const Shape last = shape_of(dims, 4, -1);
    CHECK((last.N == 30 && last.C == 7 && last.S == 1));
    for (int axis : {4, -5, 100})
        CHECK_THROWS_WITH_AS(shape_of(dims, 4, axis), doctest::Contains("axis must lie in [-4, 4)"),
                             std::invalid_argument);
    CHECK_THROWS_AS(shape_of(dims, 0, 0), std::invalid_argument);
    const std::int64_t huge[] = {std::int64_t(1) << 40, std::int64_t(1) << 40, 2, -3};
    CHECK_THROWS_WITH_AS(shape_of(huge, 3, 2), doctest::Contains("Received at axis 1: 1099511627776"),
                         std::invalid_argument);
    CHECK_THROWS_WITH_AS(shape_of(huge + 2, 2, 1), doctest::Contains("Received at axis 1: -3"), std::invalid_argument);
}

TEST_CASE("NonFiniteError names the channels, and y and the moving statistics are not written") {
    for (float bad : {NAN, INFINITY}) {
        Buffers b;
        b.x[3] = bad;  // channel 1
        TrainArgs a = train_args(b);
        a.nan_policy = NanPolicy::raise;
        try {
            train(a);
            FAIL("no error");
        } catch (const NonFiniteError& e) {
            CHECK(e.channels == std::vector<std::int64_t>{1});
            CHECK(std::string(e.what()).find("channels 1") != std::string::npos);
        }
        CHECK(b.outputs_untouched());
        a.nan_policy = NanPolicy::skip_update;
        CHECK_NOTHROW(train(a));
        CHECK(b.moving_mean[1] == untouched);
        CHECK(b.moving_variance[1] == untouched);
        CHECK(b.moving_mean[0] != untouched);
        CHECK(b.y[0] != untouched);
        a.nan_policy = NanPolicy::propagate;
        train(a);
        CHECK_FALSE(std::isfinite(b.moving_mean[1]));
    }
}

TEST_CASE("NonFiniteError lists eight channels, and how many there are") {
    CHECK(std::string(NonFiniteError({2, 5}).what()) == "x has non-finite batch statistics in channels 2, 5");
    CHECK(std::string(NonFiniteError({0, 1, 2, 3, 4, 5, 6, 7}).what()) ==
          "x has non-finite batch statistics in channels 0, 1, 2, 3, 4, 5, 6, 7");
    CHECK(std::string(NonFiniteError({0, 1, 2, 3, 4, 5, 6, 7, 9}).what()) ==
          "x has non-finite batch statistics in channels 0, 1, 2, 3, 4, 5, 6, 7, ... (9 in all)");
}

TEST_CASE("NonFiniteError leaves x unchanged in place") {
    Buffers b;
    b.x[0] = NAN;
    TrainArgs a = train_args(b);
    a.y = b.x;
    a.nan_policy = NanPolicy::raise;
    CHECK_THROWS_AS(train(a), NonFiniteError);
    CHECK((b.x[1] == 2 && b.x[2] == 3 && b.x[5] == 7));
}
