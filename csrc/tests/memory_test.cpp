// The memory pool (alignment, reuse, limit, clearing, many threads) and the scratch buffer per thread.
#include <doctest/doctest.h>

#include <cstring>
#include <new>
#include <set>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "cpu/memory.h"

using namespace bnfast;

namespace {

// Starts a test with an empty pool; restores the limit and empties the pool at the end.
struct FreshPool {
    const MemoryStatistics before;
    FreshPool() : before((clear_memory(), memory_statistics())) {}
    ~FreshPool() {
        set_memory_limit(before.limit_bytes);
        clear_memory();
    }
};

}  // namespace

TEST_CASE("round_up_to_line gives whole lines of 8 doubles") {
    for (std::int64_t n : {0, 1, 7, 8, 9, 64, 65}) {
        const std::int64_t rounded = round_up_to_line(n);
        CHECK((rounded % 8 == 0 && rounded >= n && rounded < n + 8));
    }
}

TEST_CASE("blocks of every size are 64-byte aligned, fully writable and disjoint") {
    const FreshPool pool;
    std::vector<std::pair<unsigned char*, std::size_t>> blocks;
    constexpr int huge = 2 << 20;
    for (std::size_t bytes : {0, 1, 63, 64, 65, 1000, 4096, 4097, 100000, huge - 1, huge, huge + 1, 5000000}) {
        auto* block = static_cast<unsigned char*>(acquire_block(bytes));
        CHECK(reinterpret_cast<std::uintptr_t>(block) % 64 == 0);
        std::memset(block, int(blocks.size()), bytes);
        blocks.emplace_back(block, bytes);
    }
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        std::size_t wrong = 0;
        for (std::size_t k = 0; k < blocks[i].second; ++k) wrong += blocks[i].first[k] != i;
        CHECK(wrong == 0);
        release_block(blocks[i].first);
    }
    CHECK(memory_statistics().in_use_bytes == pool.before.in_use_bytes);
}

TEST_CASE("a released block is reused for the next request of its size, and only for one at a time") {
    const FreshPool pool;
    void* first = acquire_block(100000);
    void* second = acquire_block(100000);
    CHECK(first != second);
    CHECK(memory_statistics().fresh == pool.before.fresh + 2);
    CHECK(memory_statistics().in_use_bytes >= pool.before.in_use_bytes + 200000);
    release_block(first);
    CHECK(memory_statistics().held_bytes >= 100000);
    CHECK(acquire_block(99999) == first);  // same size class
    CHECK(memory_statistics().reused == pool.before.reused + 1);
    CHECK(memory_statistics().held_bytes == 0);
    void* larger = acquire_block(200000);
    CHECK(larger != first);
    for (void* block : {first, second, larger}) release_block(block);
}

TEST_CASE("a size class wastes at most an eighth") {
    const FreshPool pool;
    for (std::size_t bytes = 1024; bytes < 40000000; bytes = bytes * 9 / 7 + 1) {
        const std::int64_t before = memory_statistics().in_use_bytes;
        void* block = acquire_block(bytes);
        const std::int64_t taken = memory_statistics().in_use_bytes - before;
        CHECK(taken >= std::int64_t(bytes));
        CHECK(double(taken) <= double(bytes) * 1.125 + 64);
        release_block(block);
    }
}

TEST_CASE("the limit bounds the blocks kept for reuse; clearing frees them and leaves blocks in use alone") {
    const FreshPool pool;
    auto* used = static_cast<char*>(acquire_block(1 << 20));
    used[0] = 42;
    release_block(acquire_block(1 << 20));
    CHECK(memory_statistics().held_bytes == 1 << 20);
    clear_memory();
    CHECK(memory_statistics().held_bytes == 0);
    CHECK(used[0] == 42);

    set_memory_limit(3 << 20);
    CHECK(memory_statistics().limit_bytes == 3 << 20);
    std::vector<void*> blocks;
    for (int i = 0; i < 8; ++i) blocks.push_back(acquire_block(1 << 20));
    for (void* block : blocks) {
        release_block(block);
        CHECK(memory_statistics().held_bytes <= 3 << 20);
    }
    CHECK(memory_statistics().held_bytes == 3 << 20);
    set_memory_limit(1 << 20);
    CHECK(memory_statistics().held_bytes <= 1 << 20);
    set_memory_limit(0);
    release_block(used);
    CHECK(memory_statistics().held_bytes == 0);
    CHECK(memory_statistics().in_use_bytes == pool.before.in_use_bytes);
}

