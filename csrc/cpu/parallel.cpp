#include "parallel.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "machine.h"

namespace bnfast {

// ---- floating-point mode --------------------------------------------------------------------------------------------

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
constexpr unsigned ieee_mode = 0x1f80;  // all exceptions masked, round to nearest, denormals kept
#else
constexpr unsigned ieee_mode = 0;
#endif
}  // namespace

IeeeMode::IeeeMode() : saved_(fp_mode()) {
    if (saved_ != ieee_mode) set_fp_mode(ieee_mode);
}
IeeeMode::~IeeeMode() {
    if (fp_mode() != saved_) set_fp_mode(saved_);
}

// ---- the team -------------------------------------------------------------------------------------------------------

namespace {

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Keeps workers off their caller's processor. Linux (6.18, KVM guest) often woke a worker there although another
// processor was idle; the worker then waited for a time slice, and a job of 0.3 ms took 4.5 ms.
class WorkerAffinity {
public:
#if defined(__linux__)
    explicit WorkerAffinity(int workers) : tids_(new std::atomic<pid_t>[std::size_t(workers)]()), workers_(workers) {
        if (sched_getaffinity(0, sizeof allowed_, &allowed_) != 0) CPU_ZERO(&allowed_);
    }
    void join(int worker) { tids_[worker].store(pid_t(syscall(SYS_gettid))); }
    void avoid_caller() {
        const int cpu = sched_getcpu();
        if (cpu < 0 || cpu == avoided_ || CPU_COUNT(&allowed_) < 2) return;
        cpu_set_t others = allowed_;
        CPU_CLR(cpu, &others);
        for (int i = 0; i < workers_; ++i)
            if (const pid_t tid = tids_[i].load()) sched_setaffinity(tid, sizeof others, &others);
        avoided_ = cpu;
    }

private:
    cpu_set_t allowed_;
    const std::unique_ptr<std::atomic<pid_t>[]> tids_;
    const int workers_;
    int avoided_ = -1;
#else
    explicit WorkerAffinity(int) {}
    void join(int) {}
    void avoid_caller() {}
#endif
};

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds idle_spin{20};

// The workers, the current job, and how workers wait for one. OpenMP creates the threads: a host thread opens a
// parallel region that never ends, and its members wait for jobs here instead of in libgomp, whose idle threads spin
// for milliseconds. A pool is never destroyed, because its workers sleep in it until the process ends.
class Pool {
public:
    explicit Pool(int workers)
        : workers_(workers), counters_(new Counter[std::size_t(Team::steps * (workers + 2))]), affinity_(workers) {
        std::thread([this] {
#pragma omp parallel num_threads(workers_)
            this->work();
        }).detach();
    }
    int workers() const { return workers_; }

    // Runs body with at most `size` members and returns how many took part.
    int run(int size, void (*body)(void*, Team&), void* context, bool full) {
        for (int i = 0; i < Team::steps * (size + 1); ++i) counters_[i].value.store(0, std::memory_order_relaxed);
        body_ = body;
        context_ = context;
        size_ = size;
        left_.store(0, std::memory_order_relaxed);
        const std::uint64_t job = posted_.load(std::memory_order_relaxed) + 1;
        members_.store(job << shift | 1, std::memory_order_release);
        posted_.store(job);
        if (sleeping_.load() > 0) {
            affinity_.avoid_caller();
            {
                const std::lock_guard<std::mutex> lock(mutex_);
            }
            wake_.notify_all();
        }
        while (full && int(members_.load() & closed) < size) std::this_thread::yield();
        Team team(0, size, counters_.get());
        body(context, team);
        const int joined = int(members_.exchange(job << shift | closed, std::memory_order_acq_rel) & closed);
        while (left_.load(std::memory_order_acquire) < joined - 1) relax();  // the items are done, so this is short
        return joined;
    }
    void stop() {  // workers leave when they next wait for a job
        stopped_.store(true);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
        }
        wake_.notify_all();
    }

private:
    // members_: the job's number and how many have joined it, packed into one atomic, so that a worker joins only the
    // job it observed.
    static constexpr int shift = 16;
    static constexpr std::uint64_t closed = (1 << shift) - 1;

    void work() {
        const IeeeMode mode;
        affinity_.join(omp_get_thread_num());
        for (std::uint64_t seen = 0; wait_for_job(seen);) {
            std::uint64_t now = members_.load(std::memory_order_acquire);
            bool joined = false;
            while (!joined && int(now & closed) < size_)
                joined = members_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel);
            seen = now >> shift;
            if (!joined) continue;  // the job is over or its team complete; size_ may be the next job's by now
            Team team(int(now & closed), size_, counters_.get());
            body_(context_, team);
            left_.fetch_add(1, std::memory_order_release);
        }
    }
    bool wait_for_job(std::uint64_t seen) {
        for (const auto until = Clock::now() + idle_spin; Clock::now() < until;) {
            for (int i = 0; i < 32; ++i) {
                if (posted_.load(std::memory_order_acquire) != seen) return true;
                relax();
            }
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return posted_.load() != seen || stopped_.load(); });
        sleeping_.fetch_sub(1);
        return posted_.load() != seen || !stopped_.load();
    }

    const int workers_;
    const std::unique_ptr<Counter[]> counters_;
    WorkerAffinity affinity_;
    void (*body_)(void*, Team&) = nullptr;
    void* context_ = nullptr;
    std::atomic<int> size_{0}, left_{0}, sleeping_{0};
    std::atomic<std::uint64_t> members_{closed}, posted_{0};
    std::atomic<bool> stopped_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

std::atomic<int> requested{0};  // 0: the machine's default
std::atomic<bool> busy{false};  // a job is running
std::atomic<bool> full_team{false};
Pool* pool = nullptr;  // guarded by busy
thread_local int team_size_seen = 1;
thread_local bool inside = false;

#if defined(__linux__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] {  // the child has no workers
    pool = nullptr;
    busy.store(false);
});
#endif

Pool* pool_for(int workers) {
    if (pool && pool->workers() >= workers) return pool;
    if (pool) pool->stop();
    try {
        pool = nullptr;
        pool = new Pool(workers);
    } catch (const std::bad_alloc&) {
    } catch (const std::system_error&) {  // no more threads available: the caller works alone
    }
    return pool;
}

}  // namespace

int get_num_threads() {
    const int n = requested.load(std::memory_order_relaxed);
    return n > 0 ? n : machine().threads;
}
void set_num_threads(int threads) { requested.store(std::max(0, threads)); }
int last_team_size() { return team_size_seen; }
void set_full_team(bool wait) { full_team.store(wait); }

const char* parallel_engine() {
    static const std::string name = "OpenMP " + std::to_string(_OPENMP);
    return name.c_str();
}

void Team::wait_for(const std::atomic<std::int64_t>& value, std::int64_t goal) {
    for (int i = 0; value.load(std::memory_order_acquire) < goal; ++i) {
        if (i < 4096) relax();
        else std::this_thread::sleep_for(std::chrono::microseconds(20));  // frees the processor for who has the item
    }
}

void run_team(int threads, void (*body)(void*, Team&), void* context) {
    if (threads > 1 && !inside && !busy.exchange(true, std::memory_order_acquire)) {
        if (Pool* team = pool_for(threads - 1)) {
            inside = true;
            team_size_seen = team->run(threads, body, context, full_team.load());
            inside = false;
            busy.store(false, std::memory_order_release);
            return;
        }
        busy.store(false, std::memory_order_release);
    }
    Team alone(0, 1, nullptr);
    body(context, alone);
    team_size_seen = 1;
}

}  // namespace bnfast
