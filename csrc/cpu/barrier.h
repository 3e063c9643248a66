// A barrier for the threads of one region, which meet a hundred times in a millisecond.
#pragma once

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <thread>

namespace igpt::cpu {

// Spins for some microseconds, as sleeping and waking costs more than the work between two meetings; then sleeps, as
// the one that is waited for has more to do or, where other processes run too, waits for the processor that this one
// would spin on.
//
// It cannot hang as long as every thread of the region calls wait with the number that the region has, as often as the
// others: nothing in a region throws or returns early, and the last to arrive waits for nobody. A sleeper that the last
// one has not seen has seen the new generation, as both look after they have written; the futex compares once more.
class Barrier {
  public:
    void wait(int threads) {
        if (threads == 1) return;
        const uint32_t now = generation_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            // Either this sees the sleeper, or the sleeper sees the new generation: both are one order with its own.
            generation_.store(now + 1, std::memory_order_seq_cst);
            if (sleepers_.load(std::memory_order_seq_cst) != 0) wake();
            return;
        }
        if (!spin(now)) sleep(now);
    }

  private:
    static constexpr std::chrono::microseconds kSpin{50};

    // Whether all have come meanwhile.
    bool spin(uint32_t now) const {
        const auto end = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 16; ++i) {
                if (generation_.load(std::memory_order_acquire) != now) return true;
                pause();
            }
        } while (std::chrono::steady_clock::now() < end);
        return false;
    }

    void sleep(uint32_t now) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while (generation_.load(std::memory_order_seq_cst) == now) sleep_while(now);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }

#ifdef __linux__
    void sleep_while(uint32_t now) { syscall(SYS_futex, &generation_, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
    void sleep_while(uint32_t) { std::this_thread::sleep_for(kSpin); }
    void wake() {}
#endif

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    std::atomic<uint32_t> sleepers_{0};
};

}  // namespace igpt::cpu