TEST_CASE("above the limit, the blocks kept longest are freed first") {
    const FreshPool pool;
    set_memory_limit(5 << 20);
    std::vector<void*> older, newer;
    for (int i = 0; i < 4; ++i) older.push_back(acquire_block(1 << 20));
    for (int i = 0; i < 2; ++i) newer.push_back(acquire_block(2 << 20));
    for (void* block : older) release_block(block);
    for (void* block : newer) release_block(block);
    CHECK(memory_statistics().held_bytes == 5 << 20);
    const std::int64_t fresh = memory_statistics().fresh;
    for (void*& block : newer) block = acquire_block(2 << 20);
    CHECK(memory_statistics().fresh == fresh);
    CHECK(acquire_block(1 << 20) == older[3]);
    CHECK(memory_statistics().held_bytes == 0);
    for (void* block : {newer[0], newer[1], older[3]}) release_block(block);
}

TEST_CASE("releasing a block larger than the limit frees no other blocks") {
    const FreshPool pool;
    set_memory_limit(4 << 20);
    void* small = acquire_block(1 << 20);
    void* large = acquire_block(8 << 20);
    release_block(small);
    release_block(large);
    CHECK(memory_statistics().held_bytes == 1 << 20);
    CHECK(acquire_block(1 << 20) == small);
    release_block(small);
}

TEST_CASE("sizes no longer requested are freed: at most twice the peak use is held") {
    const FreshPool pool;
    for (std::size_t megabytes = 8; megabytes < 13; ++megabytes) {
        std::vector<void*> blocks;
        for (int i = 0; i < 4; ++i) blocks.push_back(acquire_block(megabytes << 20));
        for (void* block : blocks) release_block(block);
        const std::int64_t held = memory_statistics().held_bytes;
        CHECK(held >= std::int64_t(4 * megabytes << 20));
        CHECK(held <= std::int64_t(8 * megabytes << 20));
    }
    const std::int64_t fresh = memory_statistics().fresh;
    release_block(acquire_block(12 << 20));
    CHECK(memory_statistics().fresh == fresh);
}

TEST_CASE("an impossible size throws std::bad_alloc immediately") {
    const FreshPool pool;
    for (std::size_t bytes : {std::size_t(1) << 60, std::size_t(1) << 63, (std::size_t(1) << 63) + 4, ~std::size_t(0)})
        CHECK_THROWS_AS(acquire_block(bytes), std::bad_alloc);
    CHECK(memory_statistics().in_use_bytes == pool.before.in_use_bytes);
}

TEST_CASE("no two threads get the same block") {
    const FreshPool pool;
    std::vector<std::thread> threads;
    std::vector<int> wrong(8, 0);
    for (int t = 0; t < 8; ++t)
        threads.emplace_back([t, &wrong] {
            for (int i = 0; i < 2000; ++i) {
                const std::size_t bytes = 64 + std::size_t(i * 37 % 5) * 3000;
                auto* block = static_cast<unsigned char*>(acquire_block(bytes));
                std::memset(block, t, bytes);
                if (i % 16 == 0) std::this_thread::yield();
                if (i % 500 == 0) clear_memory();
                for (std::size_t k = 0; k < bytes; k += 61) wrong[std::size_t(t)] += block[k] != t;
                release_block(block);
            }
        });
    for (auto& thread : threads) thread.join();
    CHECK(wrong == std::vector<int>(8, 0));
    CHECK(memory_statistics().in_use_bytes == pool.before.in_use_bytes);
}

#if defined(__linux__)
TEST_CASE("after fork, child and parent each have the pool as it was") {
    const FreshPool pool;
    void* const kept = acquire_block(5000);
    release_block(kept);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);  // a lock that the fork took along would hang
        _exit(acquire_block(5000) == kept ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    void* const again = acquire_block(5000);
    CHECK(again == kept);
    release_block(again);
}
#endif

TEST_CASE("scratch is aligned, grows, doesn't move while it is large enough, and is per thread") {
    double* small = thread_scratch(10);
    CHECK(reinterpret_cast<std::uintptr_t>(small) % 64 == 0);
    double* large = thread_scratch(1 << 20);
    CHECK(reinterpret_cast<std::uintptr_t>(large) % 64 == 0);
    large[(1 << 20) - 1] = 1;
    CHECK(thread_scratch(10) == large);
    CHECK(thread_scratch(1 << 20) == large);
    double* other = nullptr;
    std::thread([&] {
        other = thread_scratch(10);
        other[0] = 2;
    }).join();
    CHECK(other != large);
}
