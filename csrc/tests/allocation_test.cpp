// Every allocation of every function of the core fails once, and all from the k-th on: std::bad_alloc or the right
// bits, nothing else; then the same call succeeds with the right bits, and no block is lost. Each sweep runs in a child
// process of its own, so that a first call (statics, threads, the thread's state) is swept too, and an abort is seen.
// Runs with failing_malloc.cpp in place of the C library's allocator.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "bnfast/bnfast.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

extern "C" {
void __gcov_dump() __attribute__((weak));  // the counts of a coverage build, which _exit would lose
void failing_malloc_arm(long k, int all);
long failing_malloc_disarm();
long failing_malloc_failed();
long failing_malloc_live();
}

using namespace bnfast;

namespace {

constexpr std::int64_t N = 300, C = 24, M = N * C;

// One call: `run` does nothing but the call, into `out`.
struct Call {
    std::string name;
    std::function<void()> run;
};

struct Data {
    std::vector<float> x = std::vector<float>(M), dy = x, residual = x, y = x, dx = x, dresidual = x;
    std::vector<float> gamma = std::vector<float>(C, 2), beta = std::vector<float>(C, 1),
                       mask = std::vector<float>(N, 1);
    std::vector<double> mean = std::vector<double>(M), variance = mean, invstd = mean, moving = mean, dgamma = mean,
                        dbeta = mean;
    Data() {
        for (std::int64_t i = 0; i < M; ++i) {
            x[std::size_t(i)] = float((i * 37 % 101) - 50) / 7;
            dy[std::size_t(i)] = float((i * 53 % 103) - 51) / 9;
            residual[std::size_t(i)] = float((i * 29 % 97) - 48) / 11;
        }
        mask[5] = 0;
        reset();
    }
    void reset() {
        for (auto* v : {&y, &dx, &dresidual}) v->assign(v->size(), 0);
        for (auto* v : {&mean, &variance, &invstd, &dgamma, &dbeta}) v->assign(v->size(), 0.5);
        moving.assign(moving.size(), 1);
    }
    // All results as bytes, into memory that exists.
    std::size_t bytes() const { return 3 * M * sizeof(float) + 6 * M * sizeof(double); }
    void copy_to(unsigned char* to) const {
        for (const auto* v : {&y, &dx, &dresidual}) {
            std::memcpy(to, v->data(), M * sizeof(float));
            to += M * sizeof(float);
        }
        for (const auto* v : {&mean, &variance, &invstd, &moving, &dgamma, &dbeta}) {
            std::memcpy(to, v->data(), M * sizeof(double));
            to += M * sizeof(double);
        }
    }
};

template <class Args> void common(Args& a, Data& d) {
    a.x = d.x.data();
    a.gamma = {d.gamma.data(), DType::float32};
    a.beta = {d.beta.data(), DType::float32};
}

// Shapes of every layout: columns, rows, packed short rows.
void add_batch_norm(std::vector<Call>& calls, Data& d) {
    for (const Shape shape : {Shape{N, C, 1}, Shape{3, C, 100}, Shape{M / 9, 3, 3}}) {
        const std::string text =
            " (" + std::to_string(shape.N) + ", " + std::to_string(shape.C) + ", " + std::to_string(shape.S) + ")";
        TrainArgs t;
        common(t, d);
        t.shape = shape;
        t.y = d.y.data();
        t.residual = d.residual.data();
        t.activation = Activation::relu;
        t.moving_mean = {d.moving.data(), DType::float64};
        t.moving_variance = {d.moving.data() + M / 2, DType::float64};
        t.mean = d.mean.data();
        t.variance = d.variance.data();
        t.invstd = d.invstd.data();
        calls.push_back({"train" + text, [t] { train(t); }});
        if (shape.N * shape.S <= N) {
            t.mask = d.mask.data();
            calls.push_back({"train masked" + text, [t] { train(t); }});
        }
        InferArgs i;
        common(i, d);
        i.shape = shape;
        i.y = d.y.data();
        i.moving_mean = i.moving_variance = {d.gamma.data(), DType::float32};
        i.activation = Activation::silu;
        calls.push_back({"infer" + text, [i] { infer(i); }});
        GradArgs g;
        common(g, d);
        g.shape = shape;
        g.dy = d.dy.data();
        g.dx = d.dx.data();
        g.mean = g.invstd = {d.gamma.data(), DType::float32};
        g.activation = Activation::relu;
        g.residual = d.residual.data();
        g.dresidual = d.dresidual.data();
        g.dgamma = {d.dgamma.data(), DType::float64};
        g.dbeta = {d.dbeta.data(), DType::float64};
        calls.push_back({"grad" + text, [g] { grad(g); }});
        MomentsArgs m;
        m.x = d.x.data();
        m.shape = shape;
        m.mean = d.mean.data();
        m.variance = d.variance.data();
        calls.push_back({"moments" + text, [m] { moments(m); }});
    }
}

void add_group_norm(std::vector<Call>& calls, Data& d) {
    for (const GroupShape shape : {GroupShape{N / 4, 1, C, 4, 6}, GroupShape{N / 4, 4, C, 1, 6},
                                   GroupShape{N, 1, C, 1, 1}, GroupShape{2, 1, C, N / 2, C}}) {
        const std::string text = " of " + std::to_string(shape.G) + " groups, A = " + std::to_string(shape.A);
        GroupNormArgs f;
        common(f, d);
        f.shape = shape;
        f.y = d.y.data();
        f.activation = Activation::relu;
        f.residual = d.residual.data();
        f.mean = d.mean.data();
        f.invstd = d.invstd.data();
        calls.push_back({"group_norm" + text, [f] { group_norm(f); }});
        GroupNormGradArgs g;
        common(g, d);
        g.shape = shape;
        g.dy = d.dy.data();
        g.dx = d.dx.data();
        g.mean = g.invstd = d.moving.data();
        g.activation = Activation::relu;
        g.residual = d.residual.data();
        g.dresidual = d.dresidual.data();
        g.dgamma = {d.dgamma.data(), DType::float64};
        g.dbeta = {d.dbeta.data(), DType::float64};
        calls.push_back({"group_norm_grad" + text, [g] { group_norm_grad(g); }});
    }
}

// Errors leave the pool as it was: what was acquired is released.
struct Held {
    void* const block;
    explicit Held(std::size_t bytes) : block(acquire_block(bytes)) {}
    Held(const Held&) = delete;
    ~Held() { release_block(block); }
};

std::vector<Call> calls_of(Data& d) {
    std::vector<Call> calls;
    add_batch_norm(calls, d);
    add_group_norm(calls, d);
    calls.push_back({"blocks", [&d] {
                         const Held a(1000), b(1000), c(3 << 20), e(3 << 20);
                         d.y[0] = float(a.block != b.block && c.block != e.block);
                     }});
    calls.push_back({"the limit", [&d] {
                         release_block(acquire_block(100000));
                         set_memory_limit(1000);
                         release_block(acquire_block(100000));
                         set_memory_limit(1 << 20);
                         d.y[0] = float(memory_statistics().held_bytes);
                     }});
    return calls;
}

enum Status { fine, another_exception, wrong_bits, leak, no_end, more_to_come };

bool right_bits(const Call& call, Data& d) {
    std::vector<unsigned char> expected(d.bytes()), result(d.bytes());
    const auto run = [&](std::vector<unsigned char>& into) {
        d.reset();
        call.run();
        d.copy_to(into.data());
    };
    run(result);
    const int threads = get_num_threads();
    set_num_threads(1);
    run(expected);
    set_num_threads(threads);
    return result == expected;
}

// One attempt with the k-th allocation failing. fine: it had fewer than k.
Status attempt(const Call& call, long k, bool all) {
    bool another = false;
    failing_malloc_arm(k, all);
    try {
        call.run();
    } catch (const std::bad_alloc&) {
    } catch (...) {
        another = true;
    }
    const long seen = failing_malloc_disarm();
    return another ? another_exception : seen < k ? fine : more_to_come;
}

// Every k of a call that was made before.
Status sweep(const Call& call, Data& d, bool all) {
    call.run();
    call.run();
    const long before = failing_malloc_live();
    for (long k = 1; k < 1000; ++k) {
        d.reset();
        const Status status = attempt(call, k, all);
        if (failing_malloc_live() > before) return leak;
        if (status == another_exception) return status;
        if (!right_bits(call, d)) return wrong_bits;
        call.run();
        if (status == fine) return fine;
    }
    return no_end;
}

// In a child: its exit status, or minus the signal that ended it.
int in_child(const std::function<int()>& f) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        const int status = f();
        if (__gcov_dump) __gcov_dump();
        _exit(status);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

}  // namespace

