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

// Up to N rows of inputs of the two products, as the formats take them.
template <int64_t N>
struct SplitRows {
    alignas(64) float x[N][kKeys];
    alignas(64) uint8_t high[N][kKeys];
    alignas(64) uint8_t low[N][kKeys];
    alignas(64) uint16_t half[N][kKeys];
    float scale[N];
};
static_assert(max_head_dim <= kKeys);

// A format for up to N rows: `split` makes of the first n numbers of row r what its product takes; queries and
// probabilities stay fp32 where it takes them so.
template <class F, int64_t N>
struct Split : F {
    using Inputs = SplitRows<N>;
    static constexpr int64_t most_rows = N;
    template <bool Signed>
    static void split(Inputs& rows, int64_t r, int64_t n) {
        if constexpr (F::splits && F::step == 2)
            rows.scale[r] = F::split_row(rows.x[r], n, rows.half[r]);
        else if constexpr (F::splits)
            rows.scale[r] = F::template split_row<Signed>(rows.x[r], n, rows.high[r], rows.low[r]);
    }
};

// sums (rows, 2, kTile) = x W, one tile. One of several rows that is left alone is computed twice: a product of one row
// adds in another order.
template <class F>
inline void multiply_rows(const char* weights, ptrdiff_t stride, int64_t count, const typename F::Inputs& x,
                          int64_t rows, float* sums, int registers, const char* end, const char* next) {
    const int64_t blocks = (rows + F::max_rows - 1) / F::max_rows;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = rows * b / blocks, here = rows * (b + 1) / blocks - row;
        Piece piece{};
        piece.weights = weights;
        piece.stride = stride;
        piece.count = count;
        piece.x = x.x[row];
        piece.high = x.high[row];
        piece.low = x.low[row];
        piece.half = x.half[row];
        piece.ld = here == 1 ? 0 : kKeys;
        piece.sums = sums + 2 * row * kTile;
        piece.width = kTile;
        piece.first = true;
        if (blocks == 1)
            prefetch_in_front(piece, end, next);
        else
            prefetch_in_parts(piece, end, next, count / F::step, b, blocks);
        if constexpr (F::tiled) {
            F::set_inputs(piece, x);
            run_columns<F, F::max_rows>(piece, registers);
        } else if constexpr (F::most_rows == 1) {
            run_columns<F, 1>(piece, registers);
        } else {
            run_rows<F>(piece, here == 1 ? 2 : here, registers);
        }
    }
    if constexpr (F::tiled && F::step == 2)
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < registers; ++c) {
                float* sum = sums + 2 * r * kTile + c * kLanes;
                store(sum, load(sum) + load(sum + kTile));
            }
}

constexpr int64_t kSums = (shared_rows + 1) * 2 * kTile;  // of a tile, with a row that was computed twice

// Scores of the positions from .. from + count - 1, a multiple of kLanes, of `seen`; `next` is read after these.
template <class F>
inline void score(const AttentionDecodeParams& p, const typename F::Inputs& q, int64_t rows, int64_t from,
                  int64_t count, int64_t size, int64_t seen, const char* next, typename F::Inputs& scores) {
    const int64_t d = p.head_dim, tile_bytes = kTile * d * size;
    const char* end = p.keys + padded(seen, kTile) / kTile * tile_bytes;
    alignas(64) float sums[kSums];
    for (int64_t t = from; t < from + count; t += kTile) {
        const int64_t left = (from + count - t) / kLanes;
        const int registers = int(left < 4 ? left : 4);
        multiply_rows<F>(p.keys + t / kTile * tile_bytes, 4 * F::bytes, d, q, rows, sums, registers, end, next);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < registers; ++c) {
                const int64_t at = t + c * kLanes;
                const float* sum = sums + 2 * r * kTile + c * kLanes;
                Vec v = load(sum);
                if constexpr (F::splits) v = F::whole(sum, sum + kTile, p.key_sums + at) * set1(q.scale[r]);
                if (p.format == Format::int8) v = v * load(p.key_scale + at);
                store(scores.x[r] + at - from, v);
            }
    }
}

// The largest score, the sum of the weights and the weighted values so far, of each row.
template <int64_t N>
struct Running {
    float most[N], total[N];
    alignas(64) float acc[N][max_head_dim + kLanes];
};

