// out = softmax(scale q K^T) V of one new position, the body.
//
// Layouts: decoder_kernels.h. The cache is read once, kKeys positions at a time, with a running maximum and sum: no
// intermediate grows with the context. Bound by that reading, 2 head_dim weights a position.
//
// int8: every position's key and value has a scale of its own; the values' scales go into the probabilities.
#pragma once

#include "linear.h"
#include "pack.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kKeys = 256;  // a multiple of kTile

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Writes one weight: element k of output n, `width` outputs in a tile.
template <class F>
inline char* place(char* data, int64_t n, int64_t k, int64_t width, int64_t size) {
    return data + ((k / F::step * width + n) * F::step + k % F::step) * size;
}

template <class F, class T, class Convert>
inline void scatter(const AttentionParams& p, Convert convert) {
    const int64_t t = p.position, d = p.head_dim;
    char* keys = p.keys + t / kTile * kTile * d * int64_t(sizeof(T));
    for (int64_t i = 0; i < d; ++i) {
        const T k = convert(p.k[i], 0), v = convert(p.v[i], 1);
        __builtin_memcpy(place<F>(keys, t % kTile, i, kTile, sizeof(T)), &k, sizeof(T));
        __builtin_memcpy(place<F>(p.values, i, t, padded(d, kLanes), sizeof(T)), &v, sizeof(T));
    }
}

// The scale of n numbers as int8; NaN when one is not finite.
inline float int8_scale(const float* x, int64_t n) {
    float most = 0.0f, poison = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        const float magnitude = __builtin_fabsf(x[i]);
        most = magnitude > most ? magnitude : most;
        poison += x[i] * 0.0f;
    }
    return most / 127.0f + poison;
}

void remember(const AttentionParams& p) {
    switch (p.format) {
        case Format::fp32:
            return scatter<Fp32, float>(p, [](float x, int) { return x; });
        case Format::bf16:
            return scatter<Bf16, uint16_t>(p, [](float x, int) { return to_bf16(x); });
        case Format::int8:
            break;
    }
    const float scales[2] = {int8_scale(p.k, p.head_dim), int8_scale(p.v, p.head_dim)};
    const float inverse[2] = {scales[0] > 1e-37f ? 1.0f / scales[0] : 0.0f,
                              scales[1] > 1e-37f ? 1.0f / scales[1] : 0.0f};
    int32_t sums[2] = {0, 0};
    scatter<Int8, int8_t>(p, [&](float x, int which) {
        const float q = x * inverse[which];
        const int32_t rounded = int32_t(q + (q < 0 ? -0.5f : 0.5f));
        sums[which] += rounded;
        return int8_t(rounded);
    });
    p.key_scale[p.position] = scales[0];
    p.value_scale[p.position] = scales[1];
    p.key_sums[p.position] = sums[0];
}

// The inputs of the two products as the format takes them.
struct Split {
    alignas(64) float x[kKeys > max_head_dim ? kKeys : max_head_dim];
    alignas(64) uint8_t high[sizeof(x) / sizeof(float)];
    alignas(64) uint8_t low[sizeof(x) / sizeof(float)];
    float scale;
};

template <class F>
inline void one_row(const char* weights, ptrdiff_t stride, int64_t count, const Split& x, float* sums, int registers,
                    const char* end, const char* next) {
    Piece piece{};
    piece.weights = weights;
    piece.stride = stride;
    piece.count = count;
    piece.x = x.x;
    piece.high = x.high;
    piece.low = x.low;
    piece.sums = sums;
    piece.width = kTile;
    piece.first = true;
    prefetch_in_front(piece, end, next);
    run_rows<F>(piece, 1, registers);
}

// Scores of the positions from .. from + count - 1, a multiple of kLanes.
template <class F>
inline void score(const AttentionParams& p, const Split& q, int64_t from, int64_t count, int64_t size, float* scores) {
    const int64_t d = p.head_dim, tile_bytes = kTile * d * size, seen = padded(p.position + 1, kTile);
    alignas(64) float sums[2 * kTile];
    for (int64_t t = from; t < from + count; t += kTile) {
        const int64_t left = (from + count - t) / kLanes;
        const int registers = int(left < 4 ? left : 4);
        one_row<F>(p.keys + t / kTile * tile_bytes, 4 * F::bytes, d, q, sums, registers,
                   p.keys + seen / kTile * tile_bytes, p.values);
        for (int c = 0; c < registers; ++c) {
            const int64_t at = t + c * kLanes;
            Vec v = load(sums + c * kLanes);
            if (p.format == Format::int8) {
#if defined(__AVX512VNNI__)
                v = whole(sums + c * kLanes, sums + kTile + c * kLanes, p.key_sums + at) * set1(q.scale);
#endif
                v = v * load(p.key_scale + at);
            }
            store(scores + at - from, v);
        }
    }
}

