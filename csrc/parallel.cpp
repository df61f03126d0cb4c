#include "parallel.h"

#include <omp.h>

#include <algorithm>
#include <string>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "machine.h"

namespace bnfast {

unsigned fp_mode() {
#if defined(__x86_64__)
    return _mm_getcsr();
#elif defined(__aarch64__)
    std::uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return unsigned(mode);
#else
    return 0;
#endif
}

void set_fp_mode(unsigned mode) {
#if defined(__x86_64__)
    _mm_setcsr(mode);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(std::uint64_t(mode)));
#else
    (void)mode;
#endif
}

namespace {

#if defined(__x86_64__)
constexpr unsigned ieee_mode = 0x1f80;  // every exception masked, to nearest, denormals kept
#else
constexpr unsigned ieee_mode = 0;
#endif

struct IeeeMode {
    const unsigned saved = fp_mode();
    IeeeMode() { if (saved != ieee_mode) set_fp_mode(ieee_mode); }
    ~IeeeMode() { if (saved != ieee_mode) set_fp_mode(saved); }
};

std::atomic<int> requested{0};  // 0: the machine's default
std::atomic<bool> busy{false};  // a region is running
bool forked = false;            // libgomp's workers don't survive fork: a child runs alone
thread_local int team_size_seen = 1;

#if defined(__linux__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    busy.store(false);
});
#endif

}  // namespace

int get_num_threads() {
    const int n = requested.load(std::memory_order_relaxed);
    return n > 0 ? n : machine().threads;
}
void set_num_threads(int threads) { requested.store(std::max(0, threads)); }
int last_team_size() { return team_size_seen; }

const char* parallel_engine() {
    static const std::string name = "OpenMP " + std::to_string(_OPENMP);
    return name.c_str();
}

void Team::barrier() {
    if (size > 1) {
#pragma omp barrier
    }
}

void run_team(int threads, void (*body)(void*, Team&), void* context) {
    if (threads > 1 && !forked && !omp_in_parallel() && !busy.exchange(true, std::memory_order_acquire)) {
        const std::int64_t slots = std::int64_t(Team::phases) * threads * Team::stride;
        const std::unique_ptr<std::atomic<std::int64_t>[]> counters(new std::atomic<std::int64_t>[slots]());
        int size = 1;
#pragma omp parallel num_threads(threads) default(none) shared(size, counters, body, context)
        {
            const IeeeMode mode;
            Team team(omp_get_thread_num(), omp_get_num_threads(), counters.get());
            if (team.rank == 0) size = team.size;
            body(context, team);
        }
        team_size_seen = size;
        busy.store(false, std::memory_order_release);
        return;
    }
    const IeeeMode mode;
    Team team(0, 1, nullptr);
    body(context, team);
    team_size_seen = 1;
}

}  // namespace bnfast
