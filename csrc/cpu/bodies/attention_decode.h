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

constexpr int64_t kKeys = 256;       // a multiple of kTile
constexpr int64_t kBurst = 4 << 10;  // bytes

// Where the groups of a position's key lie, and its value.
template <class F>
inline char* key_of(const AttentionDecodeParams& p, int64_t size) {
    const int64_t t = p.position;
    return p.keys + (t / kTile * kTile * p.head_dim + t % kTile * F::step) * size;
}
template <class F>
inline char* value_of(const AttentionDecodeParams& p, int64_t size) {
    const int64_t t = p.position;
    return p.values + (t / F::step * padded(p.head_dim, kLanes) * F::step + t % F::step) * size;
}

template <class F, class T>
inline void scatter(const AttentionDecodeParams& p, const T* key, const T* value) {
    char *k = key_of<F>(p, sizeof(T)), *v = value_of<F>(p, sizeof(T));
    // What is behind a value meets a probability of zero, and could be a NaN of before the decoder went back.
    if (p.position % value_rows == 0)
        __builtin_memset(v, 0, size_t(value_rows * padded(p.head_dim, kLanes)) * sizeof(T));
    for (int64_t i = 0; i < p.head_dim; i += F::step, k += kTile * F::step * sizeof(T))
        __builtin_memcpy(k, key + i, F::step * sizeof(T));
    for (int64_t i = 0; i < p.head_dim; ++i, v += F::step * sizeof(T)) __builtin_memcpy(v, value + i, sizeof(T));
}

// n numbers as int8, rounded to nearest, and their sum; returns the scale, which is NaN when one is not finite.
inline float to_int8(const float* x, int64_t n, int8_t* out, int32_t& sum) {
    alignas(64) float padded_x[max_head_dim + kLanes] = {};
    __builtin_memcpy(padded_x, x, size_t(n) * sizeof(float));
    Vec most = zero(), poison = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec v = load(padded_x + i);
        most = max(most, abs(v));
        poison = fma(v, zero(), poison);
    }
    const float scale = reduce_max(most) / 127.0f, inverse = scale > 1e-37f ? 1.0f / scale : 0.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float q = x[i] * inverse;
        // What is not finite is 0: the scale is NaN.
        const int32_t rounded = q >= -127.5f && q <= 127.5f ? int32_t(q + (q < 0 ? -0.5f : 0.5f)) : 0;
        total += rounded;
        out[i] = int8_t(rounded);
    }
    sum = total;
    return scale + reduce_add(poison);
}

void remember(const AttentionDecodeParams& p) {
    const int64_t d = p.head_dim;
    if (p.format == Format::fp32) return scatter<Fp32>(p, p.k, p.v);
    if (p.format == Format::bf16) {
        uint16_t rounded[2][max_head_dim];
        for (int64_t i = 0; i < d; ++i) rounded[0][i] = to_bf16(p.k[i]);
        for (int64_t i = 0; i < d; ++i) rounded[1][i] = to_bf16(p.v[i]);
        return scatter<Bf16>(p, rounded[0], rounded[1]);
    }
    int8_t rounded[2][max_head_dim];
    int32_t unused;
    p.key_scale[p.position] = to_int8(p.k, d, rounded[0], p.key_sums[p.position]);
    p.value_scale[p.position] = to_int8(p.v, d, rounded[1], unused);
    scatter<Int8>(p, rounded[0], rounded[1]);
}

template <class F>
inline void expect_in(const AttentionDecodeParams& p, int64_t size) {
    const char *k = key_of<F>(p, size), *v = value_of<F>(p, size);
    for (int64_t i = 0; i < p.head_dim; i += F::step, k += kTile * F::step * size) __builtin_prefetch(k, 1, 2);
    for (int64_t i = 0; i < p.head_dim * F::step * size; i += 64) __builtin_prefetch(v + i, 1, 2);
    if (p.format != Format::int8) return;
    for (int64_t t = 0; t <= p.position; t += 16) {  // these are too short to be prefetched while they are read
        prefetch(reinterpret_cast<const char*>(p.key_scale + t));
        prefetch(reinterpret_cast<const char*>(p.value_scale + t));
        prefetch(reinterpret_cast<const char*>(p.key_sums + t));
    }
}

