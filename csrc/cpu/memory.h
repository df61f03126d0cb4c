// Memory of outputs and of scratch. Output blocks are 64-byte aligned (TensorFlow adopts such arrays without a copy),
// advised for huge pages above 2 MiB, and kept for reuse when given back, so that a second call of the same size meets
// no page faults (about 1.45 us a 4 KiB page). The pool is bounded, survives fork, and is never destroyed, because the
// last owner of a block may outlive the interpreter.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bnfast {

void* acquire_block(std::size_t bytes);  // throws std::bad_alloc
void release_block(void* block) noexcept;

struct MemoryStatistics {
    std::int64_t held_bytes, limit_bytes, in_use_bytes, reused, fresh;
};
MemoryStatistics memory_statistics();
void clear_memory();                        // gives every block that nobody uses back to the system
void set_memory_limit(std::int64_t bytes);  // of the blocks kept for reuse

constexpr std::int64_t round_up_to_line(std::int64_t doubles) { return (doubles + 7) / 8 * 8; }  // 64 bytes

// Scratch of the calling thread, reused from call to call; grows only. Valid until the next call on the same thread.
double* thread_scratch(std::size_t doubles);

}  // namespace bnfast
