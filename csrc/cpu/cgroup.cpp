// /proc/self/cgroup says which group the process is in, per hierarchy; /proc/self/mountinfo says where the hierarchies
// are mounted, and with which of their groups at the top. A group's limits bind all groups inside it.
//
//   version 2   "0::/user/job"               cpu.max "150000 100000" or "max 100000"; memory.max, bytes or "max"
//   version 1   "4:cpu,cpuacct:/user/job"    cpu.cfs_quota_us (-1: none), cpu.cfs_period_us; memory.limit_in_bytes
#include "cgroup.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "files.h"

namespace bnfast {
namespace {

// "\040" is a space there.
std::string unescaped(const std::string& text) {
    std::string plain;
    for (std::size_t i = 0; i < text.size(); ++i)
        if (text[i] == '\\' && i + 3 < text.size()) {
            plain += char(std::strtol(text.substr(i + 1, 3).c_str(), nullptr, 8));
            i += 3;
        } else {
            plain += text[i];
        }
    return plain;
}

bool lists(const std::string& names, const std::string& name) {
    return ("," + names + ",").find("," + name + ",") != std::string::npos;
}

struct Mount {
    std::string type, top, folder, options;  // top: the group that the folder shows
};

// "36 35 98:0 /top /folder rw,noatime master:1 - cgroup2 source rw,options"
std::vector<Mount> cgroup_mounts(const std::string& root) {
    std::vector<Mount> mounts;
    for (const std::string& line : lines_of(root + "/proc/self/mountinfo")) {
        const auto dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        const std::vector<std::string> before = words_of(line.substr(0, dash)), after = words_of(line.substr(dash + 3));
        if (before.size() < 5 || after.size() < 3 || (after[0] != "cgroup" && after[0] != "cgroup2")) continue;
        mounts.push_back({after[0], unescaped(before[3]), unescaped(before[4]), after[2]});
    }
    return mounts;
}

// The folders of a group and of all that enclose it, as far as the mount shows them.
std::vector<std::string> folders(const std::string& root, const Mount& mount, std::string group) {
    const std::string top = mount.top == "/" ? "" : mount.top;
    // A group outside the mount, or above the namespace ("/../job"): of its limits those of the mount's top are seen.
    if (group.compare(0, top.size(), top) != 0 || (group.size() > top.size() && group[top.size()] != '/') ||
        group.find("/..") != std::string::npos)
        group = top;
    group.erase(0, top.size());
    std::vector<std::string> found;
    for (;;) {
        while (!group.empty() && group.back() == '/') group.pop_back();
        found.push_back(root + mount.folder + group);
        if (group.empty()) return found;
        group.erase(group.rfind('/'));
    }
}

void lower(double& limit, double value) {
    if (value > 0 && (limit == 0 || value < limit)) limit = value;
}
void lower(std::int64_t& limit, const std::string& text) {  // "max", "" and an overflow count as none
    const std::int64_t value = std::strtoll(text.c_str(), nullptr, 10);
    if (value > 0 && value < INT64_MAX / 4096 * 4096 && (limit == 0 || value < limit)) limit = value;
}

void read_limits(const std::string& folder, CgroupLimits& limits) {
    const auto lower_to = [&](const std::string& quota, const std::string& period) {
        const double q = std::atof(quota.c_str()), p = std::atof(period.c_str());  // 0 for "max" and ""
        if (q > 0 && p > 0) lower(limits.processors, q / p);
    };
    const std::vector<std::string> cpu_max = words_of(first_line(folder + "/cpu.max"));
    if (cpu_max.size() == 2) lower_to(cpu_max[0], cpu_max[1]);
    lower_to(first_line(folder + "/cpu.cfs_quota_us"), first_line(folder + "/cpu.cfs_period_us"));
    lower(limits.memory, first_line(folder + "/memory.max"));
    lower(limits.memory, first_line(folder + "/memory.limit_in_bytes"));
}

}  // namespace

CgroupLimits cgroup_limits(const std::string& root) {
    CgroupLimits limits;
    const std::vector<Mount> mounts = cgroup_mounts(root);
    for (const std::string& line : lines_of(root + "/proc/self/cgroup")) {
        const auto first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1), group = line.substr(second + 1);
        for (const Mount& mount : mounts) {
            const bool v2 = mount.type == "cgroup2";
            if (v2 != controllers.empty()) continue;
            const auto is_for = [&](const char* name) {
                return lists(controllers, name) && lists(mount.options, name);
            };
            if (!v2 && !is_for("cpu") && !is_for("memory")) continue;
            for (const std::string& folder : folders(root, mount, group)) read_limits(folder, limits);
        }
    }
    return limits;
}

}  // namespace bnfast
