// out = softmax(scale q K^T) V of the newest positions of several sequences that began with one primer, the body.
//
// Layouts: decoder_kernels.h. The primer's keys and values lie in memory once and are read once for all rows, kKeys
// positions at a time, by products of several rows; what came after it is each sequence's own and goes through
// `attend`. Two parts of a softmax, with the largest score m and the sum s of e^(score - m) of each, make the whole:
//   out = (w_1 out_1 + w_2 out_2) / (w_1 + w_2),  w_i = s_i e^(m_i - max(m_1, m_2))
// Bound by reading the sequences' own parts; on the primer by multiply-adds, 4 rows head_dim a position.
#pragma once

#include "attend.h"

namespace igpt::cpu {
namespace {

// Several rows of inputs of the two products, as the format takes them.
struct SplitRows {
    alignas(64) float x[shared_rows][kKeys];
    alignas(64) uint8_t high[shared_rows][kKeys];
    alignas(64) uint8_t low[shared_rows][kKeys];
    float scale[shared_rows];
};
static_assert(max_head_dim <= kKeys);

// Queries and probabilities stay fp32 next to bf16 keys and values, as in `attend`.
struct WideBf16 : Bf16 {
    template <int R, int C>
    static void run(const Piece& p) {
        widen<R, C>(p);
    }
};

// sums (rows, 2, kTile) = x W, one tile.
template <class F>
inline void several_rows(const char* weights, ptrdiff_t stride, int64_t count, const SplitRows& x, int64_t rows,
                         float* sums, int registers, const char* end, const char* next) {
    const int64_t blocks = (rows + F::max_rows - 1) / F::max_rows;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = rows * b / blocks;
        Piece piece{};
        piece.weights = weights;
        piece.stride = stride;
        piece.count = count;
        piece.x = x.x[row];
        piece.high = x.high[row];
        piece.low = x.low[row];
        piece.ld = kKeys;
        piece.sums = sums + 2 * row * kTile;
        piece.width = kTile;
        piece.first = true;
        if (blocks == 1)
            prefetch_in_front(piece, end, next);
        else
            prefetch_in_parts(piece, end, next, count / F::step, b, blocks);
        run_rows<F>(piece, rows * (b + 1) / blocks - row, registers);
    }
}

// Scores of the primer's positions from .. from + count - 1, a multiple of kLanes.
template <class F>
inline void score_rows(const AttentionParams& p, const SplitRows& q, int64_t rows, int64_t from, int64_t count,
                       int64_t size, SplitRows& scores) {
    const int64_t d = p.head_dim, tile_bytes = kTile * d * size, seen = padded(p.position + 1, kTile);
    alignas(64) float sums[shared_rows * 2 * kTile];
    for (int64_t t = from; t < from + count; t += kTile) {
        const int64_t left = (from + count - t) / kLanes;
        const int registers = int(left < 4 ? left : 4);
        several_rows<F>(p.keys + t / kTile * tile_bytes, 4 * F::bytes, d, q, rows, sums, registers,
                        p.keys + seen / kTile * tile_bytes, p.values);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < registers; ++c) {
                const int64_t at = t + c * kLanes;
                const float* sum = sums + 2 * r * kTile + c * kLanes;
                Vec v = load(sum);
                if (p.format == Format::int8) {
#if defined(__AVX512VNNI__)
                    v = whole(sum, sum + kTile, p.key_sums + at) * set1(q.scale[r]);
#endif
                    v = v * load(p.key_scale + at);
                }
                store(scores.x[r] + at - from, v);
            }
    }
}

