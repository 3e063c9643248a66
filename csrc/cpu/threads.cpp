// How many OpenMP threads a region may have.
#include <pthread.h>

#include <atomic>

#include "ops.h"

namespace igpt::cpu {
namespace {

std::atomic<bool> forked{false};

void in_child() { forked.store(true, std::memory_order_relaxed); }

const int registered = pthread_atfork(nullptr, nullptr, in_child);

}  // namespace

int usable_threads(int wanted) {
    return wanted < 1 || registered != 0 || forked.load(std::memory_order_relaxed) ? 1 : wanted;
}

}  // namespace igpt::cpu
