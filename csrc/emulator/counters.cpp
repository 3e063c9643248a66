#include "counters.h"

#include <algorithm>
#include <vector>

namespace igpt::emulator {
namespace {

constexpr uint64_t kSector = 32;
constexpr uint64_t kBanks = 32;
constexpr uint64_t kBankBytes = 4;

// The numbers of the pieces of `unit` bytes that accesses touch.
std::vector<uint64_t> pieces(const uint64_t* first, const uint64_t* last, size_t bytes, uint64_t unit) {
    std::vector<uint64_t> touched;
    for (; first != last; ++first) {
        if (*first == 0) continue;
        for (uint64_t i = *first / unit; i <= (*first + bytes - 1) / unit; ++i) touched.push_back(i);
    }
    std::sort(touched.begin(), touched.end());
    touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    return touched;
}

}  // namespace

void Requests::add(int thread, Access access, uint64_t epoch, uint64_t n, uint64_t address, size_t bytes) {
    const uint64_t key = (((epoch << 24) + n) * 4 + uint64_t(access)) * 32 + uint64_t(thread / 32);
    Request& request = open_[key];
    request.access = access;
    request.bytes = bytes;
    request.addresses[thread % 32] = address;
    if (++request.lanes == 32) {
        count(request);
        open_.erase(key);
    }
}

void Requests::finish() {
    for (const auto& entry : open_) count(entry.second);
    open_.clear();
}

void Requests::count(const Request& request) {
    const uint64_t *begin = request.addresses, *end = begin + 32;
    const uint64_t bytes = uint64_t(request.lanes) * request.bytes;
    if (request.access == Access::global_load) {
        counters_.load_requests += 1;
        counters_.load_sectors += pieces(begin, end, request.bytes, kSector).size();
        counters_.load_bytes += bytes;
    } else if (request.access == Access::global_store) {
        counters_.store_requests += 1;
        counters_.store_sectors += pieces(begin, end, request.bytes, kSector).size();
        counters_.store_bytes += bytes;
    } else {
        counters_.shared_requests += 1;
        // 128 bytes at a time: 8-byte accesses go by half warps, 16-byte ones by quarters. Each takes as many turns as
        // the busiest bank has words to give.
        const size_t lanes = std::min<size_t>(32, 128 / request.bytes);
        for (; begin != end; begin += lanes) {
            uint64_t load[kBanks] = {};
            for (uint64_t word : pieces(begin, begin + lanes, request.bytes, kBankBytes)) ++load[word % kBanks];
            const uint64_t turns = *std::max_element(load, load + kBanks);
            counters_.shared_wavefronts += turns;
            counters_.shared_conflicts += turns > 0 ? turns - 1 : 0;
        }
    }
}

}  // namespace igpt::emulator
