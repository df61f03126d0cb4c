// Memory for outputs and scratch.
//
// Output blocks are 64-byte aligned, so that TensorFlow adopts them without a copy; blocks of 2 MiB and more ask the
// system for huge pages. A released block is kept for reuse: a call of the same size then has no page faults, which
// cost about 1.45 us per 4 KiB page. The pool has a size limit and works after fork. It is never destroyed, because the
// last owner of a block may outlive the interpreter.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bnfast {

// Asks for huge pages, which cost a fault per 2 MiB instead of one per 4 KiB. For memory that is still to be written.
void ask_for_huge_pages(void* begin, std::size_t bytes) noexcept;

void* acquire_block(std::size_t bytes);  // throws std::bad_alloc
void release_block(void* block) noexcept;

struct MemoryStatistics {
    std::int64_t held_bytes, limit_bytes, in_use_bytes, reused, fresh;
};
MemoryStatistics memory_statistics();
void clear_memory();                        // returns all unused blocks to the system
void set_memory_limit(std::int64_t bytes);  // limit of the blocks kept for reuse

// To whole cache lines of 64 bytes, so that arrays of different threads share none.
constexpr std::int64_t round_up_to_line(std::int64_t doubles) { return (doubles + 7) / 8 * 8; }

// The calling thread's scratch buffer. It only grows, and is valid until the next call on the same thread.
double* thread_scratch(std::size_t doubles);

}  // namespace bnfast
