// The limits of this process's control groups (Linux): its own groups and all that enclose them, version 1 and 2.
#pragma once
#include <cstdint>
#include <string>

namespace bnfast {

struct CgroupLimits {
    double processors = 0;    // the smallest CPU quota, quota / period; 0: none
    std::int64_t memory = 0;  // bytes, the smallest limit; 0: none
};
// `root` comes before /proc and /sys: tests give a folder of their own.
CgroupLimits cgroup_limits(const std::string& root = "");

}  // namespace bnfast
