// What this machine gives a process: cache sizes and usable processors. Read once.
#pragma once
#include <cstdint>
#include <string>

namespace bnfast {

struct Machine {
    std::int64_t l1d = 32 << 10, l2 = 1 << 20, l3 = 8 << 20;  // bytes a core, a core, and shared
    int threads = 1;                                           // min(affinity, cgroup quota)
    std::string threads_reason;
};
const Machine& machine();

}  // namespace bnfast