TEST_CASE("an allocation that fails, alone or with all that follow, is std::bad_alloc and costs nothing else") {
    Data d;
    for (const Call& call : calls_of(d))
        for (const bool all : {false, true})
            for (const int threads : {1, 3}) {
                INFO(call.name << ", all " << all << ", threads " << threads);
                const auto in_new_process = [&](const std::function<int()>& f) {
                    return in_child([&] {
                        set_num_threads(threads);
                        set_serial_bytes(0);
                        return f();
                    });
                };
                CHECK(in_new_process([&] { return sweep(call, d, all); }) == fine);
                // First calls: statics, threads and the thread's own state, each in a process that has none. They have
                // some 200 allocations, nearly all of which read the machine: one call of each kind is enough.
                const bool one_of_a_kind = call.name == "train (300, 24, 1)" || call.name == "blocks" ||
                                           call.name == "group_norm_grad of 6 groups, A = 1";
                if (threads == 1 || !one_of_a_kind) continue;
                int status = more_to_come, k = 0;
                while (status == more_to_come && ++k < 1000)
                    status = in_new_process([&] {
                        const Status made = attempt(call, k, all);
                        return right_bits(call, d) ? made : wrong_bits;
                    });
                INFO("first call, allocation " << k);
                CHECK(status == fine);
                CHECK(k > 2);
            }
}

TEST_CASE("the message of a non-finite channel may find no memory either") {
    CHECK(in_child([] {
              Data d;
              d.x[7] = std::numeric_limits<float>::quiet_NaN();
              TrainArgs t;
              common(t, d);
              t.shape = {N, C, 1};
              t.y = d.y.data();
              t.mean = d.mean.data();
              t.variance = d.variance.data();
              t.invstd = d.invstd.data();
              t.nan_policy = NanPolicy::raise;
              for (int k = 1, out_of_memory = 0; k < 1000; ++k) {
                  failing_malloc_arm(k, true);
                  try {
                      train(t);
                  } catch (const std::bad_alloc&) {
                      ++out_of_memory;
                  } catch (const NonFiniteError& error) {
                      failing_malloc_disarm();
                      return out_of_memory > 0 && error.channels == std::vector<std::int64_t>{7} ? 0 : 1;
                  }
                  failing_malloc_disarm();
              }
              return 2;
          }) == 0);
}

TEST_CASE("a failing allocation is seen at all") {
    failing_malloc_arm(1, false);
    void* const none = ::operator new(10, std::nothrow);
    const long seen = failing_malloc_disarm();
    CHECK(none == nullptr);
    CHECK(seen >= 1);  // its exception is allocated too
    CHECK(failing_malloc_failed() == 1);
}
