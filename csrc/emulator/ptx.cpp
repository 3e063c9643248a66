// What ptx.h leaves to the uninstrumented side: the state of asynchronous copies and named barriers, and the operations
// of whole warps.
#include "ptx.h"

#include <algorithm>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "fibre.h"
#include "memory.h"
#include "running.h"

namespace igpt::emulator {
namespace {

struct Issued {
    AsyncCopy copy;
    Where where;
};

struct AsyncCopies : Unit {
    struct PerThread {
        std::deque<Issued> open;                // in no group yet
        std::deque<std::deque<Issued>> groups;  // oldest first
    };
    std::map<int, PerThread> threads;

    void thread_ends() override {
        const PerThread& own = threads[thread_number()];
        const Issued* left = own.open.empty() ? nullptr : &own.open.front();
        for (const auto& group : own.groups) {
            if (!group.empty()) left = &group.front();
        }
        if (left) fail("cp.async at " + text(left->where) + ": its thread ends without having waited for it");
    }
};

struct NamedBarriers : Unit {
    struct Barrier {
        int threads = 0;  // expected; 0: nobody has arrived
        int arrived = 0;
        Where where{};
        std::vector<Thread*> waiting;
        int turn = 0;
        char sync[2] = {};  // by turns, as for __syncthreads
    };
    Barrier at[16];

    std::string standstill() const override {
        std::string message;
        for (int id = 1; id < 16; ++id) {
            if (at[id].arrived == 0) continue;
            message += " at named barrier " + std::to_string(id) + " " + std::to_string(at[id].arrived) + " of " +
                       std::to_string(at[id].threads) + " threads have arrived;";
        }
        return message;
    }
};

// Groups of four banks that two rows of 16 bytes share make a further wavefront, unless the rows are one.
uint64_t wavefronts(const uint32_t* rows) {
    uint64_t groups[8] = {};
    for (int i = 0; i < 8; ++i) {
        if (std::find(rows, rows + i, rows[i]) == rows + i) ++groups[rows[i] / 16 % 8];
    }
    return *std::max_element(groups, groups + 8);
}

struct LoadingLane {
    uint32_t* r;
    const MatrixRow* row;
    uint32_t address;
};

struct MmaLane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

// Fragments as at the top of csrc/cuda/ptx.cuh.
void multiply(void* const* lanes, bool bfloat) {
    float a[16][16], b[16][8], c[16][8];
    for (int l = 0; l < 32; ++l) {
        const auto& lane = *static_cast<const MmaLane*>(lanes[l]);
        const int g = l / 4, t = l % 4;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i) {
                a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = wide(lane.a[i] >> 16 * half, bfloat);
            }
            for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + half][g] = wide(lane.b[i] >> 16 * half, bfloat);
        }
        for (int i = 0; i < 4; ++i) c[g + 8 * (i / 2)][2 * t + i % 2] = lane.d[i];
    }
    for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
        }
    }
    for (int l = 0; l < 32; ++l) {
        const auto& lane = *static_cast<const MmaLane*>(lanes[l]);
        for (int i = 0; i < 4; ++i) lane.d[i] = c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
    }
}

}  // namespace

uint32_t shared_address(const void* p, Where where) {
    const auto at = reinterpret_cast<uint64_t>(p), begin = reinterpret_cast<uint64_t>(dynamic_shared());
    if (at < begin || at > begin + shared_bytes()) {
        fail("shared_address at " + text(where) + ": the pointer is not into shared memory");
    }
    return kSharedBase + uint32_t(at - begin);
}

AsyncCopy issue_copy(uint32_t to, const void* from, int bytes, int size, Where where) {
    const std::string what = "cp.async at " + text(where);
    const size_t whole = size_t(size);
    unsigned char* place = shared_at("cp.async", to, whole, whole, where);
    const AsyncCopy copy{place, static_cast<const unsigned char*>(from), bytes, size};
    if (bytes < 0 || bytes > size) fail(what + ": " + std::to_string(bytes) + " bytes, not 0 to 16");
    if (reinterpret_cast<uint64_t>(from) % whole != 0) {
        fail(what + ": the source is not aligned to " + std::to_string(size));
    }
    if (bytes > 0) {
        note(Access::global_load, from, whole, where);
    } else {
        skip(Access::global_load);
    }
    note(Access::shared, copy.to, whole);
    ++counting().async_copies;
    unit<AsyncCopies>().threads[thread_number()].open.push_back({copy, where});
    return copy;
}

