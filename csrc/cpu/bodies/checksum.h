// A number of 64 bits for a block of memory, the body.
//
// Words of 64 bits go round lane by lane, eight registers beside each other, into states that each step turns into
// another one without loss: what changes in one word changes the number, whatever it is, and what changes in several
// but by chance. Bound by reading the memory. The number is a level's own: lanes are as many as its registers have.
#pragma once

#include "simd/registers.h"

namespace igpt::cpu {
namespace {

using Longs = uint64_t __attribute__((vector_size(4 * kLanes)));

// Every step of it has an inverse: a turn by 29, and an odd factor, 1 + 2^21, for which no machine needs a multiplier.
template <class W>
inline void stir(W& state, W word) {
    word ^= state;
    word = word << 29 | word >> 35;
    state = word + (word << 21);
}

uint64_t checksum(const char* data, int64_t bytes) {
    constexpr int64_t chains = 8;
    Longs state[chains] = {}, words[chains];
    int64_t at = 0;
    const auto add = [&] {
        for (int64_t i = 0; i < chains; ++i) stir(state[i], words[i]);
    };
    for (; at + int64_t(sizeof words) <= bytes; at += sizeof words) {
        __builtin_memcpy(words, data + at, sizeof words);
        add();
    }
    __builtin_memset(words, 0, sizeof words);
    __builtin_memcpy(words, data + at, size_t(bytes - at));
    add();
    uint64_t all = uint64_t(bytes), lanes[sizeof state / 8];
    __builtin_memcpy(lanes, state, sizeof state);
    for (const uint64_t lane : lanes) stir(all, lane);
    return all;
}

}  // namespace
}  // namespace igpt::cpu
