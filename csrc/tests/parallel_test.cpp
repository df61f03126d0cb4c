// Threads: the guarantees of a team, concurrent host threads, bounded OS threads, fork, and the floating-point mode.
#include <dlfcn.h>
#include <doctest/doctest.h>

#include <atomic>
#include <fstream>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "cases.h"
#include "cpu/parallel.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

#if defined(__x86_64__)
constexpr unsigned unusual_mode = 0x9f80 | 0x0040 | 0x2000;  // flush to zero, denormals are zero, round down
#endif

int os_threads() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.rfind("Threads:", 0) == 0) return std::stoi(line.substr(8));
    return 0;
}

}  // namespace

TEST_CASE("for_each runs each item once for every team size, in both orders, and returns when all items are done") {
    for (bool full : {true, false})
        for (int threads : {1, 2, 3, 8})
            for (std::int64_t n : {0, 1, 2, 7, 1000}) {
                set_full_team(full);
                const auto count = std::size_t(n);
                std::vector<std::atomic<int>> forward(count), backward(count);
                std::atomic<int> ranks{0}, not_done{0};
                parallel(threads, [&](Team& team) {
                    ranks += 1 << team.rank;
                    team.for_each(n, false, [&](std::int64_t i) { ++forward[std::size_t(i)]; });
                    for (auto& times : forward) not_done += times != 1;
                    team.for_each(n, true, [&](std::int64_t i) { ++backward[std::size_t(i)]; });
                    for (auto& times : backward) not_done += times != 1;
                });
                set_full_team(false);
                const int size = last_team_size();
                CHECK(not_done == 0);
                CHECK((full ? size == threads : size >= 1 && size <= threads));
                CHECK(ranks == (1 << size) - 1);  // 0, 1, ..., each once
            }
}

// A worker that finds the team of two complete may next read the size of the job after it, of eight. More threads than
// processors and short jobs make that likely: a worker that went on without having joined was seen in 1 of 10 runs
// under ThreadSanitizer.
TEST_CASE("who has not joined a job takes no part in it, when consecutive teams differ in size") {
    std::atomic<int> wrong{0}, items{0}, calls{0};
    int members = 0;
    for (int round = 0; round < 20000; ++round) {
        const int threads = round % 3 == 0 ? 8 : 2;
        parallel(threads, [&](Team& team) {
            ++calls;
            if (team.rank >= team.size || team.size != threads) ++wrong;
            team.for_each(4, false, [&](std::int64_t) { ++items; });
        });
        members += last_team_size();
    }
    CHECK(wrong == 0);
    CHECK(items == 80000);
    CHECK(calls == members);
}

namespace lender {

int most = 0;  // threads that omp_get_max_threads tells
std::atomic<int> runs{0}, asked{0};
int made = 0;  // threads that really take part: fewer in a nested region

// As GOMP_parallel: the caller is one of the threads, and all have returned at the end.
void run(void (*body)(void*), void* context, unsigned threads, unsigned) {
    ++runs;
    asked = int(threads);
    std::vector<std::thread> others;
    for (int i = 1; i < made; ++i) others.emplace_back(body, context);
    body(context);
    for (auto& other : others) other.join();
}
const OpenmpLibrary library{run, [] { return most; }};

}  // namespace lender