// Prefetches what `remember` will write and what `attention_decode` would wait for.
void expect(const AttentionDecodeParams& p) {
    in_format(p.format, [&](auto weights) { expect_in<decltype(weights)>(p, format_bytes(p.format)); });
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

// Scores of the positions from .. from + count - 1, a multiple of kLanes; `next` is read afterwards.
template <class F>
inline void score(const AttentionDecodeParams& p, const Split& q, int64_t from, int64_t count, int64_t size,
                  float* scores, const char* next) {
    const int64_t d = p.head_dim, tile_bytes = kTile * d * size;
    const char* end = p.keys + padded(from + count, kTile) / kTile * tile_bytes;
    alignas(64) float sums[2 * kTile];
    for (int64_t t = from; t < from + count; t += kTile) {
        const int64_t left = (from + count - t) / kLanes;
        const int registers = int(left < 4 ? left : 4);
        one_row<F>(p.keys + t / kTile * tile_bytes, 4 * F::bytes, d, q, sums, registers, end, next);
        for (int c = 0; c < registers; ++c) {
            const int64_t at = t + c * kLanes;
            Vec v = load(sums + c * kLanes);
            if constexpr (F::splits)
                v = F::whole(sums + c * kLanes, sums + kTile + c * kLanes, p.key_sums + at) * set1(q.scale);
            if (p.format == Format::int8) v = v * load(p.key_scale + at);
            store(scores + at - from, v);
        }
    }
}

// acc = acc * keep + probabilities V, over count positions, a multiple of value_rows; `next` is read afterwards.
template <class F>
inline void mix(const AttentionDecodeParams& p, const Split& probabilities, int64_t from, int64_t count, float keep,
                float* acc, const char* next) {
    const int64_t width = padded(p.head_dim, kLanes), stride = width / kLanes * F::bytes;
    const char *base = p.values + from / F::step * stride, *end = base + count / F::step * stride;
    alignas(64) float sums[2 * kTile];
    for (int64_t n = 0; n < width; n += kTile) {
        const int registers = int((width - n < kTile ? width - n : kTile) / kLanes);
        one_row<F>(base + n / kLanes * F::bytes, stride, count, probabilities, sums, registers, end, next);
        for (int c = 0; c < registers; ++c) {
            Vec v = load(sums + c * kLanes);
            if constexpr (F::splits)
                v = F::whole(sums + c * kLanes, sums + kTile + c * kLanes, nullptr) * set1(probabilities.scale);
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
void attention_decode_in(const AttentionDecodeParams& p, int64_t size) {
    const int64_t keys = p.position + 1, width = padded(p.head_dim, kLanes);
    Split q, probabilities;
    alignas(64) float acc[max_head_dim + kLanes];
    for (int64_t i = 0; i < p.head_dim; ++i) q.x[i] = p.q[i] * p.scale;
    if constexpr (F::splits) q.scale = F::template split_row<true>(q.x, p.head_dim, q.high, q.low);
    float most = -__builtin_inff(), total = 0.0f;
    float* scores = probabilities.x;
    // Blocks of equal length: a short last one would leave no time to prefetch what comes after it.
    const int64_t blocks = (keys + kKeys - 1) / kKeys, block = padded((keys + blocks - 1) / blocks, kTile);
    for (int64_t from = 0; from < keys; from += block) {
        const int64_t left = keys - from, count = left < block ? left : block, rounded = padded(count, kLanes);
        const char* values = p.values + from * width * size;
        score<F>(p, q, from, rounded, size, scores, values);
        // Memory is not to rest in the meantime.
        for (int64_t i = 0; i < kBurst; i += 64) prefetch(values + kAhead + i);
        // What lies beyond the newest key must not decide the maximum.
        for (int64_t i = count; i < rounded; ++i) scores[i] = -__builtin_inff();
        const float here = largest(scores, rounded), before = most;
        most = here > most || here != here ? here : most;
        const float keep = from == 0 ? 0.0f : __builtin_expf(before - most);
        total = total * keep + weigh(scores, count, most);
        const int64_t wide = padded(count, value_rows);
        if (p.format == Format::int8)
            for (int64_t i = 0; i < count; ++i) scores[i] *= p.value_scale[from + i];
        if constexpr (F::splits)
            probabilities.scale = F::template split_row<false>(scores, wide, probabilities.high, probabilities.low);
        const char* next = left > block ? p.keys + (from + block) * p.head_dim * size : p.next;
        mix<F>(p, probabilities, from, wide, keep, acc, next);
    }
    if (p.state) {
        p.state[0] = most;
        p.state[1] = total;
    }
    const Vec inverse = set1(1.0f / total);
    for (int64_t i = 0; i < width; i += kLanes) store(acc + i, load(acc + i) * inverse);
    __builtin_memcpy(p.out, acc, size_t(p.head_dim) * sizeof(float));
}

void attention_decode(const AttentionDecodeParams& p) {
    in_format(p.format, [&](auto weights) { attention_decode_in<decltype(weights)>(p, format_bytes(p.format)); });
}

}  // namespace
}  // namespace igpt::cpu
