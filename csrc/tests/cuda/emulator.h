// Runs plain CUDA kernels on the host, so that their text is tested where there is no GPU. Include it before the
// kernels: it brings the words of CUDA that they use (threadIdx, __syncthreads, __shfl_down_sync, ...) and those of
// csrc/cuda/kernels/device.h.
//
// Every CUDA thread is a fiber, and all fibers of a launch run on the calling thread, in an order of the test's choice:
// results must not depend on it. Dynamic shared memory begins as NaN. These end the launch with emu::Error: threads
// that wait at different barriers (divergence), threads that end while others wait, a shuffle without its whole warp, a
// misaligned access, a stack overflow, blocks that wait for one that never comes. Under ThreadSanitizer every fiber is
// a thread of its own, ordered by barriers, shuffles and counters of the grid alone, so that a missing one is reported
// as a data race, between blocks too. A grid barrier is the kernels' own text (grid_barrier.cuh) over such a counter.
// Under AddressSanitizer shared memory and stacks end where they should.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define UNROLL
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::shared_memory())

namespace emu {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// forward and mixed give every thread its turn. backward is greedy: always the last warp that can go on, so that warp 0
// comes as late as the barriers allow.
enum class Order { forward, backward, mixed };
constexpr Order all_orders[] = {Order::forward, Order::backward, Order::mixed};

struct Launch {
    unsigned blocks = 1, threads = 32;
    std::size_t shared_bytes = 0;
    Order order = Order::forward;
    bool cooperative = false;  // all blocks run at once
    unsigned cluster = 1;      // so many do, and share cluster_barrier
    int skip_barrier = -1;  // plants a bug: this call of __syncthreads or cluster_barrier does nothing, in any thread
    int skip_wait = -1;     // plants a bug: this call of wait_for returns at once, in every block
};

enum class State { ready, at_block, at_warp, at_cluster, at_counter, done };

struct Thread {
    Fiber fiber;
    State state = State::ready;
    unsigned id = 0, block_waits = 0, warp_waits = 0, cluster_waits = 0, counter_waits = 0, barriers = 0;
    std::uint64_t slot = 0;             // what a shuffle gives to the other lanes
    const unsigned* counter = nullptr;  // what it waits for, and
    unsigned wanted = 0;                // at least this value
};

// Two tags in turn per barrier, for ThreadSanitizer: with one, a late waiter would acquire what others released for the
// next barrier, and a race would be hidden.
struct Tags {
    std::uint64_t tag[2];
};

struct Block {
    const Launch* launch = nullptr;
    unsigned index = 0;
    std::vector<Thread> threads;
    std::unique_ptr<unsigned char[]> memory;
    unsigned char* shared = nullptr;
    Tags block_tags{};
    Tags* cluster_tags = nullptr;
    std::vector<Tags> warp_tags;
    std::uint32_t random = 0;
};

struct Run {  // the launch that is running
    const Launch* launch = nullptr;
    const std::function<void()>* kernel = nullptr;
    Block* block = nullptr;
    Thread* thread = nullptr;
    std::uint64_t arrivals[16] = {};  // a tag per round of the launch's counter
    std::uint64_t end_tag = 0;
    const char* error = nullptr;
    Fiber scheduler;
};
inline Run run;

BNFAST_NO_TSAN inline void* shared_memory() { return run.block->shared; }

BNFAST_NO_TSAN inline std::string here() {
    return " (block " + std::to_string(run.block->index) + ", thread " + std::to_string(run.thread->id) + ")";
}

// Leaves the current thread until the scheduler finds it ready again.
BNFAST_NO_TSAN inline void leave(State state) {
    run.thread->state = state;
    tsan_release(&run.end_tag);
    switch_fiber(run.thread->fiber, run.scheduler);
}
// Ends the launch. The fiber is left for good, so it may own nothing.
[[noreturn]] BNFAST_NO_TSAN inline void fail(const char* what) {
    run.error = what;
    leave(State::done);
    std::abort();
}

BNFAST_NO_TSAN inline void wait(State state, Tags& tags, unsigned& waits) {
    void* tag = &tags.tag[waits++ & 1];
    tsan_release(tag);
    leave(state);
    tsan_acquire(tag);
}

BNFAST_NO_TSAN inline bool skipped() { return int(run.thread->barriers++) == run.launch->skip_barrier; }
BNFAST_NO_TSAN inline void block_barrier() {
    if (!skipped()) wait(State::at_block, run.block->block_tags, run.thread->block_waits);
}
BNFAST_NO_TSAN inline void cluster_wait() {
    if (run.launch->cluster < 2) fail("cluster_barrier outside of a cluster");
    if (!skipped()) wait(State::at_cluster, *run.block->cluster_tags, run.thread->cluster_waits);
}

// A counter that every block adds to once per round. A waiter acquires what came up to its round, and nothing later.
BNFAST_NO_TSAN inline std::uint64_t* arrivals(unsigned value) {
    return &run.arrivals[(value - 1) / run.launch->blocks % 16];
}
BNFAST_NO_TSAN inline void arrive_at(unsigned* counter) { tsan_release(arrivals(++*counter)); }
BNFAST_NO_TSAN inline void wait_for_counter(const unsigned* counter, unsigned value) {
    if (!run.launch->cooperative) fail("a wait for other blocks outside of a cooperative launch");
    if (int(run.thread->counter_waits++) == run.launch->skip_wait) return;
    run.thread->counter = counter;
    run.thread->wanted = value;
    if (*counter < value) leave(State::at_counter);
    for (unsigned v = run.launch->blocks; v <= value; v += run.launch->blocks) tsan_acquire(arrivals(v));
}

template <class T> BNFAST_NO_TSAN T shuffle(unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= 8);
    if (mask != 0xffffffffu) fail("a shuffle of less than a warp");
    Thread& self = *run.thread;
    Tags& tags = run.block->warp_tags[self.id / 32];
    std::memcpy(&self.slot, &value, sizeof value);
    wait(State::at_warp, tags, self.warp_waits);
    std::memcpy(&value, &run.block->threads[self.id / 32 * 32 + from].slot, sizeof value);
    wait(State::at_warp, tags, self.warp_waits);
    return value;
}

