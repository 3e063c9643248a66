// Switching stacks, with what the sanitizers have to be told. This file and emulator.cpp are compiled without a
// sanitizer's instrumentation, with IGPT_ASAN or IGPT_TSAN where the kernels have it: a sanitizer shall judge the
// kernels, not the emulator. Its calls of the C library would be seen all the same, but for
// ignore_interceptors_accesses=1.
#include "fibre.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <vector>

#ifdef IGPT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef IGPT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#ifdef __x86_64__
// Saves the registers that a function keeps, and the stack pointer at *rdi; goes on with the stack pointer in rsi.
extern "C" __attribute__((visibility("hidden"))) void igpt_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden igpt_switch_stack
.globl igpt_switch_stack
.type igpt_switch_stack,@function
igpt_switch_stack:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size igpt_switch_stack,.-igpt_switch_stack
)");
#endif

namespace igpt::emulator {
namespace {

constexpr size_t kGuard = 4096;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kPoisoned = 2 * 1024;  // from the top, where the variables of a kernel are

// What a fibre takes over from the one before it of its number: making these is what a start would cost.
struct Place {
    char* stack;
    void* state;  // of the thread sanitizer
};

Place make_place() {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
    void* state = nullptr;
#ifdef IGPT_TSAN
    state = __tsan_create_fiber(0);
#endif
    return {static_cast<char*>(memory) + kGuard, state};
}

Place place_from_pool(size_t index, int number) {
    static std::vector<Place> pools[2];
    std::vector<Place>& pool = pools[number];
    while (pool.size() <= index) pool.push_back(make_place());
    return pool[index];
}

}  // namespace

void Fibre::switch_context(Context& from, Context& to) {
#ifdef __x86_64__
    igpt_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.registers, &to.registers);
#endif
}

void Fibre::start(int index, int pool, void (*entry)()) {
    const Place place = place_from_pool(size_t(index), pool);
    stack_ = place.stack;
    own_state_ = place.state;
    std::memset(stack_ + kStack - kPoisoned, 0xff, kPoisoned);
#ifdef __x86_64__
    // As if entry() had just been called, from nowhere: the stack pointer is 8 above a multiple of 16.
    void** top = reinterpret_cast<void**>(stack_ + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    own_.stack_pointer = top;
#else
    getcontext(&own_.registers);
    own_.registers.uc_stack.ss_sp = stack_;
    own_.registers.uc_stack.ss_size = kStack;
    own_.registers.uc_link = nullptr;
    makecontext(&own_.registers, entry, 0);
#endif
}

void Fibre::resume() {
#ifdef IGPT_ASAN
    __sanitizer_start_switch_fiber(&scheduler_state_, stack_, kStack);
#endif
#ifdef IGPT_TSAN
    scheduler_state_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(own_state_, __tsan_switch_to_fiber_no_sync);
#endif
    switch_context(scheduler_, own_);
#ifdef IGPT_ASAN
    __sanitizer_finish_switch_fiber(scheduler_state_, nullptr, nullptr);
#endif
}

void Fibre::arrive() {
#ifdef IGPT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_size_);
#endif
}

void Fibre::suspend([[maybe_unused]] bool last) {
#ifdef IGPT_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &own_state_, scheduler_stack_, scheduler_stack_size_);
#endif
#ifdef IGPT_TSAN
    __tsan_switch_to_fiber(scheduler_state_, __tsan_switch_to_fiber_no_sync);
#endif
    switch_context(own_, scheduler_);
#ifdef IGPT_ASAN
    __sanitizer_finish_switch_fiber(own_state_, &scheduler_stack_, &scheduler_stack_size_);
#endif
}

void Fibre::destroy([[maybe_unused]] bool ended) {
#ifdef IGPT_ASAN
    if (!ended) __asan_unpoison_memory_region(stack_, kStack);  // its frames will never be left
#endif
}

void release([[maybe_unused]] void* sync) {
#ifdef IGPT_TSAN
    __tsan_release(sync);
#endif
}

void acquire([[maybe_unused]] void* sync) {
#ifdef IGPT_TSAN
    __tsan_acquire(sync);
#endif
}

}  // namespace igpt::emulator
