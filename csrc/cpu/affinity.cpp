#include "affinity.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace bnfast {

WorkerAffinity::WorkerAffinity() : process_(getpid()) { CPU_ZERO(&process_mask_); }

void WorkerAffinity::join(Worker& worker) {
    worker.tid = pid_t(syscall(SYS_gettid));
    worker.known = sched_getaffinity(0, sizeof worker.allowed, &worker.allowed) == 0;
    worker.set = worker.allowed;
    worker.next = workers_.load(std::memory_order_relaxed);
    while (!workers_.compare_exchange_weak(worker.next, &worker, std::memory_order_acq_rel)) {
    }
}

void WorkerAffinity::avoid_caller() {
    const int cpu = sched_getcpu();
    cpu_set_t process;
    if (cpu < 0 || sched_getaffinity(process_, sizeof process, &process) != 0) return;
    Worker* const first = workers_.load(std::memory_order_acquire);
    if (cpu == avoided_ && first == placed_ && CPU_EQUAL(&process, &process_mask_)) return;
    for (Worker* worker = first; worker; worker = worker->next)
        if (worker->known) place(*worker, cpu, process);
    avoided_ = cpu;
    placed_ = first;
    process_mask_ = process;
}

void WorkerAffinity::place(Worker& worker, int cpu, const cpu_set_t& process) {
    cpu_set_t now, limit;
    if (sched_getaffinity(worker.tid, sizeof now, &now) != 0) return;
    if (!CPU_EQUAL(&now, &worker.set)) worker.allowed = now;  // somebody else has set it
    CPU_AND(&limit, &worker.allowed, &process);
    if (CPU_COUNT(&limit) == 0) limit = worker.allowed;  // the main thread is pinned elsewhere
    cpu_set_t target = limit;
    CPU_CLR(cpu, &target);
    if (CPU_COUNT(&target) == 0) target = limit;
    if (CPU_EQUAL(&target, &now)) worker.set = now;
    else if (sched_setaffinity(worker.tid, sizeof target, &target) == 0) worker.set = target;
}

}  // namespace bnfast
#endif