// ---- the scheduler --------------------------------------------------------------------------------------------------

BNFAST_NO_TSAN inline void enter() {
    (*run.kernel)();
    leave(State::done);
}

// The k-th thread to look at.
BNFAST_NO_TSAN inline unsigned in_order(const Block& b, unsigned k) {
    const unsigned n = unsigned(b.threads.size());
    if (b.launch->order == Order::forward) return k;
    return b.launch->order == Order::backward ? n - 1 - k : (k * 97 + b.random) % n;  // 97 and n are coprime
}

BNFAST_NO_TSAN inline void run_thread(Thread& t) {
    run.thread = &t;
    switch_fiber(run.scheduler, t.fiber);
    if (run.error) throw Error(run.error + here());
    if (!t.fiber.stack_intact()) throw Error("stack overflow" + here());
}

// One turn of the threads that are ready; whether there were any.
BNFAST_NO_TSAN inline bool run_ready(Block& b) {
    bool any = false;
    b.random = b.random * 1664525u + 1013904223u;
    run.block = &b;
    for (unsigned k = 0; k < b.threads.size(); ++k) {
        if (b.launch->order == Order::backward && any && k % 32 == 0) break;
        Thread& t = b.threads[in_order(b, k)];
        if (t.state != State::ready) continue;
        any = true;
        run_thread(t);
    }
    return any;
}

// Whether threads [begin, end) all are in `state`.
BNFAST_NO_TSAN inline bool all_in(const Block& b, State state, std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i)
        if (b.threads[i].state != state) return false;
    return true;
}
inline bool all_in(const Block& b, State state) { return all_in(b, state, 0, b.threads.size()); }
BNFAST_NO_TSAN inline void release(Block& b, std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) b.threads[i].state = State::ready;
}

// Lets those go on who wait together: a warp at a shuffle, a block at its barrier; and who waits for a counter that has
// come so far.
inline bool release_waiting(Block& b) {
    bool any = false;
    for (Thread& t : b.threads)
        if (t.state == State::at_counter && *t.counter >= t.wanted) {
            t.state = State::ready;
            any = true;
        }
    for (std::size_t w = 0; w < b.threads.size(); w += 32)
        if (all_in(b, State::at_warp, w, w + 32)) {
            release(b, w, w + 32);
            any = true;
        }
    if (all_in(b, State::at_block)) {
        release(b, 0, b.threads.size());
        any = true;
    }
    return any;
}

