// Products of a few rows with packed weights, piece by piece: what x W, q K^T and p V have in common.
//
// Layouts: decoder_kernels.h. A product keeps rows x 4 registers of outputs in registers and reads the weights in the
// order of memory. At one row it is bound by that reading: a prefetch runs kAhead bytes in front, and past the end of
// the thread's share to what is read next. With more rows it is bound by multiply-adds: 2 k n rows FLOPs.
//
// bf16 becomes fp32 by a shift (the even one of a pair) or a mask (the odd one); where there is a product of bf16
// pairs, several rows are rounded to bf16 and take that. int8 weights become fp32, or, where there is a byte product
// (VNNI, SDOT), meet the inputs as two halves of 14 or 15 bits: sums are exact in 32 bits up to k = 2^16, and only the
// weights' rounding is felt. Where 16-bit integers are multiplied in pairs (AVX2 and later), the weights are
// widened to them, which as many inputs share as there are rows, and meet inputs of 15 bits and a sign.
#pragma once

#include "../decoder_kernels.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

constexpr ptrdiff_t kAhead = 8 << 10;  // bytes

// Part of a product: R rows, C registers of outputs, `count` of k.
struct Piece {
    const char* weights;
    ptrdiff_t stride;  // bytes from one group along k to the next
    int64_t count;
    const float* x;  // the first row at the piece's first k
    const uint8_t *high, *low;
    const uint16_t* half;
    int64_t ld;            // of x, high, low, half
    const char* tiles;     // of the first row's first group
    ptrdiff_t tiles_step;  // bytes from one group of 64 bytes along k to the next
    float* sums;           // (R, 2, width): fp32 sums in the first, or 32-bit integers of the high and low halves
    int64_t width;         // of `sums`
    bool first;            // whether the sums begin at zero
    // What to prefetch while group g is multiplied: far + g far_step, and `jump` further from group `jump_at` on.
    const char* far;
    ptrdiff_t far_step;
    int64_t jump_at;
    ptrdiff_t jump;
};

// A single pass over the weights prefetches kAhead in front, and beyond `end` from `next`.
inline void prefetch_in_front(Piece& p, const char* end, const char* next) {
    const ptrdiff_t left = end - kAhead - p.weights;
    p.far = p.weights + kAhead;
    p.far_step = p.stride;
    p.jump_at = left <= 0 ? 0 : (left + p.stride - 1) / p.stride;
    p.jump = next - end;
}

// Pass `pass` of `passes` over the same weights prefetches its part of what comes after them, so that reading goes on
// all the time.
inline void prefetch_in_parts(Piece& p, const char* end, const char* next, int64_t groups, int64_t pass,
                              int64_t passes) {
    const char* after = p.weights + groups * p.stride;
    p.far_step = p.stride / passes;
    p.far = (after < end ? after : next) + pass * groups * p.far_step;
    p.jump_at = groups;
    p.jump = 0;
}

// Of the registers side by side the first of a line; lines are what memory gives.
template <int Bytes>
inline void prefetch_register(const char* far, int c) {
    if (c * Bytes % 64 == 0) prefetch(far + c * Bytes);
}

// Calls group(weights, far, g) for all groups.
template <class Group>
inline void each_group(const Piece& p, int64_t groups, Group group) {
    const char *w = p.weights, *far = p.far;
    const int64_t ends[2] = {p.jump_at < groups ? p.jump_at : groups, groups};
    int64_t g = 0;
    for (int part = 0; part < 2; ++part, far += p.jump)
        for (; g < ends[part]; ++g, w += p.stride, far += p.far_step) group(w, far, g);
}

template <int R, int C>
[[gnu::always_inline]] inline void begin(const Piece& p, Vec (&acc)[R][C]) {
    each<R>([&](auto r) {
        each<C>([&](auto c) { acc[r][c] = p.first ? zero() : load(p.sums + 2 * r * p.width + c * kLanes); });
    });
}

template <int R, int C>
[[gnu::always_inline]] inline void finish(const Piece& p, const Vec (&acc)[R][C]) {
    each<R>([&](auto r) { each<C>([&](auto c) { store(p.sums + 2 * r * p.width + c * kLanes, acc[r][c]); }); });
}

// Two groups as one, so that they fill two chains.
inline Piece paired(const Piece& p) {
    Piece pairs = p;
    pairs.stride = 2 * p.stride;
    pairs.far_step = 2 * p.far_step;
    pairs.jump_at = (p.jump_at + 1) / 2;
    return pairs;
}

// A single row has two sets of sums: a chain of multiply-adds waits for itself.
template <int R, int C, class Group>
inline void two_chains(const Piece& p, int64_t groups, Group group) {
    Vec even[R][C], odd[R][C];
    begin(p, even);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) odd[r][c] = zero();
    each_group(p, groups,
               [&](const char* w, const char* far, int64_t g) { group(w, far, g, even, R == 1 ? odd : even); });
    if (R == 1)
        for (int c = 0; c < C; ++c) even[0][c] += odd[0][c];
    finish(p, even);
}