// acc = acc * keep + probabilities V of each row, over the positions from .. from + count - 1, a multiple of
// value_rows, of `seen`; `next` is read after these.
template <class F, int64_t N>
inline void mix(const AttentionDecodeParams& p, const typename F::Inputs& probabilities, int64_t rows, int64_t from,
                int64_t count, const float* keep, int64_t seen, const char* next, Running<N>& sofar) {
    const int64_t width = padded(p.head_dim, kLanes), stride = width / kLanes * F::bytes;
    const char *base = p.values + from / F::step * stride, *end = p.values + seen / F::step * stride;
    alignas(64) float sums[kSums];
    for (int64_t n = 0; n < width; n += kTile) {
        const int registers = int((width - n < kTile ? width - n : kTile) / kLanes);
        multiply_rows<F>(base + n / kLanes * F::bytes, stride, count, probabilities, rows, sums, registers, end, next);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < registers; ++c) {
                const float* sum = sums + 2 * r * kTile + c * kLanes;
                Vec v = load(sum);
                if constexpr (F::splits) v = F::whole(sum, sum + kTile, nullptr) * set1(probabilities.scale[r]);
                float* at = sofar.acc[r] + n + c * kLanes;
                store(at, from == 0 ? v : fma(load(at), set1(keep[r]), v));
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

// The scores of `count` positions become probabilities; returns what to multiply the past with.
template <class F, int64_t N>
inline float weigh_row(const AttentionDecodeParams& p, typename F::Inputs& scores, int64_t r, int64_t from,
                       int64_t count, Running<N>& sofar) {
    float* x = scores.x[r];
    const int64_t rounded = padded(count, kLanes);
    // What lies beyond the newest key must not decide the maximum.
    for (int64_t i = count; i < rounded; ++i) x[i] = -__builtin_inff();
    const float here = largest(x, rounded), before = sofar.most[r];
    const float most = from == 0 || here > before || here != here ? here : before;
    const float keep = from == 0 ? 0.0f : __builtin_expf(before - most);
    sofar.most[r] = most;
    sofar.total[r] = (from == 0 ? 0.0f : sofar.total[r] * keep) + weigh(x, count, most);
    if (p.format == Format::int8)
        for (int64_t i = 0; i < count; ++i) x[i] *= p.value_scale[from + i];
    F::template split<false>(scores, r, padded(count, value_rows));
    return keep;
}

template <class F>
void attention_decode_in(const AttentionDecodeParams& p, int64_t size) {
    const int64_t keys = p.position + 1, width = padded(p.head_dim, kLanes);
    typename F::Inputs q, probabilities;
    Running<1> sofar;
    for (int64_t i = 0; i < p.head_dim; ++i) q.x[0][i] = p.q[i] * p.scale;
    F::template split<true>(q, 0, p.head_dim);
    // Blocks of equal length: a short last one would leave no time to prefetch what comes after it.
    const int64_t blocks = (keys + kKeys - 1) / kKeys, block = padded((keys + blocks - 1) / blocks, kTile);
    for (int64_t from = 0; from < keys; from += block) {
        const int64_t left = keys - from, count = left < block ? left : block, rounded = padded(count, kLanes);
        const char* values = p.values + from * width * size;
        score<F>(p, q, 1, from, rounded, size, from + rounded, values, probabilities);
        // Memory is not to rest in the meantime.
        for (int64_t i = 0; i < kBurst; i += 64) prefetch(values + kAhead + i);
        const float keep = weigh_row<F>(p, probabilities, 0, from, count, sofar);
        const int64_t wide = padded(count, value_rows);
        const char* next = left > block ? p.keys + (from + block) * p.head_dim * size : p.next;
        mix<F>(p, probabilities, 1, from, wide, &keep, from + wide, next, sofar);
    }
    if (p.state) {
        p.state[0] = sofar.most[0];
        p.state[1] = sofar.total[0];
    }
    float* acc = sofar.acc[0];
    const Vec inverse = set1(1.0f / sofar.total[0]);
    for (int64_t i = 0; i < width; i += kLanes) store(acc + i, load(acc + i) * inverse);
    __builtin_memcpy(p.out, acc, size_t(p.head_dim) * sizeof(float));
}

void attention_decode(const AttentionDecodeParams& p) {
    in_format(p.format,
              [&](auto weights) { attention_decode_in<Split<decltype(weights), 1>>(p, format_bytes(p.format)); });
}

}  // namespace
}  // namespace igpt::cpu
