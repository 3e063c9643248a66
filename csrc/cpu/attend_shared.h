// out = softmax(scale q K^T) V of the newest positions of several sequences that began with one primer, the body.
//
// Layouts: decoder_kernels.h. The primer's keys and values lie in memory once and are read once for all rows, kKeys
// positions at a time, by products of several rows; what came after it is each sequence's own and goes through
// `attend`. Two parts of a softmax, with the largest score m and the sum s of e^(score - m) of each, make the whole:
//   out = (w_1 out_1 + w_2 out_2) / (w_1 + w_2),  w_i = s_i e^(m_i - max(m_1, m_2))
// Every row is computed in the same order whatever the others are, and however many. Bound by reading the sequences'
// own parts; on the primer by multiply-adds, 4 rows head_dim a position, and with tiles (AMX) by reading it.
#pragma once

#include "attend.h"
#include "tiles.h"

namespace igpt::cpu {
namespace {

// Several rows of inputs of the two products, as the format takes them.
struct SplitRows {
    alignas(64) float x[shared_rows][kKeys];
    alignas(64) uint8_t high[shared_rows][kKeys];
    alignas(64) uint8_t low[shared_rows][kKeys];
    float scale[shared_rows];
#if defined(__AMX_TILE__)
    bool tiled = false;
    // Rows 2 r and 2 r + 1: row r in two parts, 64 bytes of each; those beyond the rows that there are mean nothing.
    alignas(64) char tiles[kKeys / 32][16][64];
#endif
};
static_assert(max_head_dim <= kKeys);

// Queries and probabilities stay fp32 next to bf16 keys and values, as in `attend`.
struct WideBf16 : Bf16 {
    template <int R, int C>
    static void run(const Piece& p) {
        widen<R, C>(p);
    }
};

#if defined(__AMX_TILE__)

// n numbers of each row in two parts: bytes as they are, fp32 as the sum of two bf16, which have 16 bits together.
// False where n does not fill the tiles of the format.
template <class F>
inline bool fill_tiles(SplitRows& x, int64_t rows, int64_t n) {
    if (F::step == 1 || n % (16 * F::step) != 0) return false;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < n; i += 16 * F::step) {
            auto* tile = x.tiles[i / (16 * F::step)];
            if constexpr (F::step == 4) {
                __builtin_memcpy(tile[2 * r], x.high[r] + i, 64);
                __builtin_memcpy(tile[2 * r + 1], x.low[r] + i, 64);
            } else {
                for (int half = 0; half < 2; ++half) {
                    const Vec v = load(x.x[r] + i + half * kLanes);
                    const auto first = (__m256i)_mm512_cvtneps_pbh(v);
                    const Vec rest = v - floats(shift_left<16>(_mm512_cvtepu16_epi32(first)));
                    const auto second = (__m256i)_mm512_cvtneps_pbh(rest);
                    __builtin_memcpy(tile[2 * r] + 32 * half, &first, 32);
                    __builtin_memcpy(tile[2 * r + 1] + 32 * half, &second, 32);
                }
            }
        }
    return true;
}

// sums (rows, 2, kTile): of the two parts in int8, of both in the first half in bf16. Always four registers of
// outputs: the memory behind fewer is there, and what comes of it is not used.
template <class F>
inline void tile_rows(const char* weights, ptrdiff_t stride, int64_t count, const SplitRows& x, int64_t rows,
                      float* sums, int registers, const char* end, const char* next) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < count / (16 * F::step); ++k) {
        const char* w = weights + k * 16 * stride;
        const char* far = w + kAhead < end ? w + kAhead : next + (w + kAhead - end);
        for (int i = 0; i < 16; ++i)
            for (int c = 0; c < registers; ++c) prefetch(far + i * stride + c * 64);
        _tile_loadd(4, x.tiles[k], 64);
        _tile_loadd(5, w, stride);
        F::step == 4 ? _tile_dpbusd(0, 4, 5) : _tile_dpbf16ps(0, 4, 5);
        if (registers > 1) {
            _tile_loadd(6, w + 64, stride);
            F::step == 4 ? _tile_dpbusd(1, 4, 6) : _tile_dpbf16ps(1, 4, 6);
        }
        if (registers > 2) {
            _tile_loadd(5, w + 128, stride);
            F::step == 4 ? _tile_dpbusd(2, 4, 5) : _tile_dpbf16ps(2, 4, 5);
        }
        if (registers > 3) {
            _tile_loadd(6, w + 192, stride);
            F::step == 4 ? _tile_dpbusd(3, 4, 6) : _tile_dpbf16ps(3, 4, 6);
        }
    }
    _tile_stored(0, sums, 4 * kTile);
    _tile_stored(1, sums + kLanes, 4 * kTile);
    _tile_stored(2, sums + 2 * kLanes, 4 * kTile);
    _tile_stored(3, sums + 3 * kLanes, 4 * kTile);
    if (F::step == 4) return;
    for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < registers; ++c) {
            float* sum = sums + 2 * r * kTile + c * kLanes;
            store(sum, load(sum) + load(sum + kTile));
        }
}

#endif

// sums (rows, 2, kTile) = x W, one tile. A row alone is computed twice: a product of one row adds in another order.
template <class F>
inline void several_rows(const char* weights, ptrdiff_t stride, int64_t count, const SplitRows& x, int64_t rows,
                         float* sums, int registers, const char* end, const char* next) {
#if defined(__AMX_TILE__)
    if (x.tiled) return tile_rows<F>(weights, stride, count, x, rows, sums, registers, end, next);
#endif
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
        piece.ld = here == 1 ? 0 : kKeys;
        piece.sums = sums + 2 * row * kTile;
        piece.width = kTile;
        piece.first = true;
        if (blocks == 1)
            prefetch_in_front(piece, end, next);
        else
            prefetch_in_parts(piece, end, next, count / F::step, b, blocks);
        run_rows<F>(piece, here == 1 ? 2 : here, registers);
    }
}

