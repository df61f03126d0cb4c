// /proc/self/cgroup says which group the process is in, per hierarchy; /proc/self/mountinfo says where the hierarchies
// are mounted, and with which of their groups at the top. A group's limits bind all groups inside it.
//
//   version 2   "0::/user/job"               cpu.max "150000 100000" or "max 100000"; memory.max, bytes or "max"
//   version 1   "4:cpu,cpuacct:/user/job"    cpu.cfs_quota_us (-1: none), cpu.cfs_period_us; memory.limit_in_bytes
#include "cgroup.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <vector>

namespace bnfast {
namespace {

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

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
    std::ifstream file(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(file, line);) {
        const auto dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        std::istringstream before(line.substr(0, dash)), after(line.substr(dash + 3));
        std::string id, parent, device, source;
        Mount m;
        before >> id >> parent >> device >> m.top >> m.folder;
        after >> m.type >> source >> m.options;
        if (m.type != "cgroup" && m.type != "cgroup2") continue;
        m.top = unescaped(m.top);
        m.folder = unescaped(m.folder);
        mounts.push_back(std::move(m));
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
    std::istringstream cpu_max(first_line(folder + "/cpu.max"));
    double quota = 0, period = 0;
    if (cpu_max >> quota >> period && period > 0) lower(limits.processors, quota / period);
    quota = std::atof(first_line(folder + "/cpu.cfs_quota_us").c_str());
    period = std::atof(first_line(folder + "/cpu.cfs_period_us").c_str());
    if (quota > 0 && period > 0) lower(limits.processors, quota / period);
    lower(limits.memory, first_line(folder + "/memory.max"));
    lower(limits.memory, first_line(folder + "/memory.limit_in_bytes"));
}

}  // namespace

CgroupLimits cgroup_limits(const std::string& root) {
    CgroupLimits limits;
    const std::vector<Mount> mounts = cgroup_mounts(root);
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
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
