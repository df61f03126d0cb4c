// Keeps workers off their caller's processor. Linux (6.18, KVM guest) often woke a worker there although another
// processor was idle; the worker then waited for a time slice, and a job of 0.3 ms took 4.5 ms.
//
// The host's masks come first. A worker's mask is only ever narrowed inside the mask that it started with or that
// somebody else (`taskset -ap`, a cpuset) gave it since, and inside the process's mask, which is the main thread's.
// Where no processor but the caller's is left, the worker may use that one. Linux only; elsewhere nothing is done.
#pragma once
#include <atomic>
#if defined(__linux__)
#include <sched.h>
#include <sys/types.h>
#endif

namespace bnfast {

class WorkerAffinity {
public:
#if defined(__linux__)
    struct Worker {  // lies on the worker's own stack, which lasts as long as the worker: until the process ends
        pid_t tid;
        cpu_set_t allowed;  // the mask that the host gave it
        cpu_set_t set;      // the mask that avoid_caller gave it last
        bool known;         // whether the masks could be read
        Worker* next;
    };
    WorkerAffinity();
    void join(Worker& worker);  // by the worker itself
    void avoid_caller();        // by the one caller that is about to wake workers

private:
    static void place(Worker& worker, int cpu, const cpu_set_t& process);

    pid_t process_;
    std::atomic<Worker*> workers_{nullptr};
    // The state for which the workers were placed: if it still holds, two system calls are all that a wake costs.
    Worker* placed_ = nullptr;
    cpu_set_t process_mask_;
    int avoided_ = -1;
#else
    struct Worker {};
    void join(Worker&) {}
    void avoid_caller() {}
#endif
};

}  // namespace bnfast
