// Counts what the warps of a block ask of memory.
#pragma once

#include <unordered_map>

#include "emulator.h"
#include "memory.h"

namespace igpt::emulator {

// The accesses of a block. Threads run one at a time, so the instruction that the lanes of a warp share has to be
// found again: it is the n-th access of its kind of each lane since the last barrier or warp operation.
class Requests {
  public:
    explicit Requests(Counters& counters) : counters_(counters) {}
    void add(int thread, Access access, uint64_t epoch, uint64_t n, uint64_t address, size_t bytes);
    // Counts the requests that not all lanes have taken part in.
    void finish();

  private:
    struct Request {
        Access access;
        size_t bytes;
        int lanes = 0;
        uint64_t addresses[32] = {};  // by lane; 0 where one takes no part
    };
    void count(const Request& request);

    Counters& counters_;
    std::unordered_map<uint64_t, Request> open_;
};

}  // namespace igpt::emulator
