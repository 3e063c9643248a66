// The scheduler's blocks and threads, for the parts of it: emulator.cpp, meetings.cpp and accesses.cpp.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <typeindex>
#include <vector>

#include "counters.h"
#include "emulator.h"
#include "fibre.h"
#include "running.h"

namespace igpt::emulator {

constexpr int kWarpSize = 32;

// An operation that the lanes of `mask` meet in.
struct Meeting {
    std::string name;
    unsigned mask;
    Where where;
    unsigned arrived = 0;
    uint64_t bits[kWarpSize] = {};
};

struct Block;

struct Thread {
    Fibre fibre;
    Block* block = nullptr;
    uint3 index{};
    int number = 0;
    bool ended = false;
    bool waited = false;  // for the launch before: grid_dependency_wait, or a barrier with a thread that had
    uint64_t cluster_arrivals = 0, cluster_waits = 0;
    std::string waits_in;  // empty: it could run
    Where where{};
    std::shared_ptr<Meeting> meeting;
    uint64_t epoch = 0;         // barriers and warp operations so far
    uint64_t accesses[3] = {};  // since then, by kind

    int warp() const { return number / kWarpSize; }
    int lane() const { return number % kWarpSize; }
};

struct Block {
    Block(uint3 at, dim3 size, uint64_t seed, Counters& counters) : index(at), random(seed), requests(counters) {
        threads.resize(size_t(size.x) * size.y * size.z);
        const size_t warps = (threads.size() + kWarpSize - 1) / kWarpSize;
        meetings.resize(warps);
        ready.resize(warps);
        for (size_t i = 0; i < warps; ++i) priority.push_back(i);
        std::shuffle(priority.begin(), priority.end(), random);
    }

    uint3 index;
    std::vector<Thread> threads;
    size_t live = 0;                                              // threads that have not ended
    std::vector<std::vector<std::shared_ptr<Meeting>>> meetings;  // by warp: those that wait for lanes
    std::vector<std::vector<Thread*>> ready;                      // by warp: the threads that could run
    std::deque<Thread*> queue;                                    // the same, for fifo
    std::vector<size_t> priority;                                 // the warps, for skewed
    std::vector<Thread*> at_barrier;
    char barrier_sync[2] = {};  // by turns: a thread that is ahead must not order memory for one that is behind
    int barriers = 0;
    std::mt19937_64 random;
    Requests requests;
    bool waited = false;   // one of them has called grid_dependency_wait
    bool hurried = false;  // let the next launch begin before it had waited
    std::string error;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    std::map<std::type_index, std::unique_ptr<Unit>> units;
};

// Blocks that run at the same time, and their barrier. Most are a cluster of one.
struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    size_t turn = 0;  // for fifo: the block that is next
    std::mt19937_64 random;
    uint64_t phases = 0;  // of the barrier, that have ended
    size_t arrived = 0;   // threads, in this phase
    std::vector<Thread*> waiting;
    char sync[2] = {};  // by turns, as barrier_sync

    size_t live() const {
        size_t count = 0;
        for (const auto& one : blocks) count += one->live;
        return count;
    }
};

// What runs now.
extern Cluster* cluster;
extern Block* block;
extern Thread* current;

std::string text(const Thread& thread);
void make_ready(Thread* thread);
// Suspends the running thread until it is made ready.
void wait(const std::string& name, Where where);
// A thread leaves a barrier or an operation of its warp.
void pass(Thread* thread);
// Ends a phase of the cluster's barrier once every thread that has not ended has arrived.
void settle_cluster();

}  // namespace igpt::emulator
