// The limits of control groups, read from folders that look like /proc and /sys.
#include <doctest/doctest.h>

#include <string>

#include "cpu/cgroup.h"
#include "fake_root.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

struct Root : FakeRoot {
    CgroupLimits limits() const { return cgroup_limits(path()); }
};

const char* const v2_mount = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";

}  // namespace

TEST_CASE("without control groups there are no limits") {
    const Root root;
    CHECK(root.limits().processors == 0);
    CHECK(root.limits().memory == 0);
    root.write("/proc/self/cgroup", "0::/a");
    root.write("/proc/self/mountinfo", v2_mount);
    CHECK(root.limits().processors == 0);
    CHECK(root.limits().memory == 0);
}

TEST_CASE("version 2: the smallest limit of the group and all that enclose it") {
    const Root root;
    root.write("/proc/self/mountinfo", std::string("22 1 0:21 / /proc rw - proc proc rw\n") + v2_mount);
    root.write("/proc/self/cgroup", "0::/outer/middle/inner");
    root.write("/sys/fs/cgroup/outer/cpu.max", "300000 100000");
    root.write("/sys/fs/cgroup/outer/middle/cpu.max", "150000 100000");
    root.write("/sys/fs/cgroup/outer/middle/inner/cpu.max", "max 100000");
    root.write("/sys/fs/cgroup/outer/memory.max", "4000000000");
    root.write("/sys/fs/cgroup/outer/middle/memory.max", "max");
    root.write("/sys/fs/cgroup/outer/middle/inner/memory.max", "6000000000");
    root.write("/sys/fs/cgroup/other/cpu.max", "10000 100000");
    CHECK(root.limits().processors == 1.5);
    CHECK(root.limits().memory == 4000000000);
    root.write("/proc/self/cgroup", "0::/outer");
    CHECK(root.limits().processors == 3);
    root.write("/proc/self/cgroup", "0::/");
    CHECK(root.limits().processors == 0);
}

TEST_CASE("a container sees its own group at the top of the mount") {
    const Root root;
    root.write("/proc/self/cgroup", "0::/");  // a namespace of its own
    root.write("/proc/self/mountinfo", v2_mount);
    root.write("/sys/fs/cgroup/cpu.max", "50000 100000");
    root.write("/sys/fs/cgroup/memory.max", "1000000");
    CHECK(root.limits().processors == 0.5);
    CHECK(root.limits().memory == 1000000);
    root.write("/proc/self/cgroup", "0::/../other");  // moved out of its namespace
    CHECK(root.limits().processors == 0.5);
    root.write("/proc/self/cgroup", "0::/docker/abc");  // no namespace, and a mount that shows only the group
    root.write("/proc/self/mountinfo", "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw");
    CHECK(root.limits().processors == 0.5);
    root.write("/proc/self/cgroup", "0::/docker/abcd");  // another group, whose name starts like it
    CHECK(root.limits().processors == 0.5);
    root.write("/proc/self/cgroup", "0::/docker/abc/inner");
    root.write("/sys/fs/cgroup/inner/cpu.max", "20000 100000");
    CHECK(root.limits().processors == 0.2);
}

TEST_CASE("version 1: every hierarchy by its controllers, the smallest limit of all that enclose") {
    const Root root;
    root.write("/proc/self/cgroup", "12:memory:/job/step\n4:cpu,cpuacct:/job/step\n1:name=systemd:/job/step\n0::/job");
    root.write("/proc/self/mountinfo",
               "33 24 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup none rw,cpu,cpuacct\n"
               "34 24 0:30 / /sys/fs/cgroup/memory rw - cgroup none rw,memory\n"
               "35 24 0:31 / /sys/fs/cgroup/systemd rw - cgroup none rw,name=systemd");
    const std::string cpu = "/sys/fs/cgroup/cpu,cpuacct/", memory = "/sys/fs/cgroup/memory/";
    root.write(cpu + "cpu.cfs_quota_us", "-1");
    root.write(cpu + "cpu.cfs_period_us", "100000");
    root.write(cpu + "job/cpu.cfs_quota_us", "250000");
    root.write(cpu + "job/cpu.cfs_period_us", "100000");
    root.write(cpu + "job/step/cpu.cfs_quota_us", "-1");
    root.write(cpu + "job/step/cpu.cfs_period_us", "100000");
    root.write(memory + "memory.limit_in_bytes", "9223372036854771712");  // no limit
    root.write(memory + "job/memory.limit_in_bytes", "2000000000");
    root.write(memory + "job/step/memory.limit_in_bytes", "9223372036854771712");
    root.write("/sys/fs/cgroup/systemd/job/cpu.cfs_quota_us", "1000");
    root.write("/sys/fs/cgroup/systemd/job/cpu.cfs_period_us", "100000");
    CHECK(root.limits().processors == 2.5);
    CHECK(root.limits().memory == 2000000000);
}

TEST_CASE("a path with spaces, and lines that aren't what they should be") {
    const Root root;
    root.write("/proc/self/cgroup", "nonsense\n0::/my job\n:\n");
    root.write("/proc/self/mountinfo", "nonsense\n30 23 0:26 / /sys/fs/c\\040g rw - cgroup2 none rw\n - cgroup2\n");
    root.write("/sys/fs/c g/my job/cpu.max", "100000 100000");
    root.write("/sys/fs/c g/cpu.max", "nonsense");
    root.write("/sys/fs/c g/memory.max", "-5");
    CHECK(root.limits().processors == 1);
    CHECK(root.limits().memory == 0);
}
