// The one place that runs threads. A job is a body that every member of a team runs; the work inside it comes from
// for_each, which hands out the items of a fixed grid, so that no result depends on who took which.
//
// - The caller is the team's first member and starts at once; OpenMP's threads join as they wake. A step waits for its
//   items, never for a member: a worker that another pool keeps off its processor costs nothing but its help.
// - One job at a time in the process: a caller that finds one running (or is inside one) runs its body alone. So the OS
//   threads are those of one team, however many host threads call (libgomp alone gives each caller a team of its own).
// - Idle workers spin for 20 us, then sleep. A forked child starts a team of its own.
// - Every member runs with round to nearest and without flush to zero, whatever the caller's mode (TensorFlow's threads
//   come with FTZ set).
// - The body must not throw, and what it does outside for_each is done by every member.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace bnfast {

int get_num_threads();
void set_num_threads(int threads);  // 0: back to the machine's default
int last_team_size();               // members of the calling thread's last job
void set_full_team(bool wait);      // tests only: a job begins when the whole team is there
const char* parallel_engine();

unsigned fp_mode();  // the calling thread's floating-point control register
void set_fp_mode(unsigned mode);
class IeeeMode {  // to nearest, denormals kept; the thread's own mode comes back at the end
public:
    IeeeMode();
    ~IeeeMode();
    IeeeMode(const IeeeMode&) = delete;
    IeeeMode& operator=(const IeeeMode&) = delete;

private:
    const unsigned saved_;
};

struct alignas(64) Counter {
    std::atomic<std::int64_t> value;
};

class Team {
public:
    static constexpr int steps = 4;  // for_each calls in a body, at most
    const int rank, size;            // this member, and how many there may be

    // Calls item(i) once for each i in [0, n), by whoever is there; returns when all are done. Each member starts with
    // its own share and then takes from the others'; backwards: a share is walked from its end, where the step before
    // left the caches warm.
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
    Counter* const counters_;  // [steps][size + 1]: what is taken of each share, then what is done
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
