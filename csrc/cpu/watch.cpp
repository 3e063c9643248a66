// Looking around: the clock and the system for the policy of giving_way.h.
#include "watch.h"

#ifdef __linux__
#include <fcntl.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <mutex>

#include "giving_way.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kMuch =
    4;  // a fourth of the time: a team does no more, then, than one of its threads that need not wait

std::mutex guard;
GivingWay policy;                    // under the guard; what follows is written so, and read without
std::atomic<int64_t> next{0};        // policy.next()
std::atomic<bool> given_way{false};  // policy.halvings() > 0
std::atomic<int64_t> times{0};       // policy.times()

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

void publish() {
    next.store(policy.next(), std::memory_order_relaxed);
    given_way.store(policy.halvings() > 0, std::memory_order_relaxed);
    times.store(policy.times(), std::memory_order_relaxed);
}

// Nanoseconds that the calling thread has been ready to run and did not; -1: the system does not say.
int64_t delayed() {
#ifdef __linux__
    // Ten microseconds in a window. A file that stays open would have to be closed with its thread, and after a fork.
    const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    char text[96];
    const ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    long long ran = 0, waited = 0;
    text[std::max<ssize_t>(size, 0)] = 0;
    if (std::sscanf(text, "%lld %lld", &ran, &waited) == 2) return waited;
#endif
    return -1;
}

}  // namespace

Watch::Watch(int threads) {
    if (threads < 2) return;
    const int64_t time = now();
    if (time >= next.load(std::memory_order_relaxed)) time_ = time;
}

void Watch::look() {
    if (time_ == 0) return;
    static thread_local int64_t looked = 0, before = -1;
    const int64_t waited = delayed();
    if (before >= 0 && kMuch * (waited - before) > time_ - looked) contended_.store(true, std::memory_order_relaxed);
    looked = time_;
    before = waited;
}

Watch::~Watch() {
    if (time_ == 0) return;
    const std::lock_guard<std::mutex> lock(guard);
    if (time_ < policy.next()) return;  // another region has looked meanwhile
    policy.look(time_, contended_.load(std::memory_order_relaxed));
    publish();
}

int after_giving_way(int threads) {
    if (threads < 2 || !given_way.load(std::memory_order_relaxed)) return threads;
    const std::lock_guard<std::mutex> lock(guard);
    policy.begin(now());
    publish();
    return std::max(1, threads >> policy.halvings());
}

int64_t times_given_way() { return times.load(std::memory_order_relaxed); }

}  // namespace igpt::cpu
