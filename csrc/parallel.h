// The one place that runs threads. A region is a team of threads that all run the same body; work inside it comes from
// for_each, which hands out the items of a fixed grid, so no result depends on who took which.
//
// - One region at a time in the process: a caller that finds one running (or is inside one, or in a forked child) runs
//   its body alone. So OS threads stay bounded by one team, however many host threads call.
// - Every thread runs with round to nearest and without flush to zero (TensorFlow's threads come with FTZ set), and
//   gets its own mode back.
// - The body must not throw.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace bnfast {

int get_num_threads();
void set_num_threads(int threads);
int last_team_size();  // of the calling thread's last region
unsigned fp_mode();    // the calling thread's floating-point control register
void set_fp_mode(unsigned mode);
const char* parallel_engine();

class Team {
public:
    const int rank, size;

    // Calls item(i) once for each i in [0, n) over the team. Each thread starts with its own share and then takes from
    // the others'; backwards: the share is walked from its end, where the last phase left the caches warm. Every thread
    // of the team must call it; it doesn't wait for the others (barrier() does).
    template <class Item> void for_each(std::int64_t n, bool backwards, Item&& item) {
        if (size == 1) {
            for (std::int64_t i = 0; i < n; ++i) item(backwards ? n - 1 - i : i);
            return;
        }
        std::atomic<std::int64_t>* taken = next_counters();
        for (int k = 0; k < size; ++k) {
            const int owner = (rank + k) % size;
            const std::int64_t begin = n * owner / size, end = n * (owner + 1) / size;
            for (std::int64_t i; (i = begin + taken[owner * stride].fetch_add(1, std::memory_order_relaxed)) < end;)
                item(backwards ? begin + end - 1 - i : i);
        }
    }
    void barrier();

private:
    static constexpr int stride = 8, phases = 4;  // counters a cache line apart; at most 4 for_each in a region
    std::atomic<std::int64_t>* const counters_;
    int phase_ = 0;

    Team(int rank_, int size_, std::atomic<std::int64_t>* counters) : rank(rank_), size(size_), counters_(counters) {}
    std::atomic<std::int64_t>* next_counters() { return counters_ + std::int64_t(phase_++) * size * stride; }
    friend void run_team(int, void (*)(void*, Team&), void*);
};

void run_team(int threads, void (*body)(void*, Team&), void* context);

template <class Body> void parallel(int threads, Body&& body) {
    run_team(
        threads, [](void* b, Team& team) { (*static_cast<std::remove_reference_t<Body>*>(b))(team); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace bnfast