inline bool waits_for_counter(const Block& b) {
    for (const Thread& t : b.threads)
        if (t.state == State::at_counter) return true;
    return false;
}

// Runs the block until all of it is done or waits for other blocks. Whether anything has happened.
inline bool advance(Block& b) {
    bool any = false;
    for (bool goes_on = true; goes_on; any |= goes_on) {
        goes_on = run_ready(b);
        if (release_waiting(b)) goes_on = true;
    }
    if (!all_in(b, State::done) && !all_in(b, State::at_cluster) && !waits_for_counter(b))
        throw Error("divergence: threads of block " + std::to_string(b.index) + " wait at different places");
    return any;
}

inline std::unique_ptr<Block> make_block(const Launch& launch, unsigned index) {
    auto b = std::make_unique<Block>();
    b->launch = &launch;
    b->index = index;
    b->random = index * 7919u + 12345u;
    b->threads.resize(launch.threads);
    b->warp_tags.resize(launch.threads / 32);
    b->memory.reset(new unsigned char[launch.shared_bytes + 16]);
    std::memset(b->memory.get(), 0xff, launch.shared_bytes + 16);
    // The end is exact, for AddressSanitizer; the beginning is aligned.
    const auto end = reinterpret_cast<std::uintptr_t>(b->memory.get() + launch.shared_bytes + 16);
    b->shared = reinterpret_cast<unsigned char*>((end - launch.shared_bytes) / 16 * 16);
    for (unsigned i = 0; i < launch.threads; ++i) {
        b->threads[i].id = i;
        b->threads[i].fiber.start(enter);
    }
    return b;
}

// Runs blocks that are on the device at once.
inline void run_blocks(std::vector<std::unique_ptr<Block>>& blocks) {
    for (bool goes_on = true; goes_on;) {
        goes_on = false;
        for (auto& b : blocks) goes_on |= advance(*b);
        for (std::size_t first = 0; first < blocks.size(); first += blocks[0]->launch->cluster) {
            const std::size_t end = first + blocks[0]->launch->cluster;
            bool all = true;
            for (std::size_t i = first; i < end; ++i) all &= all_in(*blocks[i], State::at_cluster);
            for (std::size_t i = first; all && i < end; ++i) release(*blocks[i], 0, blocks[i]->threads.size());
            goes_on |= all;
        }
    }
    for (auto& b : blocks)
        if (!all_in(*b, State::done))
            throw Error("divergence: block " + std::to_string(b->index) + " waits for blocks that don't come");
}

inline void end(std::vector<std::unique_ptr<Block>>& blocks) {
    tsan_acquire(&run.end_tag);
    for (auto& b : blocks)
        for (auto& t : b->threads) t.fiber.end();
    blocks.clear();
}

// What the threads did lies before what the caller does next. Between blocks there is no such order.
struct EndOfLaunch {
    ~EndOfLaunch() { tsan_acquire(&run.end_tag); }
};

// Runs kernel() in every thread of every block. Clusters run one after the other; of a cooperative launch, all at once.
inline void launch(const Launch& launch, const std::function<void()>& kernel) {
    if (launch.threads == 0 || launch.threads % 32) throw Error("a block must be whole warps");
    if (launch.cluster == 0 || launch.blocks % launch.cluster) throw Error("a grid must be whole clusters");
    run = Run{};
    run.launch = &launch;
    run.kernel = &kernel;
    run.scheduler.adopt();
    std::vector<std::unique_ptr<Block>> blocks, running;
    std::vector<std::unique_ptr<Tags>> together;  // one per cluster
    const EndOfLaunch end_of_launch;
    for (unsigned k = 0; k < launch.blocks; ++k) {
        if (k % launch.cluster == 0) together.push_back(std::make_unique<Tags>());
        running.push_back(make_block(launch, launch.order == Order::backward ? launch.blocks - 1 - k : k));
        running.back()->cluster_tags = together.back().get();
        if (launch.cooperative || (k + 1) % launch.cluster) continue;
        run_blocks(running);
        for (auto& b : running) blocks.push_back(std::move(b));
        running.clear();
        if (!keeps_fibers) end(blocks);
    }
    run_blocks(running);
    end(running);
    end(blocks);
}