// acc = acc * keep + probabilities V, over count positions, a multiple of 4.
template <class F>
inline void mix(const AttentionParams& p, const Split& probabilities, int64_t from, int64_t count, float keep,
                float* acc) {
    const int64_t width = padded(p.head_dim, kLanes), stride = width / kLanes * F::bytes;
    const char *base = p.values + from / F::step * stride,
               *end = p.values + padded(p.position + 1, value_rows) / F::step * stride;
    alignas(64) float sums[2 * kTile];
    for (int64_t n = 0; n < width; n += kTile) {
        const int registers = int((width - n < kTile ? width - n : kTile) / kLanes);
        one_row<F>(base + n / kLanes * F::bytes, stride, count, probabilities, sums, registers, end, p.next);
        for (int c = 0; c < registers; ++c) {
            Vec v = load(sums + c * kLanes);
#if defined(__AVX512VNNI__)
            if (p.format == Format::int8)
                v = whole(sums + c * kLanes, sums + kTile + c * kLanes, nullptr) * set1(probabilities.scale);
#endif
            float* at = acc + n + c * kLanes;
            store(at, from == 0 ? v : fma(load(at), set1(keep), v));
        }
    }
}

// scores -> e^(score - most), their sum; beyond `count`, zeros.
inline float weigh(float* scores, int64_t count, float most) {
    Vec total = zero();
    const int64_t end = padded(count, kLanes);
    for (int64_t i = 0; i < end; i += kLanes) store(scores + i, exp(load(scores + i) - set1(most)));
    for (int64_t i = count; i < padded(end, value_rows); ++i) scores[i] = 0.0f;
    for (int64_t i = 0; i < end; i += kLanes) total = total + load(scores + i);
    return reduce_add(total);
}

inline float largest(const float* scores, int64_t count) {
    Vec most = load(scores);
    for (int64_t i = kLanes; i < count; i += kLanes) most = max(most, load(scores + i));
    return reduce_max(most);
}

template <class F>
void attend_in(const AttentionParams& p, int64_t size) {
    const int64_t keys = p.position + 1, width = padded(p.head_dim, kLanes);
    Split q, probabilities;
    alignas(64) float acc[max_head_dim + kLanes];
    for (int64_t i = 0; i < p.head_dim; ++i) q.x[i] = p.q[i] * p.scale;
#if defined(__AVX512VNNI__)
    if (p.format == Format::int8) q.scale = split_row<true>(q.x, p.head_dim, q.high, q.low);
#endif
    float most = -__builtin_inff(), total = 0.0f;
    float* scores = probabilities.x;
    for (int64_t from = 0; from < keys; from += kKeys) {
        const int64_t count = keys - from < kKeys ? keys - from : kKeys, rounded = padded(count, kLanes);
        score<F>(p, q, from, rounded, size, scores);
        // What lies beyond the newest key must not decide the maximum.
        for (int64_t i = count; i < rounded; ++i) scores[i] = -__builtin_inff();
        const float here = largest(scores, rounded), before = most;
        most = here > most || here != here ? here : most;
        const float keep = from == 0 ? 0.0f : __builtin_expf(before - most);
        total = total * keep + weigh(scores, count, most);
        const int64_t wide = padded(count, value_rows);
        if (p.format == Format::int8) {
            for (int64_t i = 0; i < count; ++i) scores[i] *= p.value_scale[from + i];
#if defined(__AVX512VNNI__)
            probabilities.scale = split_row<false>(scores, wide, probabilities.high, probabilities.low);
#endif
        }
        mix<F>(p, probabilities, from, wide, keep, acc);
    }
    if (p.state) {
        p.state[0] = most;
        p.state[1] = total;
    }
    const Vec inverse = set1(1.0f / total);
    for (int64_t i = 0; i < width; i += kLanes) store(acc + i, load(acc + i) * inverse);
    __builtin_memcpy(p.out, acc, size_t(p.head_dim) * sizeof(float));
}

void attend(const AttentionParams& p) {
    switch (p.format) {
        case Format::fp32:
            return attend_in<Fp32>(p, 4);
        case Format::bf16:
            return attend_in<Bf16>(p, 2);
        case Format::int8:
            return attend_in<Int8>(p, 1);
    }
}

}  // namespace

}  // namespace igpt::cpu
