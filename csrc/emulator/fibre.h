// A thread of execution that runs only when it is told to, on a stack of its own.
// The scheduler, which is whoever calls resume(), is the other side of every switch.
#pragma once

#include <cstddef>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace igpt::emulator {

class Fibre {
  public:
    // Puts entry(), which must end in suspend(true), onto the poisoned stack number `index` of one of two pools. No two
    // fibres that are alive may have the same place. To the thread sanitizer a place is one thread.
    void start(int index, int pool, void (*entry)());
    // From the scheduler: goes on where the fibre stopped, until it stops again.
    void resume();
    // From the fibre: back to the scheduler. `last`: it will not be resumed.
    void suspend(bool last);
    // From the fibre, before anything else: ends the first resume() for the sanitizers.
    void arrive();
    // From the scheduler. `ended`: it has come to its suspend(true).
    void destroy(bool ended);

  private:
    struct Context {
#ifdef __x86_64__
        void* stack_pointer = nullptr;
#else
        ucontext_t registers;
#endif
    };
    static void switch_context(Context& from, Context& to);

    Context own_, scheduler_;
    char* stack_ = nullptr;
    // For the sanitizers.
    void* own_state_ = nullptr;
    void* scheduler_state_ = nullptr;
    const void* scheduler_stack_ = nullptr;
    size_t scheduler_stack_size_ = 0;
};

// Order of memory among fibres, for the thread sanitizer: what was done before release(x) happened before what is done
// after a later acquire(x). A switch orders nothing.
void release(void* sync);
void acquire(void* sync);

}  // namespace igpt::emulator