// ---- checked memory -------------------------------------------------------------------------------------------------

template <class T> void check_aligned(const T* at, std::size_t alignment) {
    if (reinterpret_cast<std::uintptr_t>(at) % alignment) fail("a misaligned access");
}

}  // namespace emu

// ---- the words of CUDA ----------------------------------------------------------------------------------------------

#define BNFAST_EMULATED(name, value)                                   \
    struct {                                                           \
        struct {                                                       \
            BNFAST_NO_TSAN operator unsigned() const { return value; } \
        } x;                                                           \
    } const name {                                                     \
    }
inline BNFAST_EMULATED(threadIdx, emu::run.thread->id);
inline BNFAST_EMULATED(blockIdx, emu::run.block->index);
inline BNFAST_EMULATED(blockDim, emu::run.launch->threads);
inline BNFAST_EMULATED(gridDim, emu::run.launch->blocks);
#undef BNFAST_EMULATED

inline void __syncthreads() { emu::block_barrier(); }
template <class T> T __shfl_down_sync(unsigned mask, T value, int d) {
    const unsigned lane = threadIdx.x % 32, from = lane + unsigned(d);
    return emu::shuffle(mask, value, from < 32 ? from : lane);
}
template <class T> T __shfl_sync(unsigned mask, T value, int from) { return emu::shuffle(mask, value, unsigned(from)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class To, class From> To emu_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned v) { return emu_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return emu_bits<unsigned>(v); }

#include "cuda/kernels/arguments.h"

// ---- the words of device.h ------------------------------------------------------------------------------------------

namespace bnfast::cuda {

struct alignas(16) Raw {
    unsigned w[4];
};
inline Raw load16(const void* at) {
    emu::check_aligned(static_cast<const char*>(at), 16);
    Raw raw;
    std::memcpy(&raw, at, 16);
    return raw;
}
inline void store16(void* at, const Raw& raw) {
    emu::check_aligned(static_cast<char*>(at), 16);
    std::memcpy(at, &raw, 16);
}
template <class U> U load1(const void* base, Index i) {
    emu::check_aligned(static_cast<const U*>(base), sizeof(U));
    return static_cast<const U*>(base)[i];
}
template <class U> void store1(void* base, Index i, U value) {
    emu::check_aligned(static_cast<U*>(base), sizeof(U));
    static_cast<U*>(base)[i] = value;
}

inline void arrive(unsigned* counter) { emu::arrive_at(counter); }
inline void wait_for(const unsigned* counter, unsigned value) { emu::wait_for_counter(counter, value); }
inline void cluster_barrier() { emu::cluster_wait(); }

inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double square_root(double v) { return std::sqrt(v); }

inline double double_of(unsigned low, unsigned high) { return emu_bits<double>(std::uint64_t(high) << 32 | low); }
inline unsigned low_word(double v) { return unsigned(emu_bits<std::uint64_t>(v)); }
inline unsigned high_word(double v) { return unsigned(emu_bits<std::uint64_t>(v) >> 32); }

// Rounds to nearest, ties to even, in integers; NaN becomes 0x7fff, as the device's instruction makes it.
inline unsigned bfloat_of_float(float f) {
    const unsigned u = __float_as_uint(f);
    return f != f ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
inline unsigned half_of_float(float f) {
    const unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return 0x7fffu;
    if (a >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on: infinity
    if (a < 0x38800000u) {                        // subnormal: adding 0.5 rounds at 2^-24
        const float shifted = __uint_as_float(a) + 0.5f;
        return sign | (__float_as_uint(shifted) - __float_as_uint(0.5f));
    }
    return sign | (a - 0x38000000u + 0xfffu + (a >> 13 & 1)) >> 13;
}
inline float float_of_half(unsigned bits) {
    const unsigned sign = (bits & 0x8000u) << 16, e = bits >> 10 & 31, m = bits & 0x3ffu;
    if (e == 31) return __uint_as_float(sign | 0x7f800000u | m << 13);
    if (e == 0) return (sign ? -1.0f : 1.0f) * float(m) * 0x1p-24f;
    return __uint_as_float(sign | (e + 112) << 23 | m << 13);
}

}  // namespace bnfast::cuda
