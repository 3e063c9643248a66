// For drivers: numbers too small for a full mantissa, as zero.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

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

}  // namespace
}  // namespace igpt::cpu
