// For drivers: regions of several threads, OpenMP's or, where the compiler has none, our own (pool.h).
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#else
#include "pool.h"
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "watch.h"

namespace igpt::cpu {
namespace {

// Flushes denormals, if told to, in this thread while it lives: the far tails of a softmax or an activation hold them,
// at a hundred cycles each.
class FlushDenormals {
  public:
#if defined(__x86_64__)
    explicit FlushDenormals(bool really) : before_(_mm_getcsr()) { _mm_setcsr(before_ | (really ? 0x8040 : 0)); }
    ~FlushDenormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#elif defined(__aarch64__)
    explicit FlushDenormals(bool really) {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ | uint64_t{really} << 24));  // FZ
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

  private:
    uint64_t before_;
#else
    explicit FlushDenormals(bool) {}
#endif
};

struct Range {
    int64_t begin, end;
};

// Part `index` of `count` of n.
inline Range part(int64_t n, int64_t index, int64_t count) { return {n * index / count, n * (index + 1) / count}; }

// Calls work(index, count) in each of `wanted` threads, or fewer: the region may not get them all. Nothing may throw:
// an exception that leaves the region ends the process.
template <class Work>
void in_threads(int wanted, Work work) {
    if (wanted <= 1) return work(0, 1);
#ifdef _OPENMP
#pragma omp parallel num_threads(wanted)
    work(omp_get_thread_num(), omp_get_num_threads());
#else
    in_pool(wanted, [](void* all, int index, int count) { (*static_cast<Work*>(all))(index, count); }, &work);
#endif
}

// The same without denormals, unless they are kept, and with an eye on other processes.
template <class Work>
void in_region(int wanted, Work work, bool flush = true) {
    Watch watch(wanted);
    in_threads(wanted, [&](int index, int count) {
        watch.look();
        const FlushDenormals here(flush);
        work(index, count);
    });
}

// Calls each(i) for i of n, every thread for as many that follow each other.
template <class Each>
void for_each(int64_t n, int wanted, Each each) {
    in_threads(wanted, [&](int index, int count) {
        const Range mine = part(n, index, count);
        for (int64_t i = mine.begin; i < mine.end; ++i) each(i);
    });
}

}  // namespace
}  // namespace igpt::cpu