constexpr int64_t kSums = (shared_rows + 1) * 2 * kTile;  // of a tile, with a row that was computed twice

// Scores of the primer's positions from .. from + count - 1, a multiple of kLanes.
template <class F>
inline void score_rows(const AttentionParams& p, const SplitRows& q, int64_t rows, int64_t from, int64_t count,
                       int64_t size, SplitRows& scores) {
    const int64_t d = p.head_dim, tile_bytes = kTile * d * size, seen = padded(p.position + 1, kTile);
    alignas(64) float sums[kSums];
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

// The largest score, the sum of the weights and the weighted values so far, of each row.
struct Running {
    float most[shared_rows], total[shared_rows];
    alignas(64) float acc[shared_rows][max_head_dim + kLanes];
};

// acc = acc * keep + probabilities V of each row, over count positions, a multiple of value_rows.
template <class F>
inline void mix_rows(const AttentionParams& p, const SplitRows& probabilities, int64_t rows, int64_t from,
                     int64_t count, const float* keep, Running& sofar) {
    const int64_t width = padded(p.head_dim, kLanes), stride = width / kLanes * F::bytes;
    const char *base = p.values + from / F::step * stride,
               *end = p.values + padded(p.position + 1, value_rows) / F::step * stride;
    alignas(64) float sums[kSums];
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
                float* at = sofar.acc[r] + n + c * kLanes;
                store(at, from == 0 ? v : fma(load(at), set1(keep[r]), v));
            }
    }
}

// The scores of `count` positions become probabilities, and zeros beyond them to `end`; returns what to multiply the
// past with.
inline float weigh_row(const AttentionParams& p, SplitRows& scores, int64_t r, int64_t from, int64_t count, int64_t end,
                       Running& sofar) {
    float* x = scores.x[r];
    const int64_t rounded = padded(count, kLanes);
    for (int64_t i = count; i < rounded; ++i) x[i] = -__builtin_inff();
    const float here = largest(x, rounded), before = sofar.most[r];
    const float most = from == 0 || here > before || here != here ? here : before;
    const float keep = from == 0 ? 0.0f : __builtin_expf(before - most);
    sofar.most[r] = most;
    sofar.total[r] = (from == 0 ? 0.0f : sofar.total[r] * keep) + weigh(x, count, most);
    for (int64_t i = rounded; i < end; ++i) x[i] = 0.0f;
    if (p.format != Format::int8) return keep;
    for (int64_t i = 0; i < count; ++i) x[i] *= p.value_scale[from + i];
#if defined(__AVX512VNNI__)
    scores.scale[r] = split_row<false>(x, end, scores.high[r], scores.low[r]);
#endif
    return keep;
}

template <class F>
void attend_primer(const AttentionParams& p, const AttentionParams* rows, int64_t count, int64_t size, Running& sofar) {
    const int64_t keys = p.position + 1;
    int64_t multiple = value_rows;
    SplitRows q, probabilities;
    float keep[shared_rows];
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < p.head_dim; ++i) q.x[r][i] = rows[r].q[i] * p.scale;
#if defined(__AVX512VNNI__)
        if (p.format == Format::int8) q.scale[r] = split_row<true>(q.x[r], p.head_dim, q.high[r], q.low[r]);
#endif
    }
#if defined(__AMX_TILE__)
    const Tiles tiles;
    q.tiled = probabilities.tiled = fill_tiles<F>(q, count, p.head_dim);
    if (q.tiled) multiple = 16 * F::step;
#endif
    for (int64_t from = 0; from < keys; from += kKeys) {
        const int64_t here = keys - from < kKeys ? keys - from : kKeys, end = padded(here, multiple);
        score_rows<F>(p, q, count, from, padded(here, kLanes), size, probabilities);
        for (int64_t r = 0; r < count; ++r) keep[r] = weigh_row(p, probabilities, r, from, here, end, sofar);
#if defined(__AMX_TILE__)
        if (probabilities.tiled) fill_tiles<F>(probabilities, count, end);
#endif
        mix_rows<F>(p, probabilities, count, from, end, keep, sofar);
    }
}

void attend_shared(const AttentionParams& primer, const AttentionParams* sequences, int64_t count) {
    Running sofar;
    switch (primer.format) {
        case Format::fp32:
            attend_primer<Fp32>(primer, sequences, count, 4, sofar);
            break;
        case Format::bf16:
            attend_primer<WideBf16>(primer, sequences, count, 2, sofar);
            break;
        case Format::int8:
            attend_primer<Int8>(primer, sequences, count, 1, sofar);
            break;
    }
    for (int64_t r = 0; r < count; ++r) {
        float own[2];
        AttentionParams row = sequences[r];
        row.state = own;
        attend(row);
        const float most = sofar.most[r] > own[0] ? sofar.most[r] : own[0];
        const float before = __builtin_expf(sofar.most[r] - most), after = own[1] * __builtin_expf(own[0] - most);
        const float inverse = 1.0f / (sofar.total[r] * before + after);
        for (int64_t i = 0; i < row.head_dim; ++i)
            row.out[i] = row.out[i] * (after * inverse) + sofar.acc[r][i] * (before * inverse);
    }
}

}  // namespace
}  // namespace igpt::cpu
