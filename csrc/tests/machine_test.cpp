// What the machine offers: cache sizes, threads, memory; and the environment variables that overrule the sizes.
#include <doctest/doctest.h>

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "cpu/environment.h"
#include "cpu/machine.h"
#include "fake_root.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

// What `call` writes to stderr.
template <class Call> std::string errors_of(Call call) {
    std::FILE* const file = std::tmpfile();
    REQUIRE(file != nullptr);
    std::fflush(stderr);
    const int before = dup(2);
    dup2(fileno(file), 2);
    call();
    std::fflush(stderr);
    dup2(before, 2);
    close(before);
    std::string text(4096, '\0');
    std::rewind(file);
    text.resize(std::fread(text.data(), 1, text.size(), file));
    std::fclose(file);
    return text;
}

}  // namespace

TEST_CASE("a machine has threads, memory and caches") {
    const Machine& m = machine();
    CHECK(m.threads >= 1);
    CHECK(m.threads_reason.find("processors in the affinity mask") != std::string::npos);
    CHECK(m.l1d >= 1024);
    CHECK(m.l2 >= 1024);
    CHECK(m.l3 >= 1024);
    CHECK(m.memory > 64 << 20);
}

TEST_CASE("caches are those of processor 0, data or unified; what isn't told has a default") {
    const FakeRoot root;
    const std::string cache = "/sys/devices/system/cpu/cpu0/cache/index";
    const auto write = [&](int index, const char* level, const char* type, const char* size) {
        root.write(cache + std::to_string(index) + "/level", level);
        root.write(cache + std::to_string(index) + "/type", type);
        root.write(cache + std::to_string(index) + "/size", size);
    };
    write(0, "1", "Instruction", "64K");
    write(1, "1", "Data", "48K");
    write(2, "2", "Unified", "2M");
    write(3, "3", "Unified", "12345678");
    Machine m = detect_machine(root.path());
    CHECK(m.l1d == 48 << 10);
    CHECK(m.l2 == 2 << 20);
    CHECK(m.l3 == 12345678);
    write(2, "2", "Unified", "65M");  // more than any core has
    CHECK(detect_machine(root.path()).l2 == 64 << 20);
    write(1, "1", "Data", "");
    write(2, "2", "Unified", "");
    write(3, "3", "Unified", "");
    const FakeRoot empty;  // then the C library is asked, which may know or not
    for (const std::string& folder : {root.path(), empty.path()}) {
        m = detect_machine(folder);
        CHECK(m.l1d >= 4 << 10);
        CHECK(m.l1d <= 1 << 20);
        CHECK(m.l2 >= 64 << 10);
        CHECK(m.l2 <= 64 << 20);
        CHECK(m.l3 >= 1 << 20);
    }
}

TEST_CASE("threads and memory are at most what the control group allows, and one at least") {
    const FakeRoot root;
    const int most = detect_machine(root.path()).threads;
    const std::int64_t memory = detect_machine(root.path()).memory;
    root.write("/proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw");
    root.write("/proc/self/cgroup", "0::/job");
    root.write("/sys/fs/cgroup/job/memory.max", "100000000");
    root.write("/sys/fs/cgroup/job/cpu.max", "50000 100000");
    Machine m = detect_machine(root.path());
    CHECK(m.threads == 1);
    CHECK(m.memory == 100000000);
    CHECK((m.threads_reason.find("cgroup quota of 0.5") != std::string::npos) == (most > 1));
    root.write("/sys/fs/cgroup/job/cpu.max", "100000000 100000");
    root.write("/sys/fs/cgroup/job/memory.max", "9000000000000000");
    m = detect_machine(root.path());
    CHECK(m.threads == most);
    CHECK(m.memory == memory);
    CHECK(m.threads_reason.find("quota") == std::string::npos);
    if (most > 2) {
        root.write("/sys/fs/cgroup/job/cpu.max", "110000 100000");  // rounded up
        CHECK(detect_machine(root.path()).threads == 2);
    }
}

TEST_CASE("a value is shown in one printable line of at most 80 characters") {
    CHECK(shown("plain text") == "plain text");
    CHECK(shown("a\nb\tc\x7f\xff") == "a?b?c??");
    CHECK(shown(std::string(80, 'x').c_str()) == std::string(80, 'x'));
    CHECK(shown(std::string(81, 'x').c_str()) == std::string(80, 'x') + "...");
    CHECK(errors_of([] { report("text"); }) == "bnfast: text\n");
}

// CTest runs this once per set of variables, each in a process of its own, because sizes are read once.
TEST_CASE("cache sizes of the environment: a whole number of bytes up to 2^40 is taken, all else is told and ignored" *
          doctest::skip()) {
    const std::string said = errors_of([] { machine(); });
    const Machine& m = machine();
    const auto check = [&](const char* variable, std::int64_t size, std::int64_t most) {
        const char* const text = std::getenv(variable);
        REQUIRE(text != nullptr);
        CAPTURE(variable);
        CAPTURE(said);
        const auto reported = said.find(std::string(variable) + " must be a whole number of bytes from 1 to " +
                                        "1099511627776. Received: '" + text + "'. The detected size is used.\n");
        const std::string digits = text;
        const bool valid = digits == "1" || digits == "4096" || digits == "1099511627776";
        CHECK((reported == std::string::npos) == valid);
        if (valid) CHECK(std::to_string(size) == digits);
        else CHECK((size >= 1024 && size <= most));
    };
    check("BNFAST_L1_BYTES", m.l1d, 1 << 20);
    check("BNFAST_L2_BYTES", m.l2, 64 << 20);
    check("BNFAST_L3_BYTES", m.l3, std::int64_t(512) << 20);
}