// The formats. `run` is a piece with R rows and C registers; `bytes`, of a register's weights of one group. Flat: sums
// that a call could see would be kept in memory.
struct Fp32 {
    static constexpr bool tiled = false, splits = false;
    static constexpr int step = 1, bytes = 4 * kLanes, max_rows = kMaxRows;
    // One set of sums, whatever the rows: a sequence has the same bits in every batch. The chains of the registers
    // beside each other are enough for one row, which waits for memory.
    template <int R, int C>
    [[gnu::flatten]] static void run(const Piece& p) {
        Vec acc[R][C];
        begin(p, acc);
        each_group(paired(p), p.count / 2, [&](const char* w, const char* far, int64_t g) {
            each<2>([&](auto k) {
                Vec v[C];
                each<C>([&](auto c) {
                    prefetch_register<bytes>(far + k * p.far_step, c);
                    v[c] = load(reinterpret_cast<const float*>(w + k * p.stride) + c * kLanes);
                });
                each<R>([&](auto r) {
                    const Vec x = set1(p.x[r * p.ld + 2 * g + k]);
                    each<C>([&](auto c) { acc[r][c] = fma(v[c], x, acc[r][c]); });
                });
            });
        });
        finish(p, acc);
    }
};

struct Bf16 {
    static constexpr bool tiled = false, splits = false;
    static constexpr int step = 2, bytes = 4 * kLanes, max_rows = kMaxRows;
    template <class R>
    static void split_rows(const R& rows, int64_t k) {
        if constexpr (kPairs)
            for (int64_t r = 0; r < rows.count; ++r) halve_row(rows.x + r * rows.ld, k, rows.half + r * rows.ld);
    }
    template <int R, int C>
    static void dot(const Piece& p);
    template <int R, int C>
    static void run(const Piece& p) {
        // Several rows are bound by multiply-adds, and this one does two.
        if constexpr (kPairs && R > 1)
            dot<R, C>(p);
        else
            widen<R, C>(p);
    }
    template <int R, int C>
    [[gnu::flatten]] static void widen(const Piece& p) {
        two_chains<R, C>(p, p.count / 2, [&](const char* w, const char* far, int64_t g, auto& even, auto& odd) {
            each<C>([&](auto c) { prefetch_register<bytes>(far, c); });
            each<2>([&](auto k) {
                auto& acc = k ? odd : even;
                Vec v[C];
                each<C>([&](auto c) {
                    const Ints both = load_ints(w + c * bytes);
                    v[c] = k ? bf16_odd(both) : bf16_even(both);
                });
                each<R>([&](auto r) {
                    const Vec x = set1(p.x[r * p.ld + 2 * g + k]);
                    each<C>([&](auto c) { acc[r][c] = fma(v[c], x, acc[r][c]); });
                });
            });
        });
    }
};

template <int R, int C>
void Bf16::dot(const Piece& p) {
    Vec acc[R][C];
    begin(p, acc);
    each_group(p, p.count / 2, [&](const char* w, const char* far, int64_t g) {
        for (int c = 0; c < C; ++c) {
            prefetch_register<bytes>(far, c);
            const Ints v = load_ints(w + c * bytes);
            for (int r = 0; r < R; ++r) acc[r][c] = add_pairs(acc[r][c], p.half + r * p.ld + 2 * g, v);
        }
    });
    finish(p, acc);
}

struct Int8Bytes {
    static constexpr bool tiled = false, splits = true;
    static constexpr int step = 4, bytes = 4 * kLanes, max_rows = 3;
    template <int R, int C>
    static void run(const Piece& p) {
        Ints high[R][C], low[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) {
                const float* sums = p.sums + 2 * r * p.width + c * kLanes;
                high[r][c] = p.first ? Ints{} : load_ints(sums);
                low[r][c] = p.first ? Ints{} : load_ints(sums + p.width);
            }
        each_group(p, p.count / 4, [&](const char* w, const char* far, int64_t g) {
            for (int c = 0; c < C; ++c) {
                prefetch_register<bytes>(far, c);
                const Ints v = load_ints(w + c * bytes);
                for (int r = 0; r < R; ++r) {
                    high[r][c] = add_bytes(high[r][c], p.high + r * p.ld + 4 * g, v);
                    low[r][c] = add_bytes(low[r][c], p.low + r * p.ld + 4 * g, v);
                }
            }
        });
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) {
                float* sums = p.sums + 2 * r * p.width + c * kLanes;
                store_ints(sums, high[r][c]);
                store_ints(sums + p.width, low[r][c]);
            }
    }
    // The machine's, which others do not have.
    template <bool Signed, class T>
    static float split_row(const T* x, int64_t n, uint8_t* high, uint8_t* low, int64_t step = 64) {
        return split_bytes(Flag<Signed>{}, x, n, high, low, step);
    }
    template <class T>
    static Vec whole(const T* high, const T* low, const int32_t* sums) {
        return join_bytes(high, low, sums);
    }
    template <class R>
    static void split_rows(const R& rows, int64_t k) {
        for (int64_t r = 0; r < rows.count; ++r)
            rows.scale[r] = split_row<true>(rows.x + r * rows.ld, k, rows.high + r * rows.ld, rows.low + r * rows.ld);
    }
};

