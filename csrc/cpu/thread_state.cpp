#include "thread_state.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace bnfast {
namespace {

void destroy(void* state) {
    auto* const s = static_cast<ThreadState*>(state);
    std::free(s->scratch);
    delete s;
}

// The process's key, made at load or, where that failed (a process has 1024), by the first call that can.
struct Key {
    pthread_key_t key{};
    std::atomic<bool> made{false};
    Key() { make(); }
    bool make() {
        if (made.load(std::memory_order_acquire)) return true;
        static std::atomic<bool> making{false};
        if (making.exchange(true)) return false;  // another thread does
        const bool done = made.load() || pthread_key_create(&key, destroy) == 0;
        if (done) made.store(true, std::memory_order_release);
        making.store(false);
        return done;
    }
};
Key key;

}  // namespace

ThreadState* thread_state() noexcept {
    if (!key.make()) return nullptr;
    if (void* const state = pthread_getspecific(key.key)) return static_cast<ThreadState*>(state);
    auto* const made = new (std::nothrow) ThreadState;
    if (made && pthread_setspecific(key.key, made) != 0) {
        delete made;
        return nullptr;
    }
    return made;
}

}  // namespace bnfast
