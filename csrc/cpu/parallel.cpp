#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#if defined(BNFAST_THREADS_OPENMP)
#include <omp.h>

#include <string>
#include <system_error>
#else
#include <signal.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "affinity.h"
#include "machine.h"
#include "thread_state.h"

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

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds idle_spin{20};
// After a thread could not be made, no call tries again sooner. A failing attempt takes some 20 us.
constexpr std::chrono::milliseconds retry_after{100};

void work();  // a worker's life

// Starts up to `count` threads that run work(), and returns how many will.
#if defined(BNFAST_THREADS_OPENMP)
// A host thread opens a parallel region that never ends, so that its members wait in work() instead of in libgomp,
// whose idle threads spin for milliseconds. libgomp itself ends the process when it can't make a thread.
int start_workers(int count) {
    try {
        std::thread([count] {
#pragma omp parallel num_threads(count)
            work();
        }).detach();
        return count;
    } catch (const std::bad_alloc&) {
    } catch (const std::system_error&) {
    }
    return 0;
}
#else
// Signals of the process are for the application's threads. What a worker raises itself it also takes, and a profiler's
// ticks.
sigset_t signals_of_others() {
    sigset_t set;
    sigfillset(&set);
    for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, SIGPROF}) sigdelset(&set, own);
    return set;
}
int start_workers(int count) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return 0;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t before;
    const sigset_t others = signals_of_others();
    pthread_sigmask(SIG_BLOCK, &others, &before);  // a thread starts with its creator's mask
    int started = 0;
    pthread_t thread;
    const auto start = [](void*) -> void* {
#if defined(__linux__)
        pthread_setname_np(pthread_self(), "bnfast");
#endif
        work();
        return nullptr;  // GCOVR_EXCL_LINE: work() never returns
    };
    while (started < count && pthread_create(&thread, &attributes, start, nullptr) == 0) ++started;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    return started;
}
#endif

// The workers, the current job, and how workers wait for one. A worker lives until the process ends, and so does the
// pool: when a larger team is asked for, it gets more workers.
class Pool {
public:
    // Tries to have a team of `size` members, and returns how many there can be: 1, the caller alone, where no thread
    // and no memory is to be had.
    int prepare(int size) {
        size = std::min(size, int(closed) - 1);
        if (size > room_ && !make_room(size)) size = std::max(1, room_.load());
        if (workers_ < size - 1 && Clock::now() >= retry_at_) {
            const int missing = size - 1 - workers_, started = start_workers(missing);
            workers_ += started;
            if (started < missing) retry_at_ = Clock::now() + retry_after;
        }
        return std::min(size, workers_ + 1);
    }

    // Runs body on threads of the library, of which the caller is one. 0: it lends fewer than `size`, or none in a
    // forked child, where its threads are gone and its barrier would wait for them.
    int run_on(const OpenmpLibrary& library, int size, void (*body)(void*, Team&), void* context) {
        const int most = is_child_ ? 0 : library.most();
        if (size > most || size >= int(closed) || (size > room_ && !make_room(size))) return 0;
        clear_counters(size);
        struct Job {
            void (*const body)(void*, Team&);
            void* const context;
            Counter* const counters;
            const int size;
            std::atomic<int> joined;
        } job{body, context, counters_, size, {0}};
        const auto join = [](void* given) {
            Job& j = *static_cast<Job*>(given);
            const int rank = j.joined.fetch_add(1, std::memory_order_relaxed);
            if (rank >= j.size) return;
            const IeeeMode mode;
            Team team(rank, j.size, j.counters);
            j.body(j.context, team);
        };
        library.run(join, &job, unsigned(most), 0);  // fewer would end the library's other threads
        return std::min(job.joined.load(std::memory_order_relaxed), size);
    }

    // Runs body with at most `size` members, of those that are prepared, and returns how many took part.
    int run(int size, void (*body)(void*, Team&), void* context, bool full) {
        clear_counters(size);
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
        Team team(0, size, counters_);
        body(context, team);
        const int joined = int(members_.exchange(job << shift | closed, std::memory_order_acq_rel) & closed);
        while (left_.load(std::memory_order_acquire) < joined - 1) relax();  // the items are done, so this is short
        return joined;
    }

    [[noreturn]] void work() {
        const IeeeMode mode;
        WorkerAffinity::Worker self{};
        affinity_.join(self);
        for (std::uint64_t seen = 0;;) {
            wait_for_job(seen);
            std::uint64_t now = members_.load(std::memory_order_acquire);
            bool joined = false;
            while (!joined && int(now & closed) < size_)
                joined = members_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel);
            seen = now >> shift;
            if (!joined) continue;  // the job is over or its team complete; size_ may be the next job's by now
            Team team(int(now & closed), size_, counters_);
            body_(context_, team);
            left_.fetch_add(1, std::memory_order_release);
        }
    }

    // A forked child has no workers. It keeps the counters: a fork may have come between the two lines that replace
    // them, so `room_` is never more than they have.
    Pool* in_child() {
        Counter* const counters = counters_;
        const int room = room_;
        Pool* const fresh = new (this) Pool;  // whatever state its mutex was in
        fresh->counters_ = counters;
        fresh->room_ = room;
        fresh->is_child_ = true;
        return fresh;
    }

