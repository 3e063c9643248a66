// Runs the kernels of csrc/cuda on the CPU: one fibre for every CUDA thread, one block, or cluster of blocks, at a
// time. For tests alone.
//
// What it takes from a kernel it answers with an error that says which thread, and where: a barrier that not every
// thread reaches, lanes that disagree about a warp's operation, a lane read that does not take part, misaligned
// vectors, a launch outside the limits, what a dependent launch does too early. Shared memory is poisoned with 0xff
// (NaN in every type) and ends where an address sanitizer sees it; so are the stacks. Under a thread sanitizer only
// barriers and __syncwarp order memory, so a missing one is a reported race, whatever the order of execution was.
// (Threads of one number in every other block are one to it: a race between exactly those it does not see.)
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace igpt::emulator {

// In which order the threads run that could.
enum class Order {
    fifo,    // by turns
    random,  // any thread, any block
    skewed,  // one warp as far ahead as it can; the last block first
};

struct Schedule {
    Order order = Order::fifo;
    uint64_t seed = 0;
};

// Of all launches since the last reset. A request is what one warp does with one instruction of memory.cuh.
struct Counters {
    uint64_t launches, barriers, collectives;
    uint64_t load_requests, load_sectors, load_bytes;               // global; a sector is 32 bytes
    uint64_t store_requests, store_sectors, store_bytes;            // global
    uint64_t shared_requests, shared_wavefronts, shared_conflicts;  // conflicts: wavefronts above the least possible
    uint64_t mma, ldmatrix, ldmatrix_wavefronts;  // of whole warps; an 8x8 matrix without conflicts is one wavefront
    uint64_t async_copies;                        // of 16 bytes; they count as a global load and a shared access too
    uint64_t tile_copies, tile_bytes;             // by TMA
    uint64_t bulk_copies, bulk_bytes;             // of contiguous memory, likewise
    uint64_t wgmma;                               // of whole warps: four for one instruction
};

void set_schedule(Schedule schedule);

// What the device is from now on, to the launchers that look: 80 at first, 90 for one with wgmma and TMA. The emulator
// runs what it is given, whatever this says.
void set_capability(int ten_times);
// And how many multiprocessors it has: 132 at first. Of sm_90, if they are asked how many blocks fit.
void set_multiprocessors(int count);
int multiprocessors();
// How many blocks of such a launch run at a time, in whole clusters; of registers nothing is known.
int resident_blocks(unsigned threads, size_t shared_bytes, unsigned cluster);

// From now on launches run only these blocks, by linear index (x fastest), and those of their clusters; they are an
// error if they have none of them.
// For the index arithmetic of launches that are too large to run.
constexpr uint64_t kAllBlocks = UINT64_MAX;
void set_blocks(uint64_t first, uint64_t count);
Counters counters();
void reset_counters();

// Runs `thread` for every thread of the grid, `cluster` blocks that are side by side in x at the same time. Takes one
// launch at a time; throws std::runtime_error. A `dependent` one is held to what grid_dependency_wait is for, as far as
// it passes through memory.cuh and the copies of ptx.cuh: before a thread has called it, or met one at __syncthreads
// that has, it stores nothing and loads nothing that a launch has written which may still run, were the launches on a
// device.
void launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool dependent,
            const std::function<void()>& thread);

// All launches so far have ended, as before another kernel than ours, or at the begin of a graph.
void synchronize();

// The running block's shared memory.
unsigned char* dynamic_shared();

}  // namespace igpt::emulator
