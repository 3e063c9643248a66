// The policy of giving way to other processes. No clock, no system.
#include "giving_way.h"

#include <algorithm>

namespace igpt::cpu {
namespace {

constexpr int64_t kWindow = 20000000;  // between two looks, at least: some turns of the system's scheduler
constexpr int kPatience = 3;           // contended windows in a row that are no chance
constexpr int64_t kRest = 10;          // windows with fewer threads, each as long as the last one with more
constexpr int64_t kLongestRest = 80;
constexpr int64_t kLongestWindow = 5 * kWindow;  // that counts so: regions may take seconds, a rest takes few
constexpr int kMostHalvings = 16;

}  // namespace

int64_t GivingWay::next() const { return looked_ + kWindow; }

void GivingWay::begin(int64_t time) {
    if (phase_ == Phase::resting && time >= until_) phase_ = Phase::opening;
}

void GivingWay::look(int64_t time, bool contended) {
    const int64_t window = std::clamp(time - looked_, kWindow, kLongestWindow);
    looked_ = time;
    if (phase_ == Phase::opening) {
        phase_ = Phase::probing;  // what was seen is of the time before
    } else if (phase_ == Phase::probing && contended) {
        rest(std::min(2 * rest_, kLongestRest), window);
    } else if (phase_ == Phase::probing) {
        phase_ = Phase::all;
        halvings_ = 0;
    } else if (streak_ = contended ? streak_ + 1 : 0; streak_ == kPatience) {
        halvings_ = std::min(halvings_ + 1, kMostHalvings);
        rest(kRest, window);
    }
}

void GivingWay::rest(int64_t windows, int64_t window) {
    phase_ = Phase::resting;
    rest_ = windows;
    until_ = looked_ + windows * window;
    streak_ = 0;
    ++times_;
}

}  // namespace igpt::cpu