void commit_copies() {
    auto& own = unit<AsyncCopies>().threads[thread_number()];
    own.groups.push_back(std::move(own.open));
    own.open.clear();
}

bool take_copy(int groups, AsyncCopy& copy) {
    auto& own = unit<AsyncCopies>().threads[thread_number()];
    while (int(own.groups.size()) > groups) {
        if (own.groups.front().empty()) {
            own.groups.pop_front();
            continue;
        }
        copy = own.groups.front().front().copy;
        own.groups.front().pop_front();
        wrote_shared(copy.to, size_t(copy.size));
        return true;
    }
    return false;
}

const MatrixRow* matrix_row(const char* name, uint32_t address, Where where) {
    return reinterpret_cast<const MatrixRow*>(shared_at(name, address, 16, 16, where));
}

void ldmatrix(const char* name, uint32_t* r, bool transposed, const MatrixRow& row, uint32_t address, Where where) {
    LoadingLane own{r, &row, address};
    const Work work = [=](void* const* lanes) {
        ++counting().ldmatrix;
        for (int m = 0; m < 4; ++m) {
            uint32_t addresses[8];
            const uint16_t* rows[8];
            for (int i = 0; i < 8; ++i) {
                const auto& lane = *static_cast<const LoadingLane*>(lanes[8 * m + i]);
                addresses[i] = lane.address;
                rows[i] = lane.row->at;
            }
            counting().ldmatrix_wavefronts += wavefronts(addresses);
            for (int l = 0; l < 32; ++l) {
                const int g = l / 4, t = l % 4;
                const uint16_t lo = transposed ? rows[2 * t][g] : rows[g][2 * t];
                const uint16_t hi = transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
                static_cast<const LoadingLane*>(lanes[l])->r[m] = lo | uint32_t(hi) << 16;
            }
        }
    };
    collective(name, &own, work, where);
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat, Where where) {
    MmaLane own{d, a, {b0, b1}};
    const Work work = [=](void* const* lanes) {
        ++counting().mma;
        multiply(lanes, bfloat);
    };
    collective(bfloat ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16", &own, work, where);
}

void named_barrier(bool waits, int id, int threads, Where where) {
    const char* name = waits ? "bar.sync" : "bar.arrive";
    const std::string what = std::string(name) + " at " + text(where) + ": ";
    if (id < 1 || id > 15) fail(what + "barrier " + std::to_string(id) + ", not 1 to 15");
    if (threads < 32 || threads % 32 != 0 || threads > int(blockDim.x * blockDim.y * blockDim.z)) {
        fail(what + std::to_string(threads) + " threads, not whole warps of the block");
    }
    // The hardware counts warps.
    int own[2] = {id, threads};
    const Work agree = [&](void* const* lanes) {
        for (int l = 0; l < 32; ++l) {
            const int* other = static_cast<const int*>(lanes[l]);
            if (other[0] != id || other[1] != threads) fail(what + "the lanes of a warp name different barriers");
        }
    };
    collective(name, own, agree, where);
    auto& barrier = unit<NamedBarriers>().at[id];
    if (barrier.arrived > 0 && barrier.threads != threads) {
        fail(what + "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads, but of " +
             std::to_string(barrier.threads) + " at " + text(barrier.where));
    }
    void* sync = &barrier.sync[barrier.turn];
    release(sync);
    barrier.threads = threads;
    barrier.where = where;
    if (++barrier.arrived == threads) {
        ++counting().barriers;
        barrier.arrived = 0;
        barrier.turn ^= 1;
        for (Thread* thread : barrier.waiting) wake(thread);
        barrier.waiting.clear();
    } else if (waits) {
        barrier.waiting.push_back(running());
        sleep("named barrier " + std::to_string(id), where);
    }
    if (waits) acquire(sync);
}

}  // namespace igpt::emulator
