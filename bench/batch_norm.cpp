// One benchmark per shape, layout, operation, dtype and thread count. Each iteration times, one after the other: a copy
// (train, infer) or triad (grad) with cached stores, the same with non-temporal stores, oneDNN (float32 only) and
// bnfast. All run on warm, preallocated memory, and each starts with idle threads. The counters are medians over
// iterations; a ratio is taken within one iteration:
//   GB/s      minimal memory traffic (train, infer: 2 tensors; grad: 3) / bnfast's time
//   limit     bnfast's time / time of the faster copy or triad
//   passes    train and grad: bnfast's time / (time to read x (and dy) + time of the faster copy or triad). 1 is the
//             limit of two passes over memory: statistics first, then output, with nothing kept in cache between them
//   onednn    oneDNN's time / bnfast's time
//   plain     with a smooth activation (float32, all threads): bnfast's time / its time without one
// Before timing, float32 results are checked against float64 sums computed here.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <functional>
#include <memory>
#include <random>
#include <thread>

#include "bnfast/bnfast.h"
#include "cpu/plan.h"
#include "shapes.h"
#include "yardstick.h"
#if defined(BNFAST_WITH_ONEDNN)
#include "onednn.h"
#endif

namespace {

using std::int64_t;

struct Case {
    NamedShape shape;
    bool channels_last;
    bnfast::Op op;
    bnfast::DType dtype;
    int threads;
    bnfast::Activation activation = bnfast::Activation::none;
};

struct Aligned {
    explicit Aligned(std::size_t bytes)
        : data(static_cast<char*>(aligned_alloc(2 << 20, (bytes + (2 << 20)) >> 21 << 21))) {
        std::memset(data.get(), 0, bytes);
    }
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> data;
    template <class T> T* as() { return reinterpret_cast<T*>(data.get()); }
};

double now() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Waits until no thread of this process spins. libgomp's workers spin for about 10 ms after each region and would take
// a processor from the next measurement.
void wait_until_idle() {
    double used = double(std::clock());
    for (int i = 0; i < 10; ++i) {
        // CPU time advances in ticks of 4 ms; 9 ms contain at least two.
        std::this_thread::sleep_for(std::chrono::milliseconds(9));
        const double now_used = double(std::clock());
        if (now_used - used < 1e-3 * CLOCKS_PER_SEC) return;
        used = now_used;
    }
}

// The time per call with an awake team: wait until idle, warm up with 2 ms of calls (a sleeping processor takes that
// long to reach full speed), then take the mean over 4 ms of calls, or the time of one longer call.
double milliseconds(const std::function<void()>& f) {
    wait_until_idle();
    for (const double begin = now(); now() - begin < 2;) f();
    const double begin = now();
    int calls = 0;
    for (; now() - begin < 4; ++calls) f();
    return (now() - begin) / calls;
}

double median(std::vector<double> v) {
    std::nth_element(v.begin(), v.begin() + long(v.size() / 2), v.end());
    return v[v.size() / 2];
}

std::uint16_t to_bfloat16(float f) {
    std::uint32_t b;
    std::memcpy(&b, &f, 4);
    return std::uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

class Bench {
public:
    explicit Bench(const Case& c)
        : case_(c),
          shape_(c.channels_last ? bnfast::Shape{c.shape.N * c.shape.spatial, c.shape.C, 1}
                                 : bnfast::Shape{c.shape.N, c.shape.C, c.shape.spatial}),
          bytes_(shape_.size() * bnfast::item_bytes(c.dtype)),
          x_(bytes_),
          dy_(bytes_),
          y_(bytes_),
          gamma_(shape_.C, 1.f),
          beta_(shape_.C, 0.5f),
          statistics_(5 * shape_.C) {
        std::mt19937 random(7);
        std::normal_distribution<float> normal(3.f, 2.f);
        for (int64_t i = 0; i < shape_.size(); ++i) {
            put(x_, i, normal(random));
            put(dy_, i, normal(random) - 3.f);
        }
        bnfast::set_num_threads(c.threads);
        omp_set_num_threads(c.threads);
#if defined(BNFAST_WITH_ONEDNN)
        if (c.dtype == bnfast::DType::float32) {
            onednn_ = std::make_unique<OneDnn>(c.shape.N, c.shape.C, c.shape.spatial, c.channels_last, x_.as<float>(),
                                               dy_.as<float>(), y_.as<float>(), y_.as<float>());
            onednn_->train();
        }
#endif
        train();
        check();
        activation_ = c.activation;
    }

    void ours() { case_.op == bnfast::Op::train ? train() : case_.op == bnfast::Op::infer ? infer() : grad(); }
    void plain() {
        activation_ = bnfast::Activation::none;
        ours();
        activation_ = case_.activation;
    }
    double limit(bool stream) {
        char *y = y_.as<char>(), *x = x_.as<char>(), *dy = dy_.as<char>();
        const int t = case_.threads;
        if (case_.op == bnfast::Op::grad)
            return milliseconds([&] {
                stream ? yardstick::triad<true>(y, x, dy, bytes_, t) : yardstick::triad<false>(y, x, dy, bytes_, t);
            });
        return milliseconds(
            [&] { stream ? yardstick::copy<true>(y, x, bytes_, t) : yardstick::copy<false>(y, x, bytes_, t); });
    }
    double reads() {
        const char* const dy = case_.op == bnfast::Op::grad ? dy_.as<char>() : nullptr;
        return milliseconds(
            [&] { benchmark::DoNotOptimize(yardstick::read(x_.as<char>(), dy, bytes_, case_.threads)); });
    }
    bool has_onednn() const {
#if defined(BNFAST_WITH_ONEDNN)
        return onednn_ != nullptr;
#else
        return false;
#endif
    }
    void onednn() {
#if defined(BNFAST_WITH_ONEDNN)
        case_.op == bnfast::Op::train   ? onednn_->train()
        : case_.op == bnfast::Op::infer ? onednn_->infer()
                                        : onednn_->grad();
#endif
    }
    double gigabytes() const { return double(bytes_) * (case_.op == bnfast::Op::grad ? 3 : 2) / 1e9; }
    int64_t bytes() const { return bytes_; }

private:
    void put(Aligned& a, int64_t i, float v) {
        switch (case_.dtype) {
            case bnfast::DType::float32: a.as<float>()[i] = v; break;
            case bnfast::DType::float64: a.as<double>()[i] = v; break;
            case bnfast::DType::bfloat16: a.as<std::uint16_t>()[i] = to_bfloat16(v); break;
            case bnfast::DType::float16: a.as<std::uint16_t>()[i] = std::uint16_t(0x3c00 + (i * 37 & 0x3ff)); break;
        }
    }
    double* statistic(int i) { return statistics_.data() + i * shape_.C; }
    template <class Args> Args forward() {  // the arguments common to train and infer
        Args a;
        a.x = x_.data.get();
        a.y = y_.data.get();
        a.shape = shape_;
        a.dtype = case_.dtype;
        a.gamma.data = gamma_.data();
        a.beta.data = beta_.data();
        a.activation = activation_;
        return a;
    }
    void train() {
        auto a = forward<bnfast::TrainArgs>();
        a.mean = statistic(0);
        a.variance = statistic(1);
        a.invstd = statistic(2);
        bnfast::train(a);
    }
    void infer() {
        auto a = forward<bnfast::InferArgs>();
        a.moving_mean = {statistic(0), bnfast::DType::float64};
        a.moving_variance = {statistic(1), bnfast::DType::float64};
        bnfast::infer(a);
    }
    void grad() {
        bnfast::GradArgs a;
        a.x = x_.data.get();
        a.dy = dy_.data.get();
        a.dx = y_.data.get();
        a.shape = shape_;
        a.dtype = case_.dtype;
        a.gamma.data = gamma_.data();
        a.beta.data = beta_.data();
        a.activation = activation_;
        a.mean = {statistic(0), bnfast::DType::float64};
        a.invstd = {statistic(2), bnfast::DType::float64};
        a.dgamma = {statistic(3), bnfast::DType::float64};
        a.dbeta = {statistic(4), bnfast::DType::float64};
        bnfast::grad(a);
    }
    void check() {  // variance, y and dx of the first channel against float64 sums
        if (case_.dtype != bnfast::DType::float32) return;
        const float *x = x_.as<float>(), *dy = dy_.as<float>(), *y = y_.as<float>();
        double sum = 0, sum2 = 0, sum_dy = 0, sum_dy_xhat = 0;
        const double M = double(shape_.per_channel());
        auto each = [&](auto f) {
            for (int64_t n = 0; n < shape_.N; ++n)
                for (int64_t s = 0; s < shape_.S; ++s) f(n * shape_.C * shape_.S + s);
        };
        each([&](int64_t i) { sum += x[i]; });
        each([&](int64_t i) { sum2 += (x[i] - sum / M) * (x[i] - sum / M); });
        const double mean = sum / M, invstd = 1 / std::sqrt(sum2 / M + 1e-3);
        double worst = std::abs(statistic(1)[0] * M / sum2 - 1);
        each([&](int64_t i) { worst = std::max(worst, std::abs(y[i] - ((x[i] - mean) * invstd + 0.5))); });
        each([&](int64_t i) {
            sum_dy += dy[i];
            sum_dy_xhat += dy[i] * (x[i] - mean) * invstd;
        });
        grad();
        each([&](int64_t i) {
            const double xhat = (x[i] - mean) * invstd;
            worst = std::max(worst, std::abs(y[i] - invstd * (dy[i] - sum_dy / M - xhat * sum_dy_xhat / M)));
        });
        if (!(worst < 1e-4)) throw std::runtime_error("wrong result: " + std::to_string(worst));
    }

    Case case_;
    bnfast::Activation activation_ = bnfast::Activation::none;  // of the next call
    bnfast::Shape shape_;
    int64_t bytes_;
    Aligned x_, dy_, y_;
    std::vector<float> gamma_, beta_;
    std::vector<double> statistics_;
#if defined(BNFAST_WITH_ONEDNN)
    std::unique_ptr<OneDnn> onednn_;
#endif
};

void run(benchmark::State& state, const Case& c) {
    Bench bench(c);
    std::vector<double> ours, limit, peer, to_limit, to_peer, to_passes, to_plain;
    const bool reduces = c.op != bnfast::Op::infer;
    for (int i = 0; i < 3; ++i) bench.ours();
    for (auto _ : state) {
        const double cached = bench.limit(false), streamed = bench.limit(true);
        const double reads = reduces ? bench.reads() : 0;
        limit.push_back(std::min(cached, streamed));
        if (bench.has_onednn()) peer.push_back(milliseconds([&] { bench.onednn(); }));
        ours.push_back(milliseconds([&] { bench.ours(); }));
        if (c.activation != bnfast::Activation::none)
            to_plain.push_back(ours.back() / milliseconds([&] { bench.plain(); }));
        to_limit.push_back(ours.back() / limit.back());
        to_passes.push_back(ours.back() / (limit.back() + reads));
        if (bench.has_onednn()) to_peer.push_back(peer.back() / ours.back());
        state.SetIterationTime(ours.back() / 1e3);
    }
    state.counters["MB"] = double(bench.bytes()) / 1e6;
    state.counters["ms"] = median(ours);
    state.counters["GB/s"] = bench.gigabytes() / median(ours) * 1e3;
    state.counters["limit"] = median(to_limit);
    if (reduces) state.counters["passes"] = median(to_passes);
    if (!to_peer.empty()) state.counters["onednn"] = median(to_peer);
    if (!to_plain.empty()) state.counters["plain"] = median(to_plain);
}

void add(const std::string& name, const Case& c) {
    benchmark::RegisterBenchmark(name.c_str(), [c](benchmark::State& s) { run(s, c); })
        ->Iterations(9)  // medians over nine rounds, each with 4 ms of calls per measurement
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
    static const char* const op_names[] = {"train", "infer", "grad"};
    static const char* const dtype_names[] = {"float32", "float64", "float16", "bfloat16"};
    const std::pair<const char*, bnfast::Activation> smooth[] = {{"silu", bnfast::Activation::silu},
                                                                 {"hard_silu", bnfast::Activation::hard_silu},
                                                                 {"tanh", bnfast::Activation::tanh},
                                                                 {"gelu", bnfast::Activation::gelu}};
    const int max_threads = bnfast::get_num_threads();
    for (const NamedShape& shape : read_shapes(BNFAST_SHAPES))
        for (const bool last : {false, true})
            for (const int op : {0, 1, 2})
                for (const int dtype : {0, 1, 2, 3})
                    for (int threads = max_threads; threads >= 1; threads = threads > 1 ? 1 : 0) {
                        if (!last && shape.spatial == 1) continue;
                        const std::string name = shape.set + "/" + shape.name + "/" +
                                                 (last ? "channels_last" : "channels_first") + "/" + op_names[op] +
                                                 "/" + dtype_names[dtype] + "/threads:" + std::to_string(threads);
                        const Case c{shape, last, bnfast::Op(op), bnfast::DType(dtype), threads};
                        add(name, c);
                        if (c.dtype != bnfast::DType::float32 || threads < max_threads) continue;
                        for (const auto& [word, activation] : smooth) {
                            Case with = c;
                            with.activation = activation;
                            add(name + "/" + word, with);
                        }
                    }
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
    return 0;
}
