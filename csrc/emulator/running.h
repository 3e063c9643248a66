// What the parts of the emulator that stand for hardware beside the threads (ptx.cpp, hopper.cpp) need of the running
// block and thread.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <string>
#include <typeindex>
#include <typeinfo>

#include "emulator.h"

namespace igpt::emulator {

struct Thread;

// Ends the block with an error that names the running thread.
[[noreturn]] void fail(const std::string& message);
// The same where no thread runs.
void fail_block(const std::string& message);
std::string text(Where where);
// A number below n, by the schedule.
uint64_t choose(uint64_t n);
Counters& counting();

Thread* running();
int thread_number();  // in its block
// Suspends the running thread until somebody wakes it; `name` and `where` are for the description of a deadlock.
void sleep(const std::string& name, Where where);
void wake(Thread* thread);

// An operation that all 32 lanes of a warp meet in. `work` runs once, in the last lane to come, before any lane goes
// on; it gets what each lane brought, which stays as it is meanwhile. Orders no memory.
using Work = std::function<void(void* const* lanes)>;
void collective(const char* name, void* own, const Work& work, Where where);

// Shared memory begins at this address of its window: not at 0, which a forgotten address would be, and aligned to 128
// bytes but no more, as dynamic_shared promises. The host's addresses are the same modulo 1024.
constexpr uint32_t kSharedBase = 1024 + 128;
size_t shared_bytes();
// The host's address of `bytes` bytes of shared memory; fails if they are outside or not aligned to `alignment`.
unsigned char* shared_at(const char* name, uint32_t address, size_t bytes, size_t alignment, Where where);

// State of a block that belongs to one kind of hardware.
struct Unit {
    virtual ~Unit() = default;
    // When no thread can run: brings about what was still under way, as late as that. Whether it did anything.
    virtual bool advance() { return false; }
    // When nothing more can happen: what threads may be waiting for.
    virtual std::string standstill() const { return {}; }
    // When all threads have ended: what may not be left then.
    virtual std::string left() const { return {}; }
    // In a thread, at its end: fails if it may not end like this.
    virtual void thread_ends() {}
};
std::unique_ptr<Unit>& unit_place(std::type_index type);
// Of the running block, made at the first use.
template <typename U>
U& unit() {
    std::unique_ptr<Unit>& place = unit_place(typeid(U));
    if (!place) place = std::make_unique<U>();
    return static_cast<U&>(*place);
}

}  // namespace igpt::emulator
