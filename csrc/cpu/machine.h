// What the machine offers this process: cache sizes, memory and usable processors. Read once, at the first call.
#pragma once
#include <cstdint>
#include <string>

namespace bnfast {

struct Machine {
    std::int64_t l1d = 32 << 10, l2 = 1 << 20, l3 = 8 << 20;  // bytes: L1d and L2 per core; usable shared L3
    int threads = 1;                                          // min(affinity, cgroup quota)
    std::string threads_reason;
    std::int64_t memory = 0;  // bytes: min(physical memory, cgroup limit); 0: unknown
};
const Machine& machine();

// What `machine` reads. `root` comes before /proc and /sys: tests give a folder of their own.
Machine detect_machine(const std::string& root = "");

// The part of a last-level cache of `bytes` that a process on `processors` may expect to use: at most
// max(32 MiB, 4 MiB per processor). A virtual machine reports the L3 of the whole socket (2 processors, 260 MiB), which
// it shares with other guests.
std::int64_t usable_llc_bytes(std::int64_t bytes, int processors);

}  // namespace bnfast
