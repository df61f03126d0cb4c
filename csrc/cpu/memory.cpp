#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "machine.h"
#include "thread_state.h"

namespace bnfast {
namespace {

constexpr std::size_t huge = std::size_t(2) << 20;

// Block sizes grow in steps of 1/8, so that a block can serve requests of similar sizes; at most 12.5 % is wasted.
// `number` counts the sizes from 0: up to 1024 there are 16, then 8 from each power of two to the next.
struct SizeClass {
    std::size_t bytes;
    int number;
    explicit SizeClass(std::size_t wanted) {
        if (wanted > std::size_t(PTRDIFF_MAX) / 32) throw std::bad_alloc();
        wanted = std::max<std::size_t>(wanted, 64);
        std::size_t step = 64;
        number = -1;
        for (; step * 16 < wanted; step *= 2) number += 8;
        const std::size_t steps = (wanted + step - 1) / step;
        bytes = steps * step;
        number += int(steps);
    }
};
constexpr int size_classes = 16 + 8 * 53;  // PTRDIFF_MAX / 32 is below 2^58, and 1024 is 2^10

// A quarter of the usable memory. All outputs of a training step must fit, otherwise every step allocates fresh pages:
// ResNet50 at batch 16 through numpy_function keeps 950 MB, and took 1.26x the time with a limit of 512 MiB
// (docs/performance/memory-and-allocator.md).
std::int64_t default_limit() {
    const std::int64_t least = std::int64_t(512) << 20;
    return std::max(least, machine().memory / 4);
}

// A block that the pool made. Kept blocks are linked twice: among all, and among those of their size. The links lie in
// the record, so that keeping a block allocates nothing: release_block can't fail.
struct Block {
    void* address = nullptr;
    std::size_t bytes = 0;
    int size_class = 0;
    Block *older = nullptr, *newer = nullptr;  // kept before and after this one
    Block *older_of_size = nullptr, *newer_of_size = nullptr;
};

// Blocks on their way back to the system, linked through their own first bytes.
class Evicted {
public:
    Evicted() = default;
    Evicted(const Evicted&) = delete;
    ~Evicted() {  // outside the lock
        while (first_) std::free(std::exchange(first_, *static_cast<void**>(first_)));
    }
    void add(void* block) {
        *static_cast<void**>(block) = first_;
        first_ = block;
    }

private:
    void* first_ = nullptr;
};

// `mutex` guards every member.
struct Pool {
    std::mutex mutex;
    std::unordered_map<void*, Block> blocks;  // every block in use or kept
    Block *oldest = nullptr, *newest = nullptr;
    Block* newest_of_size[size_classes] = {};
    std::int64_t held = 0, in_use = 0, reused = 0, fresh = 0;  // bytes, bytes, calls, calls
    std::int64_t peak_in_use = 0;
    std::int64_t limit = default_limit();

    void keep(Block& b) {
        Block*& last = newest_of_size[b.size_class];
        b.older = newest;
        b.older_of_size = last;
        b.newer = b.newer_of_size = nullptr;
        (newest ? newest->newer : oldest) = &b;
        if (last) last->newer_of_size = &b;
        newest = last = &b;
        held += std::int64_t(b.bytes);
    }
    void take(Block& b) {
        (b.older ? b.older->newer : oldest) = b.newer;
        (b.newer ? b.newer->older : newest) = b.older;
        if (b.older_of_size) b.older_of_size->newer_of_size = b.newer_of_size;
        (b.newer_of_size ? b.newer_of_size->older_of_size : newest_of_size[b.size_class]) = b.older_of_size;
        held -= std::int64_t(b.bytes);
    }
    void use(std::size_t bytes) {
        in_use += std::int64_t(bytes);
        peak_in_use = std::max(peak_in_use, in_use);
    }
    // Moves the blocks that were kept longest to `evicted`, until at most `limit_bytes` are kept.
    void evict(std::int64_t limit_bytes, Evicted& evicted) {
        while (held > limit_bytes) {
            Block& b = *oldest;
            take(b);
            evicted.add(b.address);
            blocks.erase(b.address);
        }
    }
};

// Never destroyed: see memory.h. Throws std::bad_alloc, also where the handlers of fork can't be had.
Pool& pool() {
    static Pool* p = [] {
        auto made = std::make_unique<Pool>();
        if (pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); }))
            throw std::bad_alloc();
        return made.release();
    }();
    return *p;
}

