// In place of csrc/cpu/threads.cpp, for tests: every region has the threads that are asked for, however few processors
// there are; but for a forked child, as there.
#include "cpu/threads.h"

#include <pthread.h>

#include <atomic>

#include "cpu/ops.h"

namespace igpt::cpu {
namespace {

std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

Limits thread_limits(const std::string&) { return {0, 0}; }
int usable_threads(int wanted) { return wanted < 1 || registered != 0 || forked.load() ? 1 : wanted; }

}  // namespace igpt::cpu