struct Int8Floats {
    static constexpr bool tiled = false, splits = false;
    static constexpr int step = 1, bytes = kLanes, max_rows = kMaxRows;
    static void split_rows(const Rows&, int64_t) {}
    template <int R, int C>
    static void run(const Piece& p) {
        const Piece pairs = paired(p);
        two_chains<R, C>(pairs, p.count / 2, [&](const char* w, const char* far, int64_t g, auto& even, auto& odd) {
            for (int k = 0; k < 2; ++k) {
                prefetch(far + k * p.far_step);
                auto& acc = k ? odd : even;
                for (int c = 0; c < C; ++c) {
                    const Vec v = load_bytes(w + k * p.stride + c * bytes);
                    for (int r = 0; r < R; ++r) acc[r][c] = fma(v, set1(p.x[r * p.ld + 2 * g + k]), acc[r][c]);
                }
            }
        });
    }
};

// Sums are exact over a piece, which is short enough for 32 bits, and fp32 from one to the next.
struct Int8Words {
    static constexpr bool tiled = false, splits = true;
    static constexpr int step = 2, bytes = 2 * kLanes, max_rows = kMaxRows;
    template <int R, int C>
    [[gnu::flatten]] static void run(const Piece& p) {
        Ints acc[R][C] = {};
        each_group(p, p.count / 2, [&](const auto* w, const char* far, int64_t g) {
            Ints v[C];
            each<C>([&](auto c) {
                prefetch_register<bytes>(far, c);
                v[c] = load_words(w + c * bytes);
            });
            each<R>([&](auto r) {
                each<C>([&](auto c) { acc[r][c] = add_words(acc[r][c], p.half + r * p.ld + 2 * g, v[c]); });
            });
        });
        Vec sums[R][C];
        begin(p, sums);
        each<R>([&](auto r) { each<C>([&](auto c) { sums[r][c] += to_floats(acc[r][c]); }); });
        finish(p, sums);
    }
    // x as 16-bit integers, zeros up to a whole register; returns the scale, NaN when something in x is not finite.
    template <class T>
    static float split_row(const T* x, int64_t n, uint16_t* words) {
        Vec most = zero(), poison = zero();
        sweep<1>(n, [&](int64_t i, int, auto part) {
            const Vec v = read(x + i, part);
            most = max(most, abs(v));
            poison = fma(v, zero(), poison);
        });
        const float scale = reduce_max(most) / 32767.0f;
        // Numbers so small that their steps have no inverse are zero.
        const Vec inverse = set1(scale > 1e-37f ? 1.0f / scale : 0.0f);
        sweep<1>(n, [&](int64_t i, int, auto part) { store_words(words + i, read(x + i, part) * inverse); });
        return scale + reduce_add(poison);
    }
    template <class T>
    static Vec whole(const T* sums, const T*, const int32_t*) {
        return load(sums);
    }
    template <class R>
    static void split_rows(const R& rows, int64_t k) {
        for (int64_t r = 0; r < rows.count; ++r)
            rows.scale[r] = split_row(rows.x + r * rows.ld, k, rows.half + r * rows.ld);
    }
};

constexpr auto int8_format() {
    if constexpr (kBytes)
        return Int8Bytes{};
    else if constexpr (kWords)
        return Int8Words{};
    else
        return Int8Floats{};
}
using Int8 = decltype(int8_format());

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostSums = 24;  // of 32 registers
#else
constexpr int kMostSums = 8;  // of 16, unless two registers share a row's inputs
#endif

// A piece of any number of registers up to 4, and of those two by two where its rows leave no more.
template <class F, int R>
inline void run_columns(Piece p, int registers) {
    if constexpr (F::tiled || R * 4 <= kMostSums)
        if (registers == 4) return F::template run<R, 4>(p);
    for (; registers >= 2; registers -= 2) {
        F::template run<R, 2>(p);
        p.weights += 2 * F::bytes;
        p.far += 2 * F::bytes;
        p.sums += 2 * kLanes;
    }
    if (registers == 1) F::template run<R, 1>(p);
}

template <class F, int R = F::max_rows>
inline void run_rows(const Piece& p, int64_t rows, int registers) {
    if (rows == R) return run_columns<F, R>(p, registers);
    if constexpr (R > 1) run_rows<F, R - 1>(p, rows, registers);
}

}  // namespace
}  // namespace igpt::cpu
