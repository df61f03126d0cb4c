#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "machine.h"

namespace bnfast {
namespace {

constexpr std::size_t huge = std::size_t(2) << 20;

// Block sizes grow in steps of 1/8, so that a block can serve requests of similar sizes; at most 12.5 % is wasted.
std::size_t size_class(std::size_t bytes) {
    if (bytes > std::size_t(PTRDIFF_MAX) / 32) throw std::bad_alloc();
    bytes = std::max<std::size_t>(bytes, 64);
    std::size_t step = 64;
    while (step * 16 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

// A quarter of the usable memory. All outputs of a training step must fit, otherwise every step allocates fresh pages:
// ResNet50 at batch 16 through numpy_function keeps 950 MB, and took 1.26x the time with a limit of 512 MiB
// (docs/performance/memory-and-allocator.md).
std::int64_t default_limit() {
    const std::int64_t least = std::int64_t(512) << 20;
    return std::max(least, machine().memory / 4);
}

struct Kept {
    void* block;
    std::int64_t since;  // number of the release
};

// `mutex` guards every member.
struct Pool {
    std::mutex mutex;
    std::unordered_map<void*, std::size_t> size_of;            // every block in use or kept
    std::map<std::size_t, std::deque<Kept>> kept;              // by size, the oldest first
    std::int64_t held = 0, in_use = 0, reused = 0, fresh = 0;  // bytes, bytes, calls, calls
    std::int64_t peak_in_use = 0, events = 0;
    std::int64_t limit = default_limit();

    // Moves the blocks that were kept longest to `evicted`, until at most `limit_bytes` are kept.
    void evict(std::int64_t limit_bytes, std::vector<void*>& evicted) {
        while (held > limit_bytes) {
            auto oldest = kept.end();
            for (auto it = kept.begin(); it != kept.end(); ++it)
                if (oldest == kept.end() || it->second.front().since < oldest->second.front().since) oldest = it;
            void* block = oldest->second.front().block;
            oldest->second.pop_front();
            held -= std::int64_t(oldest->first);
            if (oldest->second.empty()) kept.erase(oldest);
            size_of.erase(block);
            evicted.push_back(block);
        }
    }
};

Pool& pool() {
    static Pool* p = [] {
        auto* made = new Pool;  // never destroyed: see memory.h
#if defined(__linux__) || defined(__APPLE__)
        pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
#endif
        return made;
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
#if defined(__linux__)
    if (bytes >= huge) madvise(block, bytes, MADV_HUGEPAGE);
#endif
    return block;
}

void free_all(const std::vector<void*>& blocks) {
    for (void* block : blocks) std::free(block);
}

}  // namespace

void* acquire_block(std::size_t bytes) {
    Pool& p = pool();
    const std::size_t size = size_class(bytes);
    std::vector<void*> evicted;
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        if (const auto found = p.kept.find(size); found != p.kept.end()) {
            void* block = found->second.back().block;
            found->second.pop_back();
            if (found->second.empty()) p.kept.erase(found);
            p.held -= std::int64_t(size);
            p.in_use += std::int64_t(size);
            p.peak_in_use = std::max(p.peak_in_use, p.in_use);
            ++p.reused;
            return block;
        }
        // Evict blocks of sizes that are no longer requested: kept and used bytes together stay within twice the peak
        // of the used bytes. A factor of 5/4 evicted blocks that the other half of a training step needs (MobileNetV2:
        // 130 of 260 blocks fresh per step, 2x the system time) and did not lower the peak.
        p.evict(std::max<std::int64_t>(0, p.peak_in_use * 2 - p.in_use - std::int64_t(size)), evicted);
    }
    free_all(evicted);
    void* block = allocate(size);
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.size_of[block] = size;
    p.in_use += std::int64_t(size);
    p.peak_in_use = std::max(p.peak_in_use, p.in_use);
    ++p.fresh;
    return block;
}

void release_block(void* block) noexcept {
    Pool& p = pool();
    std::vector<void*> evicted;
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        const std::size_t size = p.size_of.at(block);
        p.in_use -= std::int64_t(size);
        if (std::int64_t(size) <= p.limit) {
            p.kept[size].push_back({block, p.events++});
            p.held += std::int64_t(size);
            p.evict(p.limit, evicted);
        } else {  // larger than the limit: free it and keep the others
            p.size_of.erase(block);
            evicted.push_back(block);
        }
    }
    free_all(evicted);
}

MemoryStatistics memory_statistics() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    return {p.held, p.limit, p.in_use, p.reused, p.fresh};
}

void clear_memory() {
    Pool& p = pool();
    std::vector<void*> evicted;
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        p.evict(0, evicted);
        p.peak_in_use = p.in_use;
    }
    free_all(evicted);
}

void set_memory_limit(std::int64_t bytes) {
    Pool& p = pool();
    std::vector<void*> evicted;
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        p.limit = std::max<std::int64_t>(0, bytes);
        p.evict(p.limit, evicted);
    }
    free_all(evicted);
}

double* thread_scratch(std::size_t doubles) {
    struct Buffer {
        double* data = nullptr;
        std::size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffer;
    if (doubles > buffer.size) {
        void* grown = nullptr;
        if (posix_memalign(&grown, 64, doubles * sizeof(double)) != 0) throw std::bad_alloc();
        std::free(buffer.data);
        buffer.data = static_cast<double*>(grown);
        buffer.size = doubles;
    }
    return buffer.data;
}

}  // namespace bnfast
