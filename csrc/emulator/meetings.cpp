// Where threads wait for each other: barriers of blocks and clusters, and the warps' operations.
#include <algorithm>
#include <cstring>

#include "threads.h"

namespace igpt::emulator {
namespace {

// Returns when all lanes of `mask` have called; the meeting stays valid until the thread's next one. The last one does
// the `work`.
Meeting& meet(const char* name, unsigned mask, uint64_t bits, Where where, bool orders, const Work* work = nullptr) {
    const int lane = current->lane();
    if (!(mask >> lane & 1)) fail(std::string(name) + " at " + text(where) + ": the calling lane is not in its mask");
    auto& waiting = block->meetings[size_t(current->warp())];
    std::shared_ptr<Meeting> meeting;
    for (const auto& other : waiting) {
        if (!(other->mask & mask)) continue;
        if (other->mask != mask || other->name != name || other->where.line != where.line) {
            fail("the lanes of a warp disagree: " + std::string(name) + " at " + text(where) + " against " +
                 other->name + " at " + text(other->where));
        }
        meeting = other;
    }
    if (!meeting) {
        meeting = std::make_shared<Meeting>();
        meeting->name = name;
        meeting->mask = mask;
        meeting->where = where;
        waiting.push_back(meeting);
    }
    meeting->arrived |= 1u << lane;
    meeting->bits[lane] = bits;
    current->meeting = meeting;
    if (orders) release(meeting.get());
    if (meeting->arrived == mask) {
        ++counting().collectives;
        if (work) {
            void* lanes[kWarpSize];
            for (int i = 0; i < kWarpSize; ++i) lanes[i] = reinterpret_cast<void*>(meeting->bits[i]);
            (*work)(lanes);
        }
        waiting.erase(std::find(waiting.begin(), waiting.end(), meeting));
        Thread* first = current - lane;
        for (int i = 0; i < kWarpSize; ++i) {
            if (mask >> i & 1) pass(first + i);
        }
        meeting.reset();
        current->fibre.suspend(false);  // the last lane queues up like the others
    } else {
        meeting.reset();
        wait(name, where);
    }
    if (orders) acquire(current->meeting.get());
    return *current->meeting;
}

}  // namespace

void wait(const std::string& name, Where where) {
    current->waits_in = name;
    current->where = where;
    current->fibre.suspend(false);
}

void pass(Thread* thread) {
    ++thread->epoch;
    std::fill(std::begin(thread->accesses), std::end(thread->accesses), 0);
    make_ready(thread);
}

void settle_cluster() {
    if (cluster->arrived == 0 || cluster->arrived < cluster->live()) return;
    ++cluster->phases;
    cluster->arrived = 0;
    for (Thread* thread : cluster->waiting) make_ready(thread);
    cluster->waiting.clear();
}

void collective(const char* name, void* own, const Work& work, Where where) {
    meet(name, 0xffffffffu, reinterpret_cast<uint64_t>(own), where, false, &work);
}

void barrier(Where where) {
    auto& here = block->at_barrier;
    if (!here.empty() && (here[0]->where.line != where.line || std::strcmp(here[0]->where.file, where.file) != 0)) {
        fail("barrier divergence: __syncthreads at " + text(where) + " against " + text(here[0]->where));
    }
    void* sync = &block->barrier_sync[block->barriers & 1];
    release(sync);
    current->where = where;
    here.push_back(current);
    if (here.size() == block->threads.size()) {
        ++block->barriers;
        ++counting().barriers;
        const bool waited = std::any_of(here.begin(), here.end(), [](const Thread* thread) { return thread->waited; });
        for (Thread* thread : here) {
            thread->waited = waited;
            pass(thread);
        }
        here.clear();
        current->fibre.suspend(false);
    } else {
        wait("__syncthreads", where);
    }
    acquire(sync);
}

void cluster_arrive(bool orders, Where where) {
    if (current->cluster_arrivals != current->cluster_waits) fail("cluster_arrive at " + text(where) + " twice");
    ++current->cluster_arrivals;
    ++cluster->arrived;
    if (orders) release(&cluster->sync[cluster->phases & 1]);
    settle_cluster();
}

void cluster_wait(Where where) {
    if (current->cluster_arrivals == current->cluster_waits) {
        fail("cluster_wait at " + text(where) + " without cluster_arrive");
    }
    if (cluster->phases < current->cluster_arrivals) {
        cluster->waiting.push_back(current);
        wait("cluster_wait", where);
    }
    ++current->epoch;
    std::fill(std::begin(current->accesses), std::end(current->accesses), 0);
    acquire(&cluster->sync[current->cluster_waits++ & 1]);
}

void sync_warp(unsigned mask, Where where) { meet("__syncwarp", mask, 0, where, true); }

uint64_t shuffle(const char* name, unsigned mask, uint64_t bits, int source, Where where) {
    const Meeting& meeting = meet(name, mask, bits, where, false);
    if (source < 0 || source >= kWarpSize || !(mask >> source & 1)) {
        fail(std::string(name) + " at " + text(where) + ": reads lane " + std::to_string(source) +
             ", which does not take part");
    }
    return meeting.bits[source];
}

unsigned ballot(const char* name, unsigned mask, bool predicate, Where where) {
    const Meeting& meeting = meet(name, mask, predicate, where, false);
    unsigned votes = 0;
    for (int i = 0; i < kWarpSize; ++i) votes |= unsigned(meeting.bits[i]) << i;
    return votes;
}

}  // namespace igpt::emulator