TEST_CASE("in a scope of borrowed threads a job runs on the library's, each item once, if it lends enough") {
    for (const int threads : {1, 2, 3, 8})
        for (const int most : {1, 3, 8})
            for (const int made : {1, most}) {  // one: the caller is inside a region of the library
                lender::most = most;
                lender::made = made;
                lender::runs = 0;
                constexpr std::size_t n = 1000;
                std::vector<std::atomic<int>> times(n);
                std::atomic<int> ranks{0};
                {
                    const BorrowedThreads scope(&lender::library);
                    parallel(threads, [&](Team& team) {
                        ranks += 1 << team.rank;
                        for (const bool backwards : {false, true})
                            team.for_each(n, backwards, [&](std::int64_t i) { ++times[std::size_t(i)]; });
                    });
                }
                const bool lends = threads > 1 && threads <= most;
                CHECK(lender::runs == (lends ? 1 : 0));
                if (lends) CHECK(lender::asked == most);  // always as many, or the library would end the others
                if (lends) CHECK(last_team_size() == std::min(threads, made));
                CHECK(ranks == (1 << last_team_size()) - 1);
                for (auto& each : times) REQUIRE(each == 2);
            }
    lender::runs = 0;
    parallel(2, [](Team&) {});
    CHECK(lender::runs == 0);  // the scope is over
    const BorrowedThreads nobody(nullptr);
    parallel(2, [](Team&) {});
    CHECK(lender::runs == 0);
}

TEST_CASE("a nested region runs on one thread") {
    std::atomic<int> inner{0};
    std::atomic<bool> one_thread{true};
    set_full_team(true);
    parallel(3, [&](Team&) {
        parallel(3, [&](Team& team) {
            ++inner;
            if (team.size != 1) one_thread = false;
        });
    });
    set_full_team(false);
    CHECK(inner == 3);
    CHECK(one_thread);
}

TEST_CASE("a thread that has run no job yet says one member") {
    int size = 0;
    std::thread([&] { size = last_team_size(); }).join();
    CHECK(size == 1);
}

TEST_CASE("set_num_threads sets the number of threads, and 0 restores the default") {
    const int default_threads = get_num_threads();
    CHECK(default_threads >= 1);
    set_num_threads(37);
    CHECK(get_num_threads() == 37);
    set_num_threads(0);
    CHECK(get_num_threads() == default_threads);
}

TEST_CASE("the engine says who makes the threads") {
    const std::string engine = parallel_engine();
    CHECK((engine == "own threads" || engine.rfind("OpenMP 20", 0) == 0));
}

TEST_CASE("small tensors run on one thread") {
    const Case c{{8, 8, 1}};
    const Inputs in(c);
    set_num_threads(4);
    run_train(c, in);
    CHECK(last_team_size() == 1);
    const Settings settings("", 4);
    run_train(c, in);
    CHECK(last_team_size() == 4);
}

TEST_CASE("concurrent host threads get equal results without deadlock") {
    const Case c{{500, 40, 1}, DType::float32, Activation::relu, true, false, false};
    const Inputs in(c);
    const Settings settings("", 4);
    set_full_team(false);
    const Forward forward = run_train(c, in);
    const Backward backward = run_grad(c, in, forward);
    std::atomic<int> wrong{0}, oversized{0};
    std::vector<std::thread> hosts;
    for (int t = 0; t < 12; ++t)
        hosts.emplace_back([&] {
            for (int i = 0; i < 25; ++i) {
                if (!run_train(c, in).same_bits(forward)) ++wrong;
                if (last_team_size() > 4) ++oversized;
                if (!run_grad(c, in, forward).same_bits(backward)) ++wrong;
            }
        });
    for (auto& host : hosts) host.join();
    CHECK(wrong == 0);
    CHECK(oversized == 0);
}

TEST_CASE("a library without OpenMP's functions lends no threads") {
    OpenmpLibrary found{};
    void* const libc = dlopen("libc.so.6", RTLD_NOW | RTLD_NOLOAD);
    if (libc) CHECK(!find_openmp(libc, found));
}

TEST_CASE("borrowed threads compute the same bits") {
    const Case c{{500, 40, 1}, DType::float32, Activation::relu, true, false, false};
    const Inputs in(c);
    const Settings settings("", 4);
    const Forward forward = run_train(c, in);
    const Backward backward = run_grad(c, in, forward);
    lender::most = lender::made = 4;
    lender::runs = 0;
    const BorrowedThreads scope(&lender::library);
    CHECK(run_train(c, in).same_bits(forward));
    CHECK(run_grad(c, in, forward).same_bits(backward));
    CHECK(lender::runs == 2);
}