// acc = acc * keep + probabilities V of each row, over count positions, a multiple of 4.
template <class F>
inline void mix_rows(const AttentionParams& p, const SplitRows& probabilities, int64_t rows, int64_t from,
                     int64_t count, const float* keep, float (*acc)[max_head_dim + kLanes]) {
    const int64_t width = padded(p.head_dim, kLanes), stride = width / kLanes * F::bytes;
    const char *base = p.values + from / F::step * stride,
               *end = p.values + padded(p.position + 1, value_rows) / F::step * stride;
    alignas(64) float sums[shared_rows * 2 * kTile];
    for (int64_t n = 0; n < width; n += kTile) {
        const int registers = int((width - n < kTile ? width - n : kTile) / kLanes);
        several_rows<F>(base + n / kLanes * F::bytes, stride, count, probabilities, rows, sums, registers, end, p.next);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < registers; ++c) {
                const float* sum = sums + 2 * r * kTile + c * kLanes;
                Vec v = load(sum);
#if defined(__AVX512VNNI__)
                if (p.format == Format::int8) v = whole(sum, sum + kTile, nullptr) * set1(probabilities.scale[r]);
#endif
                float* at = acc[r] + n + c * kLanes;
                store(at, from == 0 ? v : fma(load(at), set1(keep[r]), v));
            }
    }
}

// The largest score, the sum of the weights and the weighted values so far, of each row.
struct Running {
    float most[shared_rows], total[shared_rows];
    alignas(64) float acc[shared_rows][max_head_dim + kLanes];
};

// From the scores of positions from .. from + count - 1 to their probabilities; returns in `keep` what to multiply
// the past with.
inline void weigh_row(const AttentionParams& p, SplitRows& scores, int64_t r, int64_t from, int64_t count,
                      Running& sofar, float& keep) {
    float* x = scores.x[r];
    const int64_t rounded = padded(count, kLanes);
    for (int64_t i = count; i < rounded; ++i) x[i] = -__builtin_inff();
    const float here = largest(x, rounded), before = sofar.most[r];
    const float most = from == 0 || here > before || here != here ? here : before;
    keep = from == 0 ? 0.0f : __builtin_expf(before - most);
    sofar.most[r] = most;
    sofar.total[r] = (from == 0 ? 0.0f : sofar.total[r] * keep) + weigh(x, count, most);
    if (p.format != Format::int8) return;
    for (int64_t i = 0; i < count; ++i) x[i] *= p.value_scale[from + i];
#if defined(__AVX512VNNI__)
    scores.scale[r] = split_row<false>(x, padded(count, value_rows), scores.high[r], scores.low[r]);
#endif
}

template <class F>
void attend_primer(const AttentionParams& p, const AttentionParams* rows, int64_t count, int64_t size, Running& sofar) {
    const int64_t keys = p.position + 1;
    SplitRows q, probabilities;
    float keep[shared_rows];
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < p.head_dim; ++i) q.x[r][i] = rows[r].q[i] * p.scale;
#if defined(__AVX512VNNI__)
        if (p.format == Format::int8) q.scale[r] = split_row<true>(q.x[r], p.head_dim, q.high[r], q.low[r]);
#endif
    }
    for (int64_t from = 0; from < keys; from += kKeys) {
        const int64_t here = keys - from < kKeys ? keys - from : kKeys;
        score_rows<F>(p, q, count, from, padded(here, kLanes), size, probabilities);
        for (int64_t r = 0; r < count; ++r) weigh_row(p, probabilities, r, from, here, sofar, keep[r]);
        mix_rows<F>(p, probabilities, count, from, padded(here, value_rows), keep, sofar.acc);
    }
}

void attend_shared(const AttentionParams& primer, const AttentionParams* rows, int64_t count) {
    Running sofar;
    switch (primer.format) {
        case Format::fp32:
            attend_primer<Fp32>(primer, rows, count, 4, sofar);
            break;
        case Format::bf16:
            attend_primer<WideBf16>(primer, rows, count, 2, sofar);
            break;
        case Format::int8:
            attend_primer<Int8>(primer, rows, count, 1, sofar);
            break;
    }
    for (int64_t r = 0; r < count; ++r) {
        float own[2];
        AttentionParams row = rows[r];
        row.state = own;
        attend(row);
        const float m = sofar.most[r] > own[0] ? sofar.most[r] : own[0];
        const float before = __builtin_expf(sofar.most[r] - m), after = own[1] * __builtin_expf(own[0] - m);
        const float inverse = 1.0f / (sofar.total[r] * before + after);
        for (int64_t i = 0; i < row.head_dim; ++i)
            row.out[i] = row.out[i] * (after * inverse) + sofar.acc[r][i] * (before * inverse);
    }
}

}  // namespace
}  // namespace igpt::cpu