void* allocate(std::size_t bytes) {
    void* block = nullptr;
    const std::size_t alignment = bytes >= huge ? huge : 64;
    if (posix_memalign(&block, alignment, bytes) != 0) {
        clear_memory();  // give back what the pool keeps, and try again
        if (posix_memalign(&block, alignment, bytes) != 0) throw std::bad_alloc();
    }
    if (bytes >= huge) ask_for_huge_pages(block, bytes);
    return block;
}

}  // namespace

void ask_for_huge_pages(void* begin, std::size_t bytes) noexcept {
#if defined(__linux__)
    constexpr std::uintptr_t page = 4096;  // madvise takes whole pages alone
    const std::uintptr_t from = reinterpret_cast<std::uintptr_t>(begin), first = (from + page - 1) / page * page;
    const std::uintptr_t last = (from + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void* acquire_block(std::size_t bytes) {
    Pool& p = pool();
    const SizeClass size(bytes);
    {
        Evicted evicted;
        const std::lock_guard<std::mutex> lock(p.mutex);
        if (Block* const kept = p.newest_of_size[size.number]) {
            p.take(*kept);
            p.use(size.bytes);
            ++p.reused;
            return kept->address;
        }
        // Evict blocks of sizes that are no longer requested: kept and used bytes together stay within twice the peak
        // of the used bytes. A factor of 5/4 evicted blocks that the other half of a training step needs (MobileNetV2:
        // 130 of 260 blocks fresh per step, 2x the system time) and did not lower the peak.
        p.evict(std::max<std::int64_t>(0, p.peak_in_use * 2 - p.in_use - std::int64_t(size.bytes)), evicted);
    }
    std::unique_ptr<void, decltype(&std::free)> block(allocate(size.bytes), std::free);
    const std::lock_guard<std::mutex> lock(p.mutex);
    Block& record = p.blocks[block.get()];
    record.address = block.get();
    record.bytes = size.bytes;
    record.size_class = size.number;
    p.use(size.bytes);
    ++p.fresh;
    return block.release();
}

void release_block(void* block) noexcept {
    Pool& p = pool();
    Evicted evicted;
    const std::lock_guard<std::mutex> lock(p.mutex);
    const auto found = p.blocks.find(block);
    Block& record = found->second;
    p.in_use -= std::int64_t(record.bytes);
    if (std::int64_t(record.bytes) <= p.limit) {
        p.keep(record);
        p.evict(p.limit, evicted);
    } else {  // larger than the limit: free it and keep the others
        p.blocks.erase(found);
        evicted.add(block);
    }
}

MemoryStatistics memory_statistics() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    return {p.held, p.limit, p.in_use, p.reused, p.fresh};
}

void clear_memory() {
    Pool& p = pool();
    Evicted evicted;
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.evict(0, evicted);
    p.peak_in_use = p.in_use;
}

void set_memory_limit(std::int64_t bytes) {
    Pool& p = pool();
    Evicted evicted;
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.limit = std::max<std::int64_t>(0, bytes);
    p.evict(p.limit, evicted);
}

double* thread_scratch(std::size_t doubles) {
    ThreadState* const state = thread_state();
    if (!state) throw std::bad_alloc();
    if (doubles > state->scratch_doubles) {
        void* grown = nullptr;
        if (posix_memalign(&grown, 64, doubles * sizeof(double)) != 0) throw std::bad_alloc();
        std::free(state->scratch);
        state->scratch = static_cast<double*>(grown);
        state->scratch_doubles = doubles;
    }
    return state->scratch;
}

}  // namespace bnfast
