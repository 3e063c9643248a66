// A barrier for the threads of one OpenMP region, which meet a hundred times in a millisecond.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace igpt::cpu {

// Spins, as sleeping and waking costs more than the work between two meetings; and after a bound lets others run, as
// with more threads than cores the one that is waited for may have none.
class Barrier {
  public:
    void wait(int threads) {
        if (threads == 1) return;
        const uint32_t now = generation_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; generation_.load(std::memory_order_acquire) == now; ++spins) {
            if (spins < kSpins)
                pause();
            else
                sched_yield();
        }
    }

  private:
    static constexpr int kSpins = 4000;  // some 50 to 100 microseconds

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
};

}  // namespace igpt::cpu
