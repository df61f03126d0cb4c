// An allocator that fails on request, in place of the C library's: malloc, calloc, realloc, posix_memalign and
// aligned_alloc, and through them operator new. Linked into a test, or loaded with LD_PRELOAD (then compile it alone,
// with `cc -shared`: it needs no C++ library). glibc only.
//
// failing_malloc_arm(k, all) lets the calling thread's k-th allocation from now on fail (k from 1), and with `all`
// every later one too; k = 0 only counts. failing_malloc_disarm() ends it and returns how many allocations there were.
// failing_malloc_exempt names a range of code (a library) and failing_malloc_watch another: an allocation whose nearest
// frame in either lies in an exempt one is let through, and counted apart.
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <unwind.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);
}

namespace {

struct Range {
    uintptr_t begin, end;
    bool exempt;
};
Range ranges[64];
int num_ranges = 0;
long live = 0;  // blocks of the whole process

// Initial-exec: a thread-local variable must not allocate itself.
struct State {
    bool armed, busy, all;
    long k, seen, exempt, failed;
};
__attribute__((tls_model("initial-exec"))) thread_local State state;

_Unwind_Reason_Code look(_Unwind_Context* context, void* found) {
    const uintptr_t at = _Unwind_GetIP(context);
    for (int i = 0; i < num_ranges; ++i)
        if (at >= ranges[i].begin && at < ranges[i].end) {
            *static_cast<int*>(found) = ranges[i].exempt;
            return _URC_END_OF_STACK;
        }
    return _URC_NO_REASON;
}

bool fails() {
    State& s = state;
    if (!s.armed || s.busy) return false;
    int exempt = 0;
    if (num_ranges) {
        s.busy = true;  // the first unwinding may allocate
        _Unwind_Backtrace(look, &exempt);
        s.busy = false;
    }
    if (exempt) {
        ++s.exempt;
        return false;
    }
    ++s.seen;
    if (s.k == 0 || (s.all ? s.seen < s.k : s.seen != s.k)) return false;
    ++s.failed;
    return true;
}

void* counted(void* block) {
    if (block) __atomic_add_fetch(&live, 1, __ATOMIC_RELAXED);
    return block;
}
void* failure() {
    errno = ENOMEM;
    return nullptr;
}

}  // namespace

EXPORT void failing_malloc_arm(long k, int all) { state = State{true, false, all != 0, k, 0, 0, 0}; }
EXPORT long failing_malloc_disarm() {
    state.armed = false;
    return state.seen;
}
EXPORT long failing_malloc_exempted() { return state.exempt; }
EXPORT long failing_malloc_failed() { return state.failed; }
EXPORT long failing_malloc_live() { return __atomic_load_n(&live, __ATOMIC_RELAXED); }
EXPORT int failing_malloc_range(uintptr_t begin, uintptr_t end, int exempt) {
    if (num_ranges == int(sizeof ranges / sizeof *ranges)) return 0;
    ranges[num_ranges++] = {begin, end, exempt != 0};
    return 1;
}
// f(a, b, c) with the k-th allocation failing: for Python, where ctypes would allocate between arming and the call.
EXPORT void* failing_malloc_call(void* (*f)(void*, void*, void*), void* a, void* b, void* c, long k, int all) {
    failing_malloc_arm(k, all);
    void* const result = f(a, b, c);
    failing_malloc_disarm();
    return result;
}

EXPORT void* malloc(size_t bytes) { return fails() ? failure() : counted(__libc_malloc(bytes)); }
EXPORT void* calloc(size_t n, size_t bytes) { return fails() ? failure() : counted(__libc_calloc(n, bytes)); }
EXPORT void* realloc(void* block, size_t bytes) {
    if (!block) return malloc(bytes);
    if (fails()) return failure();
    if (bytes == 0) __atomic_sub_fetch(&live, 1, __ATOMIC_RELAXED);  // glibc frees
    return __libc_realloc(block, bytes);
}
EXPORT void* memalign(size_t alignment, size_t bytes) {
    return fails() ? failure() : counted(__libc_memalign(alignment, bytes));
}
EXPORT void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
EXPORT int posix_memalign(void** block, size_t alignment, size_t bytes) {
    void* const made = memalign(alignment, bytes);
    if (!made) return ENOMEM;
    *block = made;
    return 0;
}
EXPORT void free(void* block) {
    if (block) __atomic_sub_fetch(&live, 1, __ATOMIC_RELAXED);
    __libc_free(block);
}
