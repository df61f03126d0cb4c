// Threads: what a team owes, many host threads at once, bounded OS threads, and the floating-point mode.
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
constexpr unsigned odd_mode = 0x9f80 | 0x0040 | 0x2000;  // flush to zero, denormals are zero, round down
#endif

int os_threads() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.rfind("Threads:", 0) == 0) return std::stoi(line.substr(8));
    return 0;
}

}  // namespace

TEST_CASE("for_each runs each item once, in any team, from both ends; a step ends when all of it is done") {
    for (bool full : {true, false})
        for (int threads : {1, 2, 3, 8})
            for (std::int64_t n : {0, 1, 2, 7, 1000}) {
                set_full_team(full);
                const auto count = std::size_t(n);
                std::vector<std::atomic<int>> forward(count), backward(count);
                std::atomic<int> ranks{0}, early{0};
                parallel(threads, [&](Team& team) {
                    ranks += 1 << team.rank;
                    team.for_each(n, false, [&](std::int64_t i) { ++forward[std::size_t(i)]; });
                    for (auto& times : forward) early += times != 1;
                    team.for_each(n, true, [&](std::int64_t i) { ++backward[std::size_t(i)]; });
                    for (auto& times : backward) early += times != 1;
                });
                set_full_team(false);
                const int size = last_team_size();
                CHECK(early == 0);
                CHECK((full ? size == threads : size >= 1 && size <= threads));
                CHECK(ranks == (1 << size) - 1);  // 0, 1, ..., each once
            }
}

TEST_CASE("teams of changing size, one after the other: ranks stay below the size") {
    std::atomic<int> wrong{0}, items{0};
    for (int round = 0; round < 3000; ++round) {
        const int threads = round % 3 == 0 ? 8 : 2;
        parallel(threads, [&](Team& team) {
            if (team.rank >= team.size || team.size != threads) ++wrong;
            team.for_each(4, false, [&](std::int64_t) { ++items; });
        });
    }
    CHECK(wrong == 0);
    CHECK(items == 12000);
}

TEST_CASE("a region inside a region runs alone") {
    std::atomic<int> inner{0};
    std::atomic<bool> alone{true};
    set_full_team(true);
    parallel(3, [&](Team&) {
        parallel(3, [&](Team& team) {
            ++inner;
            if (team.size != 1) alone = false;
        });
    });
    set_full_team(false);
    CHECK(inner == 3);
    CHECK(alone);
}

TEST_CASE("the default number of threads comes back, an explicit one is honoured") {
    const int usual = get_num_threads();
    CHECK(usual >= 1);
    set_num_threads(37);
    CHECK(get_num_threads() == 37);
    set_num_threads(0);
    CHECK(get_num_threads() == usual);
}

TEST_CASE("small tensors run alone") {
    const Case c{{8, 8, 1}};
    const Inputs in(c);
    set_num_threads(4);
    run_train(c, in);
    CHECK(last_team_size() == 1);
    const Settings settings("", 4);
    run_train(c, in);
    CHECK(last_team_size() == 4);
}

TEST_CASE("many host threads at once: no deadlock, equal results") {
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

#if defined(__linux__)
// In turn, so that each finds no region running and may open one; all stay alive to the end.
TEST_CASE("OS threads are bounded by one team however many host threads call") {
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
    const int now = os_threads();
    done = true;
    for (auto& host : hosts) host.join();
    CHECK(now <= before + 8 + 4);
}

TEST_CASE("alive after fork: the child computes the same") {
    const Case c{{500, 40, 1}};
    const Inputs in(c);
    const Settings settings("", 4);
    const Forward here = run_train(c, in);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);  // a hang ends by signal
        _exit(run_train(c, in).same_bits(here) ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(run_train(c, in).same_bits(here));
    CHECK(last_team_size() == 4);
}
#endif

#if defined(__x86_64__)
// A new thread starts with its creator's mode, so the team is made (larger than any before) under the odd one.
TEST_CASE("workers round to nearest and keep denormals, whoever made them") {
    const unsigned usual = fp_mode();
    std::atomic<int> wrong{0};
    set_full_team(true);
    set_fp_mode(odd_mode);
    parallel(11, [&](Team& team) {
        if (team.rank > 0 && (fp_mode() & 0xffc0) != 0x1f80) ++wrong;
    });
    const unsigned after = fp_mode();
    set_fp_mode(usual);
    set_full_team(false);
    CHECK(last_team_size() == 11);
    CHECK(wrong == 0);
    CHECK((after & 0xffc0) == (odd_mode & 0xffc0));
}

TEST_CASE("a caller that flushes denormals and rounds down gets the same bits, and its mode back") {
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
                const unsigned usual = fp_mode();
                set_fp_mode(odd_mode);
                const Forward odd_forward = run_train(c, in);
                const Backward odd_backward = run_grad(c, in, forward);
                const unsigned after = fp_mode();
                set_fp_mode(usual);
                CHECK((after & 0xffc0) == (odd_mode & 0xffc0));
                CHECK(odd_forward.same_bits(forward));
                CHECK(odd_backward.same_bits(backward));
            }
}
#endif
