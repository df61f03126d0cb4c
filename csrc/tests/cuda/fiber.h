// Fibers for the emulator: a stack and a point to go on from. On x86-64 a switch is a few instructions (28 ns; ucontext
// takes 780 ns, because it saves the signal mask with a system call). Elsewhere ucontext does the work. Sanitizers are
// told of every switch.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define BNFAST_TSAN 1
#endif
#if __has_feature(address_sanitizer)
#define BNFAST_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define BNFAST_TSAN 1
#endif
#if defined(__SANITIZE_ADDRESS__)
#define BNFAST_ASAN 1
#endif

#ifdef BNFAST_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* at);
void __tsan_release(void* at);
}
#endif
#ifdef BNFAST_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, std::size_t size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, std::size_t* size);
void __asan_unpoison_memory_region(const volatile void* at, std::size_t size);
}
#endif

#if defined(__x86_64__) && !defined(BNFAST_UCONTEXT)
#define BNFAST_FAST_SWITCH 1
// Saves the registers that a callee must keep, and the stack pointer; then the same backwards on the other stack.
asm(R"(
    .pushsection .text  # without optimization GCC may be anywhere
    .weak bnfast_switch_stack
    .type bnfast_switch_stack, @function
bnfast_switch_stack:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
    .popsection
)");
extern "C" void bnfast_switch_stack(void** save, void* to);
#endif

// The emulator's own bookkeeping is not the kernel's: ThreadSanitizer must not see it.
#define BNFAST_NO_TSAN __attribute__((no_sanitize("thread")))

namespace emu {

#ifdef BNFAST_TSAN
inline void tsan_acquire(void* at) { __tsan_acquire(at); }
inline void tsan_release(void* at) { __tsan_release(at); }
constexpr bool keeps_fibers = true;  // until the launch ends: memory that is used again would count as a race
#else
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
constexpr bool keeps_fibers = false;
#endif

#if defined(BNFAST_TSAN) || defined(BNFAST_ASAN)
constexpr std::size_t stack_bytes = 256 << 10;
#else
constexpr std::size_t stack_bytes = 64 << 10;
#endif

class Fiber {
public:
    // Makes a stack on which entry() runs from the first switch on. It must never return.
    void start(void (*entry)());
    void adopt();  // the thread that calls it becomes this fiber
    void end();    // gives the stack back
    bool stack_intact() const { return std::memcmp(stack_.get(), canary, sizeof canary) == 0; }
    friend void switch_fiber(Fiber& from, Fiber& to);

private:
    static constexpr char canary[16] = "end of the room";
    static void first();

    std::unique_ptr<char[]> stack_;
    std::unique_ptr<ucontext_t> context_;
    [[maybe_unused]] void* stack_pointer_ = nullptr;
    [[maybe_unused]] void* tsan_ = nullptr;
    void (*entry_)() = nullptr;
    const void* bottom_ = nullptr;  // of the stack, for AddressSanitizer
    std::size_t size_ = 0;
};

inline Fiber* fiber_left = nullptr;  // the last switch
inline Fiber* fiber_entered = nullptr;

// On the new stack: AddressSanitizer tells the bounds of the one that was left. `save` is null at a fiber's beginning.
BNFAST_NO_TSAN inline void finish_switch([[maybe_unused]] void* save, [[maybe_unused]] const void** bottom,
                                         [[maybe_unused]] std::size_t* size) {
#ifdef BNFAST_ASAN
    __sanitizer_finish_switch_fiber(save, bottom, size);
#endif
}

BNFAST_NO_TSAN inline void Fiber::first() {
    finish_switch(nullptr, &fiber_left->bottom_, &fiber_left->size_);
    fiber_entered->entry_();
    std::abort();
}

inline std::vector<std::unique_ptr<char[]>> spare_stacks;  // fresh ones cost a page fault each

inline void Fiber::start(void (*entry)()) {
    entry_ = entry;
    if (spare_stacks.empty()) spare_stacks.emplace_back(new char[stack_bytes]);
    stack_ = std::move(spare_stacks.back());
    spare_stacks.pop_back();
#ifdef BNFAST_ASAN
    __asan_unpoison_memory_region(stack_.get(), stack_bytes);  // a fiber that was left for good did not
#endif
    std::memcpy(stack_.get(), canary, sizeof canary);
    bottom_ = stack_.get();
    size_ = stack_bytes;
#ifdef BNFAST_FAST_SWITCH
    const auto top = (reinterpret_cast<std::uintptr_t>(stack_.get()) + stack_bytes) / 16 * 16;
    void** at = reinterpret_cast<void**>(top - 16);
    *--at = nullptr;  // where first() would return to; aligns its stack as a call does
    *--at = reinterpret_cast<void*>(&Fiber::first);
    for (int i = 0; i < 6; ++i) *--at = nullptr;  // the registers that a switch restores
    stack_pointer_ = at;
#else
    context_ = std::make_unique<ucontext_t>();
    getcontext(context_.get());
    context_->uc_stack.ss_sp = stack_.get();
    context_->uc_stack.ss_size = stack_bytes;
    context_->uc_link = nullptr;
    makecontext(context_.get(), &Fiber::first, 0);
#endif
#ifdef BNFAST_TSAN
    tsan_ = __tsan_create_fiber(0);
#endif
}

inline void Fiber::adopt() {
    context_ = std::make_unique<ucontext_t>();
#ifdef BNFAST_TSAN
    tsan_ = __tsan_get_current_fiber();
#endif
}

inline void Fiber::end() {
#ifdef BNFAST_TSAN
    __tsan_destroy_fiber(tsan_);
#endif
    spare_stacks.push_back(std::move(stack_));
}

BNFAST_NO_TSAN inline void switch_fiber(Fiber& from, Fiber& to) {
    fiber_left = &from;
    fiber_entered = &to;
    [[maybe_unused]] void* save = nullptr;
#ifdef BNFAST_ASAN
    __sanitizer_start_switch_fiber(&save, to.bottom_, to.size_);
#endif
#ifdef BNFAST_TSAN
    __tsan_switch_to_fiber(to.tsan_, 1);  // 1: the switch itself orders nothing
#endif
#ifdef BNFAST_FAST_SWITCH
    bnfast_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(from.context_.get(), to.context_.get());
#endif
    finish_switch(save, &fiber_left->bottom_, &fiber_left->size_);
}

}  // namespace emu
