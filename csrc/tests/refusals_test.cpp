// What the system refuses: threads, a thread's own values, masks of processors. A call then works with what there is.
// Each case runs in a process of its own, in which nothing was had before.
#include <doctest/doctest.h>

#include <dirent.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <new>
#include <thread>
#include <vector>

#include "bnfast/bnfast.h"
#include "cpu/dispatch/isa.h"
#include "cpu/machine.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "refusing_system.h"

extern "C" void __gcov_dump() __attribute__((weak));  // the counts of a coverage build, which _exit would lose

using namespace bnfast;
using namespace bnfast::test;

namespace {

int in_child(const std::function<int()>& f) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        const int status = f();
        refuse(nothing);
        if (__gcov_dump) __gcov_dump();
        _exit(status);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int team_of(int wanted) {
    parallel(wanted, [](Team& team) { team.for_each(100, false, [](std::int64_t) {}); });
    return last_team_size();
}
void wait_for_another_try() { std::this_thread::sleep_for(std::chrono::milliseconds(150)); }

std::vector<pid_t> other_threads() {
    std::vector<pid_t> found;
    DIR* const folder = opendir("/proc/self/task");
    while (const dirent* entry = readdir(folder))
        if (const int tid = std::atoi(entry->d_name); tid > 0 && tid != getpid()) found.push_back(tid);
    closedir(folder);
    return found;
}
cpu_set_t mask_of(pid_t thread) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    sched_getaffinity(thread, sizeof mask, &mask);
    return mask;
}
cpu_set_t only(int cpu) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(cpu, &mask);
    return mask;
}
bool pinned(pid_t thread, const cpu_set_t& mask) { return sched_setaffinity(thread, sizeof mask, &mask) == 0; }

// Until the workers sleep, so that the next job wakes them, which is when they are placed.
void let_workers_sleep() { std::this_thread::sleep_for(std::chrono::milliseconds(30)); }

}  // namespace

TEST_CASE("without threads the caller works alone, and a later call tries again") {
    for (const int functions : {int(threads), int(thread_attributes)})
        CHECK(in_child([&] {
                  set_full_team(true);
                  refuse(functions);
                  if (team_of(4) != 1) return 1;
                  refuse(nothing);
                  if (team_of(4) != 1) return 2;  // no call tries so soon again
                  wait_for_another_try();
                  return team_of(4) == 4 ? 0 : 3;
              }) == 0);
    CHECK(in_child([] {
              set_full_team(true);
              refuse(threads, 1);
              return team_of(4) == 2 ? 0 : 1;  // the one that was had
          }) == 0);
}

TEST_CASE("without a thread's own values there is no scratch memory, and small records are left out") {
    CHECK(in_child([] {
              float x[4] = {1, 2, 3, 4}, y[4];
              double mean[2], variance[2], invstd[2];
              TrainArgs a;
              a.x = x;
              a.y = y;
              a.shape = {2, 2, 1};
              a.mean = mean;
              a.variance = variance;
              a.invstd = invstd;
              int wrong = 1;
              std::thread([&] {  // a thread that has no values yet
                  refuse(thread_values);
                  try {
                      train(a);
                  } catch (const std::bad_alloc&) {
                      wrong = team_of(3) != 1 || *last_isa() != '\0';
                  }
                  refuse(nothing);
              })
                  .join();
              train(a);
              return wrong || mean[0] != 2;
          }) == 0);
}

TEST_CASE("without handlers of fork there is no pool of memory, until they can be had") {
    CHECK(in_child([] {
              refuse(fork_handlers);
              try {
                  release_block(acquire_block(100));
                  return 1;
              } catch (const std::bad_alloc&) {
              }
              refuse(nothing);
              release_block(acquire_block(100));
              return memory_statistics().held_bytes >= 100 ? 0 : 2;
          }) == 0);
}

TEST_CASE("without masks of processors every thread of the hardware counts, and workers stay where they are") {
    CHECK(in_child([] {
              refuse(reading_affinity);
              if (machine().threads < 1) return 1;
              set_full_team(true);
              if (team_of(3) != 3) return 2;
              let_workers_sleep();
              if (team_of(3) != 3) return 3;
              refuse(nothing);
              let_workers_sleep();
              return team_of(3) == 3 ? 0 : 4;
          }) == 0);
}

TEST_CASE("a worker keeps off the caller's processor, inside the masks that the host gave") {
    const cpu_set_t all = mask_of(0);
    std::vector<int> cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE && cpus.size() < 2; ++cpu)
        if (CPU_ISSET(cpu, &all)) cpus.push_back(cpu);
    if (cpus.size() < 2) return;  // nowhere to keep off to
    CHECK(in_child([&] {
              const cpu_set_t first = only(cpus[0]), second = only(cpus[1]);
              const auto run = [] {
                  let_workers_sleep();
                  return team_of(2) == 2;
              };
              set_full_team(true);
              if (team_of(2) != 2) return 1;
              const auto others = other_threads();
              if (others.size() != 1) return 2;
              const pid_t worker = others[0];
              // The caller alone moves: the worker keeps off it, and nothing is set where the system refuses.
              refuse(setting_affinity);
              if (!run()) return 3;
              refuse(nothing);
              bool off = false;  // on a busy machine a worker may not sleep yet, and then isn't placed
              std::thread([&] {
                  for (int tries = 0; tries < 300 && !off; ++tries) {
                      // Where the system refused, nothing is tried again before the caller moves.
                      for (const cpu_set_t& place : {second, first}) {
                          pinned(0, place);
                          run();
                      }
                      const cpu_set_t mask = mask_of(worker);
                      off = !CPU_ISSET(cpus[0], &mask);
                  }
              }).join();
              if (!off) return 4;
              // The host gives the worker one processor, the caller's: it may use that one.
              pinned(worker, first);
              std::thread([&] {
                  pinned(0, first);
                  run();
                  run();
              }).join();
              const cpu_set_t kept = mask_of(worker);
              if (!CPU_EQUAL(&kept, &first)) return 5;
              // The process is moved elsewhere: the worker's own mask counts.
              pinned(0, second);
              if (!run()) return 6;
              const cpu_set_t own = mask_of(worker);
              return CPU_EQUAL(&own, &first) ? 0 : 7;
          }) == 0);
}
