// What hopper.h leaves to the uninstrumented side: barriers in shared memory and the tile copies that they count.
#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "fibre.h"
#include "hopper_units.h"
#include "memory.h"

namespace igpt::emulator {
namespace {

struct Barriers : Unit {
    struct Barrier {
        int arrivals = 0;   // in each phase
        int missing = 0;    // of them, in this phase
        int64_t bytes = 0;  // announced and not copied
        int phase = 0;      // its parity
        int initialised_by = 0;
        bool fenced = false;
        std::vector<Thread*> waiting;
        char sync[2] = {};  // by parity
    };
    std::map<uint32_t, Barrier> at;

    void settle(Barrier& barrier) {
        if (barrier.missing > 0 || barrier.bytes != 0) return;
        barrier.phase ^= 1;
        barrier.missing = barrier.arrivals;
        for (Thread* thread : barrier.waiting) wake(thread);
        barrier.waiting.clear();
    }

    std::string standstill() const override {
        std::string message;
        for (const auto& [address, barrier] : at) {
            if (barrier.waiting.empty()) continue;
            message += " the mbarrier at shared address " + std::to_string(address) + " lacks " +
                       std::to_string(barrier.missing) + " of " + std::to_string(barrier.arrivals) + " arrivals and " +
                       std::to_string(barrier.bytes) + " bytes;";
        }
        return message;
    }
};

// Which thread's writes copies and wgmma do not see yet, for every 16 bytes of shared memory.
struct UnfencedWrites : Unit {
    std::vector<int> by = std::vector<int>(shared_bytes() / 16 + 1, -1);
    std::map<int, std::vector<size_t>> places;  // by thread
};

// Tile and bulk copies.
struct Copies : Unit {
    struct Pending {
        const char* name;
        uint32_t to, barrier;
        int64_t bytes;
        TensorMap map;  // of a tile
        Tile tile;
        const unsigned char* from;  // of a bulk copy; else null
    };
    std::vector<Pending> pending;

    bool advance() override {
        if (pending.empty()) return false;
        const size_t i = size_t(choose(pending.size()));
        const Pending now = pending[i];
        pending.erase(pending.begin() + std::ptrdiff_t(i));
        deliver(now);
        auto& barrier = unit<Barriers>().at[now.barrier];
        barrier.bytes -= now.bytes;
        if (barrier.missing == 0 && barrier.bytes < 0) {
            fail_block("the mbarrier at shared address " + std::to_string(now.barrier) + " gets " +
                       std::to_string(-barrier.bytes) + " bytes more than were announced");
        } else {
            unit<Barriers>().settle(barrier);
        }
        return true;
    }
    std::string left() const override {
        return pending.empty() ? "" : std::string("the block ends without having waited for its ") + pending[0].name;
    }

