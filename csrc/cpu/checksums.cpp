#include "checksums.h"

#include <algorithm>
#include <cstring>

#include "ops.h"
#include "region.h"

namespace igpt::cpu {
namespace {

uint64_t mix(uint64_t state, uint64_t word) {
    state ^= word;
    return (state << 29 | state >> 35) * 0x9e3779b97f4a7c15u;
}

// [n][b]: what the byte b, with n bytes of zero behind it, adds to a CRC.
struct CrcTables {
    uint32_t of[8][256];
    constexpr CrcTables() : of{} {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            uint32_t crc = byte;
            for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
            of[0][byte] = crc;
        }
        for (int behind = 1; behind < 8; ++behind)
            for (int byte = 0; byte < 256; ++byte)
                of[behind][byte] = of[behind - 1][byte] >> 8 ^ of[0][of[behind - 1][byte] & 0xff];
    }
};
constexpr CrcTables crc_tables;

// Each takes whole words of eight bytes.
uint32_t by_tables(uint32_t crc, const unsigned char* at, const unsigned char* end) {
    const auto& of = crc_tables.of;
    for (uint64_t word; at < end; at += 8) {
        std::memcpy(&word, at, 8);
        word ^= crc;
        crc = 0;
        for (int i = 0; i < 8; ++i) crc ^= of[7 - i][word >> 8 * i & 0xff];
    }
    return crc;
}

#ifdef IGPT_X86
__attribute__((target("sse4.2"))) uint32_t by_instruction(uint32_t crc, const unsigned char* at,
                                                          const unsigned char* end) {
    uint64_t wide = crc;
    for (uint64_t word; at < end; at += 8) {
        std::memcpy(&word, at, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    return uint32_t(wide);
}
#endif

}  // namespace

uint32_t crc32c(const void* data, size_t bytes, uint32_t before) {
    const auto *at = static_cast<const unsigned char*>(data), *words = at + bytes / 8 * 8, *end = at + bytes;
    auto* each = by_tables;
#ifdef IGPT_X86
    if (&ops() != &generic_ops) each = by_instruction;  // every other set has SSE4.2
#endif
    uint32_t crc = each(~before, at, words);
    for (at = words; at < end; ++at) crc = crc >> 8 ^ crc_tables.of[0][(crc ^ *at) & 0xff];
    return ~crc;
}

std::vector<uint64_t> checksums(const std::vector<std::pair<uintptr_t, size_t>>& blocks, int threads) {
    constexpr size_t part = size_t(1) << 20;
    std::vector<std::pair<uintptr_t, size_t>> parts;
    for (const auto& [address, bytes] : blocks)
        for (size_t at = 0; at < bytes; at += part) parts.push_back({address + at, std::min(part, bytes - at)});
    std::vector<uint64_t> sums(parts.size()), out;
    const auto sum = ops().checksum;
    for_each(int64_t(parts.size()), usable_threads(threads), [&](int64_t i) {
        sums[i] = sum(reinterpret_cast<const char*>(parts[i].first), int64_t(parts[i].second));
    });
    size_t next = 0;
    for (const auto& block : blocks) {
        out.push_back(0);
        for (size_t at = 0; at < block.second; at += part) out.back() = mix(out.back(), sums[next++]);
    }
    return out;
}

}  // namespace igpt::cpu
