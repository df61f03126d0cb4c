// Functions of the C library that refuse on request, in place of its own: refuse() says which. Linked into a test.
#include "refusing_system.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cerrno>

namespace bnfast::test {
namespace {

std::atomic<int> refused{0}, threads_left{0};

template <class Function> Function* real(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

void refuse(int functions, int threads_first) {
    threads_left = threads_first;
    refused = functions;
}

}  // namespace bnfast::test

using namespace bnfast::test;

extern "C" {

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
    if ((refused & threads) && threads_left-- <= 0) return EAGAIN;
    return real<decltype(pthread_create)>("pthread_create")(thread, attributes, start, argument);
}
int pthread_attr_init(pthread_attr_t* attributes) noexcept {
    if (refused & thread_attributes) return ENOMEM;
    return real<decltype(pthread_attr_init)>("pthread_attr_init")(attributes);
}
// What pthread_atfork calls.
int __register_atfork(void (*prepare)(), void (*parent)(), void (*child)(), void* object) noexcept {
    if (refused & fork_handlers) return ENOMEM;
    return real<int(void (*)(), void (*)(), void (*)(), void*)>("__register_atfork")(prepare, parent, child, object);
}
int pthread_setspecific(pthread_key_t key, const void* value) noexcept {
    if (refused & thread_values) return ENOMEM;
    return real<decltype(pthread_setspecific)>("pthread_setspecific")(key, value);
}
int sched_getaffinity(pid_t thread, size_t size, cpu_set_t* mask) noexcept {
    if (refused & reading_affinity) {
        errno = EPERM;
        return -1;
    }
    return real<decltype(sched_getaffinity)>("sched_getaffinity")(thread, size, mask);
}
int sched_setaffinity(pid_t thread, size_t size, const cpu_set_t* mask) noexcept {
    if (refused & setting_affinity) {
        errno = EPERM;
        return -1;
    }
    return real<decltype(sched_setaffinity)>("sched_setaffinity")(thread, size, mask);
}
}
