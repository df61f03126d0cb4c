// What this machine gives a process: cache sizes, memory and usable processors. Read once.
#pragma once
#include <cstdint>
#include <string>

namespace bnfast {

struct Machine {
    std::int64_t l1d = 32 << 10, l2 = 1 << 20, l3 = 8 << 20;  // bytes a core, a core, and shared
    int threads = 1;                                           // min(affinity, cgroup quota)
    std::string threads_reason;
    std::int64_t memory = 0;                                   // bytes: min(physical, cgroup limit); 0: unknown
};
const Machine& machine();

}  // namespace bnfast