    static void deliver(const Pending& p) {
        auto& by = unit<UnfencedWrites>().by;
        const auto first = by.begin() + std::ptrdiff_t((p.to - kSharedBase) / 16);
        std::fill(first, first + std::ptrdiff_t(p.bytes / 16), -1);
        if (p.from) {
            std::memcpy(dynamic_shared() + (p.to - kSharedBase), p.from, size_t(p.bytes));
            return;
        }
        const auto& shape = p.map.shape;
        uint32_t offset = 0;
        for (int i3 = 0; i3 < shape.box[3]; ++i3) {
            for (int i2 = 0; i2 < shape.box[2]; ++i2) {
                for (int i1 = 0; i1 < shape.box[1]; ++i1) {
                    for (int i0 = 0; i0 < shape.box[0]; ++i0, offset += 2) {
                        copy_element(p, {i0, i1, i2, i3}, offset);
                    }
                }
            }
        }
    }
    static void copy_element(const Pending& p, const int (&within)[4], uint32_t offset) {
        const auto& shape = p.map.shape;
        bool inside = true;
        int64_t from = 0;
        for (int i = 0; i < 4; ++i) {
            const int64_t x = int64_t(p.tile.at[i]) + within[i];
            inside &= x >= 0 && x < shape.sizes[i];
            from += x * (i == 0 ? 2 : shape.strides[i - 1]);
        }
        uint32_t address = p.to + offset;
        if (shape.swizzle == cuda::ptx::Swizzle::bytes128) address = swizzled(address);
        unsigned char* to = dynamic_shared() + (address - kSharedBase);
        if (inside) {
            std::memcpy(to, p.map.base + from, 2);
        } else {
            std::memset(to, 0, 2);
        }
    }
};

Barriers::Barrier& find(const char* name, uint32_t barrier, Where where) {
    auto& all = unit<Barriers>().at;
    const auto found = all.find(barrier);
    if (found == all.end()) fail_no_barrier(name, where);
    return found->second;
}

void check_fenced(const char* name, uint32_t barrier, Where where) {
    if (find(name, barrier, where).fenced) return;
    fail(std::string(name) + " at " + text(where) +
         ": no mbarrier_fence_init has followed mbarrier_init in its thread");
}

// What this thread has done to the destination comes before what others do after the phase.
void issue(const Copies::Pending& copy) {
    auto& counted = unit<Barriers>().at[copy.barrier];
    release(&counted.sync[counted.phase]);
    unit<Copies>().pending.push_back(copy);
}

}  // namespace

uint64_t* barrier_word(const char* name, uint32_t barrier, Where where) {
    return reinterpret_cast<uint64_t*>(shared_at(name, barrier, 8, 8, where));
}

void fail_no_barrier(const char* name, Where where) {
    fail(std::string(name) + " at " + text(where) + ": no mbarrier is there; it is not initialised, or overwritten");
}

void init_barrier(uint32_t barrier, int arrivals, Where where) {
    if (arrivals < 1 || arrivals >= 1 << 20) {
        fail("mbarrier_init at " + text(where) + ": " + std::to_string(arrivals) + " arrivals");
    }
    Barriers::Barrier fresh;
    fresh.arrivals = fresh.missing = arrivals;
    fresh.initialised_by = thread_number();
    unit<Barriers>().at[barrier] = fresh;
}

void fence_barriers() {
    for (auto& [address, barrier] : unit<Barriers>().at) barrier.fenced |= barrier.initialised_by == thread_number();
}

void arrive(uint32_t address, int bytes, Where where) {
    const char* name = bytes == 0 ? "mbarrier_arrive" : "mbarrier_expect_tx";
    auto& barrier = find(name, address, where);
    if (bytes < 0 || bytes >= 1 << 20) fail(std::string(name) + " at " + text(where) + ": " + std::to_string(bytes));
    if (barrier.missing == 0) fail(std::string(name) + " at " + text(where) + ": the phase has all its arrivals");
    release(&barrier.sync[barrier.phase]);
    --barrier.missing;
    barrier.bytes += bytes;
    if (barrier.missing == 0 && barrier.bytes < 0) {
        fail(std::string(name) + " at " + text(where) + ": " + std::to_string(-barrier.bytes) +
             " bytes more than were announced have been copied");
    }
    unit<Barriers>().settle(barrier);
}

void wait_barrier(uint32_t address, int parity, Where where) {
    auto& barrier = find("mbarrier_wait", address, where);
    if (parity != 0 && parity != 1) fail("mbarrier_wait at " + text(where) + ": the parity is not 0 or 1");
    while (barrier.phase == parity) {
        barrier.waiting.push_back(running());
        sleep("mbarrier_wait", where);
    }
    acquire(&barrier.sync[parity]);
}

void wrote_shared(const void* address, size_t bytes) {
    const auto first = reinterpret_cast<uint64_t>(address) - reinterpret_cast<uint64_t>(dynamic_shared());
    if (first + bytes > shared_bytes()) return;
    auto& writes = unit<UnfencedWrites>();
    for (size_t place = first / 16; place <= (first + bytes - 1) / 16; ++place) {
        if (writes.by[place] == thread_number()) continue;
        writes.by[place] = thread_number();
        writes.places[thread_number()].push_back(place);
    }
}

void fence_async_shared() {
    auto& writes = unit<UnfencedWrites>();
    auto& places = writes.places[thread_number()];
    for (size_t place : places) {
        if (writes.by[place] == thread_number()) writes.by[place] = -1;
    }
    places.clear();
}

void check_async_visible(const char* name, uint32_t address, Where where) {
    const int by = unit<UnfencedWrites>().by[(address - kSharedBase) / 16];
    if (by < 0) return;
    fail(std::string(name) + " at " + text(where) + ": it reads what thread " + std::to_string(by) +
         " has written, without a fence_async_shared behind it");
}

bool valid(const cuda::ptx::TensorShape& shape, const void* base) {
    bool good = base != nullptr && reinterpret_cast<uint64_t>(base) % 16 == 0;
    for (int i = 0; i < 4; ++i) {
        good &= shape.sizes[i] >= 1 && shape.sizes[i] <= int64_t(1) << 32;
        good &= shape.box[i] >= 1 && shape.box[i] <= 256;
    }
    for (int64_t stride : shape.strides) good &= stride > 0 && stride % 16 == 0 && stride < int64_t(1) << 40;
    good &= shape.box[0] * 2 % 16 == 0;
    return good && (shape.swizzle == cuda::ptx::Swizzle::none || shape.box[0] * 2 <= 128);
}

int64_t tile_bytes(const TensorMap& map) {
    const int* box = map.shape.box;
    return int64_t(2) * box[0] * box[1] * box[2] * box[3];
}

unsigned char* check_tile(uint32_t to, const TensorMap* map, uint32_t barrier, Where where) {
    if (reinterpret_cast<uint64_t>(map) % 64 != 0 || !valid(map->shape, map->base)) {
        fail("tma_load_4d at " + text(where) + ": this is no tensor map of make_tensor_map, aligned to 64");
    }
    check_fenced("tma_load_4d", barrier, where);
    const size_t alignment = map->shape.swizzle == cuda::ptx::Swizzle::none ? 128 : 1024;
    return shared_at("tma_load_4d", to, size_t(tile_bytes(*map)), alignment, where);
}

void check_start(Tile tile, Where where) {
    if (tile.at[0] % 8 == 0) return;  // a GPU finds an illegal instruction, and the context is lost
    fail("tma_load_4d at " + text(where) + ": the innermost coordinate is " + std::to_string(tile.at[0]) +
         ", not a multiple of 16 bytes");
}

void issue_tile(uint32_t to, const TensorMap* map, uint32_t barrier, Tile tile) {
    ++counting().tile_copies;
    counting().tile_bytes += uint64_t(tile_bytes(*map));
    issue({"tma_load_4d", to, barrier, tile_bytes(*map), *map, tile, nullptr});
}

Bulk check_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier, Where where) {
    const std::string what = "bulk_load at " + text(where) + ": ";
    check_fenced("bulk_load", barrier, where);
    if (bytes <= 0 || bytes % 16 != 0) fail(what + std::to_string(bytes) + " bytes, not a multiple of 16");
    if (reinterpret_cast<uint64_t>(from) % 16 != 0) fail(what + "the source is not aligned to 16");
    note_copy(from, size_t(bytes), where);
    return {shared_at("bulk_load", to, size_t(bytes), 16, where), static_cast<const unsigned char*>(from), bytes};
}

void issue_bulk(const Bulk& copy, uint32_t barrier) {
    ++counting().bulk_copies;
    counting().bulk_bytes += uint64_t(copy.bytes);
    const uint32_t to = kSharedBase + uint32_t(copy.to - dynamic_shared());
    issue({"bulk_load", to, barrier, copy.bytes, {}, {}, copy.from});
}

}  // namespace igpt::emulator