private:
    // members_: the job's number and how many have joined it, packed into one atomic, so that a worker joins only the
    // job it observed.
    static constexpr int shift = 16;
    static constexpr std::uint64_t closed = (1 << shift) - 1;

    // Between jobs no worker looks at the counters, so they can be replaced.
    bool make_room(int size) {
        auto* const larger = new (std::nothrow) Counter[std::size_t(Team::steps) * std::size_t(size + 1)];
        if (!larger) return false;
        Counter* const smaller = counters_;
        counters_ = larger;
        room_ = size;
        delete[] smaller;
        return true;
    }
    void clear_counters(int size) {
        for (int i = 0; i < Team::steps * (size + 1); ++i) counters_[i].value.store(0, std::memory_order_relaxed);
    }
    void wait_for_job(std::uint64_t seen) {
        for (const auto until = Clock::now() + idle_spin; Clock::now() < until;) {
            for (int i = 0; i < 32; ++i) {
                if (posted_.load(std::memory_order_acquire) != seen) return;
                relax();
            }
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return posted_.load() != seen; });
        sleeping_.fetch_sub(1);
    }

    // Between the jobs `busy` guards what isn't atomic; within one, a worker reads it after it has joined.
    int workers_ = 0;
    bool is_child_ = false;
    std::atomic<Counter*> counters_{nullptr};
    std::atomic<int> room_{0};  // the most members that counters_ has room for
    Clock::time_point retry_at_{};
    WorkerAffinity affinity_;
    void (*body_)(void*, Team&) = nullptr;
    void* context_ = nullptr;
    std::atomic<int> size_{0}, left_{0}, sleeping_{0};
    std::atomic<std::uint64_t> members_{closed}, posted_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Never destroyed, because its workers sleep in it until the process ends.
alignas(Pool) unsigned char pool_memory[sizeof(Pool)];
Pool* pool = new (pool_memory) Pool;

std::atomic<int> requested{0};  // 0: the machine's default
std::atomic<bool> busy{false};  // a job is running
std::atomic<bool> full_team{false};

void work() { pool->work(); }

// Without the handler a forked child would wait for workers that it hasn't got, so without it nobody has any.
bool survives_fork() {
    const auto in_child = [] {
        pool = pool->in_child();
        busy.store(false);
    };
    static std::atomic<bool> registered{false};  // guarded by busy, after the load
    if (!registered) registered = pthread_atfork(nullptr, nullptr, in_child) == 0;
    return registered;
}
const bool at_load = survives_fork();

// How many members took part; 0: a job is running, or there is no team to be had.
int run_by_team(int threads, void (*body)(void*, Team&), void* context) {
    if (threads < 2 || busy.exchange(true, std::memory_order_acquire)) return 0;
    int members = 0;
    if (survives_fork()) {
        const ThreadState* const state = thread_state();
        if (state && state->lender) members = pool->run_on(*state->lender, threads, body, context);
        if (members == 0) {
            const int size = pool->prepare(threads);
            if (size > 1) members = pool->run(size, body, context, full_team.load());
        }
    }
    busy.store(false, std::memory_order_release);
    return members;
}

}  // namespace

bool find_openmp(void* library, OpenmpLibrary& found) {
    found.run = reinterpret_cast<decltype(found.run)>(dlsym(library, "GOMP_parallel"));
    found.most = reinterpret_cast<decltype(found.most)>(dlsym(library, "omp_get_max_threads"));
    const void* const in_front = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return found.run && found.most && (!in_front || in_front == reinterpret_cast<const void*>(found.run));
}
BorrowedThreads::BorrowedThreads(const OpenmpLibrary* library) : lent_(library && thread_state()) {
    if (lent_) thread_state()->lender = library;
}
BorrowedThreads::~BorrowedThreads() {
    if (lent_) thread_state()->lender = nullptr;
}

int get_num_threads() {
    const int n = requested.load(std::memory_order_relaxed);
    return n > 0 ? n : machine().threads;
}
void set_num_threads(int threads) { requested.store(std::max(0, threads)); }
int last_team_size() {
    const ThreadState* const state = thread_state();
    return state ? state->team_size : 1;
}
void set_full_team(bool wait) { full_team.store(wait); }

const char* parallel_engine() {
#if defined(BNFAST_THREADS_OPENMP)
    static const std::string name = "OpenMP " + std::to_string(_OPENMP);
    return name.c_str();
#else
    return "own threads";
#endif
}

void Team::wait_for(const std::atomic<std::int64_t>& value, std::int64_t goal) {
    for (int i = 0; value.load(std::memory_order_acquire) < goal; ++i) {
        if (i < 4096) relax();
        else std::this_thread::sleep_for(std::chrono::microseconds(20));  // frees the processor for who has the item
    }
}

void run_team(int threads, void (*body)(void*, Team&), void* context) {
    int members = run_by_team(threads, body, context);
    if (members == 0) {
        Team alone(0, 1, nullptr);
        body(context, alone);
        members = 1;
    }
    if (ThreadState* const state = thread_state()) state->team_size = members;
}

}  // namespace bnfast
