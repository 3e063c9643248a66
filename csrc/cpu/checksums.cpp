#include "checksums.h"

#include <algorithm>
#include <cstring>

#include "ops.h"

namespace igpt::cpu {
namespace {

constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;

uint64_t mix(uint64_t state, uint64_t word) {
    state ^= word;
    return (state << 29 | state >> 35) * kOdd;
}

uint64_t checksum(const char* data, size_t bytes) {
    constexpr size_t chains = 8;  // a multiplication waits for the one before
    uint64_t state[chains] = {}, words[chains];
    size_t at = 0;
    for (; at + sizeof words <= bytes; at += sizeof words) {
        std::memcpy(words, data + at, sizeof words);
        for (size_t i = 0; i < chains; ++i) state[i] = mix(state[i], words[i]);
    }
    std::memset(words, 0, sizeof words);
    std::memcpy(words, data + at, bytes - at);
    uint64_t all = bytes;
    for (size_t i = 0; i < chains; ++i) all = mix(all, mix(state[i], words[i]));
    return all;
}

}  // namespace

std::vector<uint64_t> checksums(const std::vector<std::pair<uintptr_t, size_t>>& blocks, int threads) {
    constexpr size_t part = size_t(1) << 20;
    std::vector<std::pair<uintptr_t, size_t>> parts;
    for (const auto& [address, bytes] : blocks)
        for (size_t at = 0; at < bytes; at += part) parts.push_back({address + at, std::min(part, bytes - at)});
    std::vector<uint64_t> sums(parts.size()), out;
    const int used = usable_threads(threads);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (size_t i = 0; i < parts.size(); ++i)
        sums[i] = checksum(reinterpret_cast<const char*>(parts[i].first), parts[i].second);
    size_t next = 0;
    for (const auto& block : blocks) {
        out.push_back(0);
        for (size_t at = 0; at < block.second; at += part) out.back() = mix(out.back(), sums[next++]);
    }
    return out;
}

}  // namespace igpt::cpu
