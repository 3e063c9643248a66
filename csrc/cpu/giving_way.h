// When regions have fewer threads than they might: while other processes want the processors too, and for long.
//
// A team waits for its slowest thread, a hundred times in a millisecond. Where that one waits for a processor, because
// another process runs there, the others sleep and are woken for less work than the waking costs, and two processes
// together do a fraction of what one does. One thread has nobody to wait for. No result depends on their number.
#pragma once

#include <cstdint>

namespace igpt::cpu {

// The policy, without a clock: it is told the time in nanoseconds, and what a team has seen since the look before.
//
// A short wait says nothing: everything on the machine makes some, and half the threads cost more. So only windows in a
// row count. After a time teams try with all their threads for one window, and rest for twice as long where that one
// was no better.
class GivingWay {
  public:
    // How often the number of threads is halved.
    int halvings() const { return phase_ == Phase::resting ? halvings_ : 0; }
    int64_t times() const { return times_; }  // that a rest has begun
    int64_t next() const;                     // when a team is to look

    // Before a region, where it has fewer threads.
    void begin(int64_t time);

    // After a region of several threads that have looked: whether one of them had to wait for much of the time.
    void look(int64_t time, bool contended);

  private:
    // With fewer threads; with all again, which have yet to look for the first time, and then for the second.
    enum class Phase { all, resting, opening, probing };

    void rest(int64_t windows, int64_t window);

    Phase phase_ = Phase::all;
    int halvings_ = 0, streak_ = 0;
    int64_t looked_ = 0, until_ = 0, rest_ = 0, times_ = 0;
};

}  // namespace igpt::cpu