#if defined(__linux__)
// The host threads run one after the other, so that each finds no region running and may start one. All stay alive to
// the end.
TEST_CASE("many host threads share one team, so that OS threads stay bounded") {
    const Case c{{64, 16, 1}};
    const Inputs in(c);
    const Settings settings("", 4);
    run_train(c, in);
    const int before = os_threads();
    std::atomic<int> turn{0};
    std::atomic<bool> done{false};
    std::vector<std::thread> hosts;
    for (int t = 0; t < 8; ++t)
        hosts.emplace_back([&, t] {
            while (turn != t) std::this_thread::yield();
            run_train(c, in);
            ++turn;
            while (!done) std::this_thread::yield();
        });
    while (turn != 8) std::this_thread::yield();
    const int during = os_threads();
    done = true;
    for (auto& host : hosts) host.join();
    CHECK(during <= before + 8 + 4);
}

TEST_CASE("after fork, child and parent still compute the same bits, and the child borrows no threads") {
    const Case c{{500, 40, 1}};
    const Inputs in(c);
    const Settings settings("", 4);
    const Forward expected = run_train(c, in);
    lender::most = lender::made = 4;
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);  // a signal ends a hang
        lender::runs = 0;
        const BorrowedThreads scope(&lender::library);  // whose threads the child hasn't got
        _exit(run_train(c, in).same_bits(expected) && lender::runs == 0 ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(run_train(c, in).same_bits(expected));
    CHECK(last_team_size() == 4);
}
#endif

#if defined(__x86_64__)
// A new thread inherits its creator's mode. The team is larger than any before, so that its threads are created while
// the mode is unusual.
TEST_CASE("workers round to nearest and keep denormals regardless of their creator's mode") {
    const unsigned mode_before = fp_mode();
    std::atomic<int> wrong{0};
    set_full_team(true);
    set_fp_mode(unusual_mode);
    parallel(11, [&](Team& team) {
        if (team.rank > 0 && (fp_mode() & 0xffc0) != 0x1f80) ++wrong;
    });
    const unsigned mode_after = fp_mode();
    set_fp_mode(mode_before);
    set_full_team(false);
    CHECK(last_team_size() == 11);
    CHECK(wrong == 0);
    CHECK((mode_after & 0xffc0) == (unusual_mode & 0xffc0));
}

TEST_CASE("a caller with flush-to-zero and rounding down gets the same bits, and keeps its mode") {
    for (DType dtype : {DType::float32, DType::float64})
        for (Shape shape : {Shape{100, 5, 1}, Shape{70, 70, 1}, Shape{3, 4, 100}})
            for (int threads : {1, 3}) {
                Case c{shape, dtype, Activation::relu, true, true, true};
                Inputs in(c);
                const double tiny = dtype == DType::float64 ? 1e-310 : 1e-40;
                for (std::int64_t i = 0; i < in.x.size; ++i) {
                    in.x.set(i, in.x.get(i) * tiny);
                    in.residual.set(i, 0);
                    in.dy.set(i, in.dy.get(i) * tiny);
                }
                for (std::int64_t k = 0; k < shape.C; ++k) {
                    in.beta.set(k, k % 2 ? tiny : -tiny);
                    in.gamma.set(k, tiny);
                }
                INFO(c.text() << " threads " << threads);
                const Settings settings("", threads);
                const Forward forward = run_train(c, in);
                const Backward backward = run_grad(c, in, forward);
                const unsigned mode_before = fp_mode();
                set_fp_mode(unusual_mode);
                const Forward unusual_forward = run_train(c, in);
                const Backward unusual_backward = run_grad(c, in, forward);
                const unsigned mode_after = fp_mode();
                set_fp_mode(mode_before);
                CHECK((mode_after & 0xffc0) == (unusual_mode & 0xffc0));
                CHECK(unusual_forward.same_bits(forward));
                CHECK(unusual_backward.same_bits(backward));
            }
}
#endif
