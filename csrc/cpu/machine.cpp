#include "machine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__linux__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "cgroup.h"
#include "environment.h"
#include "files.h"

namespace bnfast {
namespace {

std::int64_t parse_size(const std::string& text) {  // "32K", "1024K", "32M"
    if (text.empty()) return 0;
    const std::int64_t n = std::strtoll(text.c_str(), nullptr, 10);
    const char unit = text.back();
    return unit == 'K' ? n << 10 : unit == 'M' ? n << 20 : n;
}

// Tried before sysconf, which can report the host's L3 under a hypervisor (384 MiB where sysfs has 32 MiB).
std::int64_t sysfs_cache(const std::string& root, int level) {
    for (int i = 0; i < 8; ++i) {
        const std::string dir = root + "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
        if (first_line(dir + "level") != std::to_string(level)) continue;
        if (first_line(dir + "type") == "Instruction") continue;
        return parse_size(first_line(dir + "size"));
    }
    return 0;
}

std::int64_t sysconf_cache(int level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    const int name = level == 1 ? _SC_LEVEL1_DCACHE_SIZE : level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE;
    return std::max<long>(0, sysconf(name));
#else
    return level < 0;
#endif
}

// The largest size that a BNFAST_* variable may give: 1 TiB. The plan multiplies a size by up to 4096 threads, and 2^52
// is far from an int64's end.
constexpr std::int64_t most_cache_bytes = std::int64_t(1) << 40;

// A whole decimal number from 1 to most_cache_bytes, else 0: "1e9" is not 1, and nothing is cut to 64 bits.
std::int64_t whole_size(const char* text) {
    std::int64_t n = 0;
    for (; *text >= '0' && *text <= '9'; ++text) {
        n = 10 * n + (*text - '0');
        if (n > most_cache_bytes) return 0;
    }
    return *text == '\0' ? n : 0;
}

// The environment variable overrides what the machine reports, which may be wrong. It affects speed, never bits.
std::int64_t cache_bytes(const std::string& root, int level, const char* variable, std::int64_t fallback,
                         std::int64_t limit) {
    if (const char* forced = std::getenv(variable)) {
        if (const std::int64_t n = whole_size(forced); n > 0) return n;
        report(std::string(variable) + " must be a whole number of bytes from 1 to " +
               std::to_string(most_cache_bytes) + ". Received: '" + shown(forced) + "'. The detected size is used.");
    }
    std::int64_t n = sysfs_cache(root, level);
    if (n <= 0) n = sysconf_cache(level);
    return n > 0 ? std::min(n, limit) : fallback;
}

int affinity_threads() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

std::int64_t usable_memory(std::int64_t cgroup_limit) {
    std::int64_t bytes = 0;
#if defined(_SC_PHYS_PAGES) && defined(_SC_PAGESIZE)
    bytes = std::max<std::int64_t>(0, std::int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE));
#endif
    return cgroup_limit > 0 && bytes > 0 ? std::min(bytes, cgroup_limit) : bytes;
}

}  // namespace

std::int64_t usable_llc_bytes(std::int64_t bytes, int processors) {
    return std::min(bytes, std::max<std::int64_t>(32, 4 * std::int64_t(processors)) << 20);
}

Machine detect_machine(const std::string& root) {
    Machine m;
    const int affinity = affinity_threads();
    const CgroupLimits limits = cgroup_limits(root);
    const double quota = limits.processors;
    m.threads = affinity;
    m.threads_reason = std::to_string(affinity) + " processors in the affinity mask";
    if (quota > 0 && std::ceil(quota) < affinity) {
        m.threads = std::max(1, int(std::ceil(quota)));
        m.threads_reason += ", cgroup quota of " + std::to_string(quota);
    }
    m.l1d = cache_bytes(root, 1, "BNFAST_L1_BYTES", m.l1d, 1 << 20);
    m.l2 = cache_bytes(root, 2, "BNFAST_L2_BYTES", m.l2, 64 << 20);
    m.l3 = cache_bytes(root, 3, "BNFAST_L3_BYTES", 8 * m.l2, usable_llc_bytes(std::int64_t(512) << 20, m.threads));
    m.memory = usable_memory(limits.memory);
    return m;
}

const Machine& machine() {
    static const Machine m = detect_machine();
    return m;
}

}  // namespace bnfast
