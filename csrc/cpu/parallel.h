// The only code that runs threads. parallel(threads, body) runs `body` on every member of a team. The members share
// work through Team::for_each, which hands out the items of a fixed grid, so no result depends on which member took
// which.
//
// - The caller is the first member and starts at once; workers join as they wake. A step waits for its items, not for
//   members, so a worker that gets no processor costs nothing but its help.
// - One job at a time per process: a caller that meets a running job, or is inside one, runs its body alone. The OS
//   threads are those of one team, however many host threads call; libgomp alone gives each caller a team of its own.
// - Idle workers spin for 20 us, then sleep. A forked child starts a new team.
// - In a scope of BorrowedThreads a job runs on the threads of the OpenMP library that the caller's framework uses.
// - Members run with round to nearest and without flush to zero, whatever the caller's mode (TensorFlow's threads flush
//   to zero).
// - The body must not throw. What it does outside for_each, every member does.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace bnfast {

int get_num_threads();
void set_num_threads(int threads);  // 0: the machine's default
int last_team_size();               // how many members took part in the calling thread's last job
void set_full_team(bool wait);      // tests only: a job starts when all members have joined
const char* parallel_engine();

unsigned fp_mode();  // the calling thread's floating-point control register
void set_fp_mode(unsigned mode);
class IeeeMode {  // scope with round to nearest and denormals; the destructor restores the thread's mode
public:
    IeeeMode();
    ~IeeeMode();
    IeeeMode(const IeeeMode&) = delete;
    IeeeMode& operator=(const IeeeMode&) = delete;

private:
    const unsigned saved_;
};

// The OpenMP library of a framework. PyTorch's idle threads spin for milliseconds after each of its operations, on the
// processors that our workers would need. While they spin they start at once, so a job takes them in place of workers.
struct OpenmpLibrary {
    void (*run)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel: body, context, threads, flags
    int (*most)();                                            // how many threads a region of this thread may have
};
// Finds GOMP_parallel and omp_get_max_threads as a loaded library (of dlopen) was linked. False: it wasn't, or the
// process has another library in front of it (LD_PRELOAD), whose functions it may have instead.
bool find_openmp(void* library, OpenmpLibrary& found);
class BorrowedThreads {  // scope of the calling thread; without effect where the library is null
public:
    explicit BorrowedThreads(const OpenmpLibrary* library);
    ~BorrowedThreads();
    BorrowedThreads(const BorrowedThreads&) = delete;
    BorrowedThreads& operator=(const BorrowedThreads&) = delete;

private:
    const bool lent_;
};

struct alignas(64) Counter {
    std::atomic<std::int64_t> value;
};

class Team {
public:
    static constexpr int steps = 4;  // the most for_each calls per body
    const int rank, size;            // this member's number, and the most members

    // Calls item(i) once for each i in [0, n) and returns when all calls are done. Each member starts with its own
    // share and then takes items from the others' shares. With `backwards` a share is processed from its end, which the
    // step before touched last and which is still in cache.
    template <class Item> void for_each(std::int64_t n, bool backwards, Item&& item) {
        if (size == 1) {
            for (std::int64_t i = 0; i < n; ++i) item(backwards ? n - 1 - i : i);
            return;
        }
        Counter* const taken = counters_ + step_++ * (size + 1);
        std::atomic<std::int64_t>& done = taken[size].value;
        std::int64_t mine = 0;
        for (int k = 0; k < size; ++k) {
            const int owner = (rank + k) % size;
            const std::int64_t begin = n * owner / size, end = n * (owner + 1) / size;
            for (std::int64_t i; (i = begin + taken[owner].value.fetch_add(1, std::memory_order_relaxed)) < end; ++mine)
                item(backwards ? begin + end - 1 - i : i);
        }
        if (mine) done.fetch_add(mine, std::memory_order_acq_rel);
        wait_for(done, n);
    }

    Team(int rank_, int size_, Counter* counters) : rank(rank_), size(size_), counters_(counters) {}

private:
    Counter* const counters_;  // [steps][size + 1]: items taken from each share, then items done
    int step_ = 0;
    static void wait_for(const std::atomic<std::int64_t>& value, std::int64_t goal);
};

void run_team(int threads, void (*body)(void*, Team&), void* context);

template <class Body> void parallel(int threads, Body&& body) {
    run_team(
        threads, [](void* b, Team& team) { (*static_cast<std::remove_reference_t<Body>*>(b))(team); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace bnfast
