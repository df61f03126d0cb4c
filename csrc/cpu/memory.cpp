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

// Sizes go up in steps of 1/8, so that a block serves requests of nearly its size: at most 12.5 % is wasted.
std::size_t class_of(std::size_t bytes) {
    if (bytes > std::size_t(PTRDIFF_MAX) / 32) throw std::bad_alloc();
    bytes = std::max<std::size_t>(bytes, 64);
    std::size_t step = 64;
    while (step * 16 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

// What may be kept: a quarter of what this process may use. A training step's outputs must all fit or every step pays
// for fresh pages: ResNet50 at batch 16 through numpy_function keeps 950 MB, and took 1.26 times as long with 512 MiB.
std::int64_t default_limit() {
    const std::int64_t least = std::int64_t(512) << 20;
    return std::max(least, machine().memory / 4);
}

struct Kept {
    void* block;
    std::int64_t since;  // when it was given back, in such events
};

// Guarded by `mutex`, all of it.
struct Pool {
    std::mutex mutex;
    std::unordered_map<void*, std::size_t> size_of;            // every block handed out or kept
    std::map<std::size_t, std::deque<Kept>> kept;              // by class, the oldest first
    std::int64_t held = 0, in_use = 0, reused = 0, fresh = 0;  // bytes, bytes, calls, calls
    std::int64_t most_in_use = 0, events = 0;
    std::int64_t limit = default_limit();

    // Moves the blocks that were kept longest to `gone`, until no more than `most` bytes are kept.
    void shed(std::int64_t most, std::vector<void*>& gone) {
        while (held > most) {
            auto oldest = kept.end();
            for (auto it = kept.begin(); it != kept.end(); ++it)
                if (oldest == kept.end() || it->second.front().since < oldest->second.front().since) oldest = it;
            void* block = oldest->second.front().block;
            oldest->second.pop_front();
            held -= std::int64_t(oldest->first);
            if (oldest->second.empty()) kept.erase(oldest);
            size_of.erase(block);
            gone.push_back(block);
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
        clear_memory();  // what is kept may be what the system lacks
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
    const std::size_t size = class_of(bytes);
    std::vector<void*> gone;
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        if (const auto found = p.kept.find(size); found != p.kept.end()) {
            void* block = found->second.back().block;
            found->second.pop_back();
            if (found->second.empty()) p.kept.erase(found);
            p.held -= std::int64_t(size);
            p.in_use += std::int64_t(size);
            p.most_in_use = std::max(p.most_in_use, p.in_use);
            ++p.reused;
            return block;
        }
        // Blocks of sizes that nobody asks for any more make room: kept and in use, all stay within twice what was once
        // in use. 5/4 shed blocks that the other half of a training step takes (MobileNetV2: 130 of 260 fresh a step,
        // twice the time in the kernel), with no lower peak.
        p.shed(std::max<std::int64_t>(0, p.most_in_use * 2 - p.in_use - std::int64_t(size)), gone);
    }
    free_all(gone);
    void* block = allocate(size);
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.size_of[block] = size;
    p.in_use += std::int64_t(size);
    p.most_in_use = std::max(p.most_in_use, p.in_use);
    ++p.fresh;
    return block;
}

void release_block(void* block) noexcept {
    Pool& p = pool();
    std::vector<void*> gone;
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        const std::size_t size = p.size_of.at(block);
        p.in_use -= std::int64_t(size);
        if (std::int64_t(size) <= p.limit) {
            p.kept[size].push_back({block, p.events++});
            p.held += std::int64_t(size);
            p.shed(p.limit, gone);
        } else {  // it alone is too much: no reason to part with the others
            p.size_of.erase(block);
            gone.push_back(block);
        }
    }
    free_all(gone);
}

MemoryStatistics memory_statistics() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    return {p.held, p.limit, p.in_use, p.reused, p.fresh};
}

void clear_memory() {
    Pool& p = pool();
    std::vector<void*> gone;
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        p.shed(0, gone);
        p.most_in_use = p.in_use;
    }
    free_all(gone);
}

void set_memory_limit(std::int64_t bytes) {
    Pool& p = pool();
    std::vector<void*> gone;
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        p.limit = std::max<std::int64_t>(0, bytes);
        p.shed(p.limit, gone);
    }
    free_all(gone);
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
