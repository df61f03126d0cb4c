#include "memory.h"

#include <algorithm>
#include <cstdlib>
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

struct Pool {
    std::mutex mutex;
    std::unordered_map<void*, std::size_t> size_of;            // every block handed out or kept
    std::map<std::size_t, std::vector<void*>> kept;            // by class
    std::int64_t held = 0, in_use = 0, reused = 0, fresh = 0;  // bytes, bytes, calls, calls
    std::int64_t limit = std::int64_t(512) << 20;              // a ResNet-50 step at batch 32 keeps about 300 MB in flight
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
    if (posix_memalign(&block, alignment, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (bytes >= huge) madvise(block, bytes, MADV_HUGEPAGE);
#endif
    return block;
}

}  // namespace

void* acquire_block(std::size_t bytes) {
    Pool& p = pool();
    const std::size_t size = class_of(bytes);
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        const auto found = p.kept.find(size);
        if (found != p.kept.end() && !found->second.empty()) {
            void* block = found->second.back();
            found->second.pop_back();
            p.held -= std::int64_t(size);
            p.in_use += std::int64_t(size);
            ++p.reused;
            return block;
        }
    }
    void* block = allocate(size);
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.size_of[block] = size;
    p.in_use += std::int64_t(size);
    ++p.fresh;
    return block;
}

void release_block(void* block) noexcept {
    Pool& p = pool();
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        const std::size_t size = p.size_of.at(block);
        p.in_use -= std::int64_t(size);
        if (p.held + std::int64_t(size) <= p.limit) {
            p.kept[size].push_back(block);
            p.held += std::int64_t(size);
            return;
        }
        p.size_of.erase(block);
    }
    std::free(block);
}

MemoryStatistics memory_statistics() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    return {p.held, p.limit, p.in_use, p.reused, p.fresh};
}

void clear_memory() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    for (auto& entry : p.kept)
        for (void* block : entry.second) {
            p.size_of.erase(block);
            std::free(block);
        }
    p.kept.clear();
    p.held = 0;
}

void set_memory_limit(std::int64_t bytes) {
    {
        const std::lock_guard<std::mutex> lock(pool().mutex);
        pool().limit = std::max<std::int64_t>(0, bytes);
        if (pool().held <= pool().limit) return;
    }
    clear_memory();
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
