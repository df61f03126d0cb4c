// What this machine gives a process: cache sizes, memory and usable processors. Read once.
#pragma once
#include <cstdint>
#include <string>

namespace bnfast {

struct Machine {
    std::int64_t l1d = 32 << 10, l2 = 1 << 20, l3 = 8 << 20;  // bytes a core, a core, and counted on of the shared
    int threads = 1;                                          // min(affinity, cgroup quota)
    std::string threads_reason;
    std::int64_t memory = 0;  // bytes: min(physical, cgroup limit); 0: unknown
};
const Machine& machine();

// What `processors` can count on of a last-level cache of `bytes`: 4 MiB each, and 32 MiB in any case. A guest is told
// of its socket's whole cache (2 processors, 260 MiB), where others' data lie.
std::int64_t usable_llc_bytes(std::int64_t bytes, int processors);

}  // namespace bnfast
