// For drivers: an OpenMP region, with numbers too small for a full mantissa as zero.
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "watch.h"

namespace igpt::cpu {
namespace {

// Flushes denormals in this thread while it lives: the far tails of a softmax or an activation hold them, at a hundred
// cycles each.
class FlushDenormals {
  public:
#if defined(__x86_64__)
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#else
    FlushDenormals() {}
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
void in_region(int wanted, Work work) {
    Watch watch(wanted);
#pragma omp parallel num_threads(wanted) if (wanted > 1)
    {
#ifdef _OPENMP
        const int index = omp_get_thread_num(), count = omp_get_num_threads();
#else
        const int index = 0, count = 1;
#endif
        watch.look();
        const FlushDenormals flush;
        work(index, count);
    }
}

}  // namespace
}  // namespace igpt::cpu
