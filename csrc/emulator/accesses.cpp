// Loads and stores as they happen: alignment, counters, and what may not be touched before grid_dependency_wait.
#include "accesses.h"

#include <array>
#include <string>
#include <unordered_map>

#include "memory.h"
#include "ptx.h"
#include "threads.h"

namespace igpt::emulator {
namespace {

// Words of four bytes in global memory, as bits by pages.
class Places {
  public:
    void add(uint64_t address, size_t bytes) {
        for (uint64_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
            pages_[word / kWords][word % kWords / 64] |= uint64_t(1) << word % 64;
        }
    }
    void add(const Places& others) {
        for (const auto& [number, page] : others.pages_) {
            auto& own = pages_[number];
            for (size_t i = 0; i < own.size(); ++i) own[i] |= page[i];
        }
    }
    bool have(uint64_t address, size_t bytes) const {
        for (uint64_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
            const auto page = pages_.find(word / kWords);
            if (page != pages_.end() && page->second[word % kWords / 64] >> word % 64 & 1) return true;
        }
        return false;
    }
    void clear() { pages_.clear(); }

  private:
    static constexpr uint64_t kWords = 1024;
    std::unordered_map<uint64_t, std::array<uint64_t, kWords / 64>> pages_;
};

bool is_dependent = false;  // the launch that runs
bool hurries = false;       // every block of it has let the next one begin before it had waited
Places unfinished;          // written by launches that may not have ended when it began
Places written;             // by it

void check(Access access, uint64_t address, size_t bytes, Where where) {
    if (!is_dependent || current->waited || access == Access::shared) return;
    if (access == Access::global_store) fail("a store at " + text(where) + " before grid_dependency_wait");
    if (unfinished.have(address, bytes)) {
        fail("a load at " + text(where) +
             " before grid_dependency_wait, of what a launch writes that may not have ended");
    }
}

}  // namespace

void begin_accesses(bool dependent) {
    // A launch that lets the next one begin when it has waited has seen all before it end.
    if (!dependent || !hurries) unfinished.clear();
    if (dependent) unfinished.add(written);
    written.clear();
    is_dependent = dependent;
    hurries = true;
}

void end_accesses() {
    hurries &= block->hurried;
    if (is_dependent && !block->waited) fail("a block of a dependent launch ends without grid_dependency_wait");
}

void grid_dependency_wait() { block->waited = current->waited = true; }

void grid_dependency_launch() { block->hurried |= !current->waited; }

void note_copy(const void* from, size_t bytes, Where where) {
    check(Access::global_load, reinterpret_cast<uint64_t>(from), bytes, where);
}

void skip(Access access) { ++current->accesses[int(access)]; }

void check_read(const void* address, size_t bytes, Where where) {
    check(Access::global_load, reinterpret_cast<uint64_t>(address), bytes, where);
}

void note(Access access, const void* address, size_t bytes, Where where) {
    const uint64_t at = reinterpret_cast<uint64_t>(address);
    if (at % bytes != 0) fail("a misaligned access of " + std::to_string(bytes) + " bytes");
    check(access, at, bytes, where);
    if (access == Access::global_store) written.add(at, bytes);
    block->requests.add(current->number, access, current->epoch, current->accesses[int(access)]++, at, bytes);
}

}  // namespace igpt::emulator
