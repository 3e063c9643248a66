// sums (rows x registers) (+)= x w: the one kernel of products of many rows, whatever the numbers and the machine.
//
// w is packed as decoder_kernels.h has it, [n / tile][k / step][tile][step], and is read group by group along k; a
// group is one k (fp32), two (bf16) or as many as int8 weights have. x lies in lines of 64 bytes along k: row r, line l
// at x + r row_bytes + l line_bytes. So rows are read as they lie in a matrix (line_bytes 64), and those of tiles
// (row_bytes 64, line_bytes 1024) as well.
//
// What multiplies two rows by two outputs (TwoByTwo) reads weights from a copy of their tile, in which two outputs with
// 8 bytes of k each lie side by side. Whoever calls makes it, for all of its rows.
//
// R x C sums stay in registers all along k, and each is added up in one order, that of k, whatever R and C: results do
// not depend on the rows beside them. Bound by multiply-adds: for each group R C of them, with R + C loads. Weights are
// read once for R rows: from the second cache if depth x tile numbers do not fit into the first.
#pragma once

#include "../decoder_kernels.h"
#include "simd/registers.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kLineBytes = 64;

// Rows times registers of one packed tile.
struct Block {
    const char* x;
    int64_t row_bytes, line_bytes;
    const char* w;  // the first register's
    int64_t depth;  // of k, a multiple of `step`; or up to one weights are zero and x is there
    float* sums;    // (rows, ld), of integers where the kind adds up such
    int64_t ld;
    bool first;  // the sums are written, else added to what is there
};

// The kinds: `step` of k are a group, whose inputs take `bytes` and the weights of an output `lane`, and which is
// multiplied in `parts`: so much of the weights is in registers at a time. `weights` reads a register of a part, `add`
// multiplies one with a row's inputs.
struct Floats {
    using Sum = Vec;
    static constexpr bool rounded = false;
    static constexpr int offset = 0;
    static Vec number(const float* sum, const float*) { return load(sum); }
};

struct Single : Floats {  // fp32 with fp32
    using Input = float;
    static constexpr int step = 1, bytes = 4, lane = 4, parts = 1;
    static Vec weights(const char* w, int) { return load(reinterpret_cast<const float*>(w)); }
    static Vec inputs(const char* x, int) { return set1(*reinterpret_cast<const float*>(x)); }
    static Vec add(Vec sum, Vec x, Vec w) { return fma(w, x, sum); }
};

struct Widened : Floats {  // fp32 with bf16, which becomes fp32 on the way
    using Input = float;
    static constexpr int step = 2, bytes = 8, lane = 4, parts = 2;
    static Vec weights(const char* w, int part) { return part == 0 ? bf16_even(load_ints(w)) : bf16_odd(load_ints(w)); }
    static Vec inputs(const char* x, int part) { return set1(reinterpret_cast<const float*>(x)[part]); }
    static Vec add(Vec sum, Vec x, Vec w) { return fma(w, x, sum); }
};

struct Pairs : Floats {  // bf16 with bf16, where kPairs
    using Input = uint16_t;
    static constexpr int step = 2, bytes = 4, lane = 4, parts = 1;
    static Ints weights(const char* w, int) { return load_ints(w); }
    static const uint16_t* inputs(const char* x, int) { return reinterpret_cast<const uint16_t*>(x); }
    template <class V>
    static V add(V sum, const uint16_t* x, Ints w) {
        return add_pairs(sum, x, w);
    }
};

// What bf16 weights are multiplied as.
constexpr auto kind_of_bf16() {
    if constexpr (kPairs)
        return Pairs{};
    else
        return Widened{};
}
using KindOfBf16 = decltype(kind_of_bf16());

// int8 with int8: inputs are whole numbers of -127 to 127, as wide as what they are multiplied as. Sums of integers are
// exact, and so are those of floats up to a k of 1,040.
struct Bytes {  // where kBytes
    using Input = uint8_t;
    using Sum = Ints;
    static constexpr bool rounded = true;
    static constexpr int step = 4, bytes = 4, lane = 4, parts = 1, offset = kByteOffset;
    static Ints weights(const char* w, int) { return load_ints(w); }
    static const uint8_t* inputs(const char* x, int) { return reinterpret_cast<const uint8_t*>(x); }
    template <class V>
    static V add(V sum, const uint8_t* x, V w) {
        return add_bytes(sum, x, w);
    }
    template <class V>
    static void put(uint8_t* to, V v) {
        store_bytes(to, v, offset);
    }
    template <class T>
    static Vec number(const T* sum, const T* of_offset) {
        return to_floats(load_ints(sum), load_ints(of_offset));
    }
};

struct Words {  // where kWords
    using Input = uint16_t;
    using Sum = Ints;
    static constexpr bool rounded = true;
    static constexpr int step = 2, bytes = 4, lane = 2, parts = 1, offset = 0;
    template <class T>
    static Ints weights(const T* w, int) {
        return load_words(w);
    }
    static const uint16_t* inputs(const char* x, int) { return reinterpret_cast<const uint16_t*>(x); }
    template <class V>
    static V add(V sum, const uint16_t* x, V w) {
        return add_words(sum, x, w);
    }
    template <class V>
    static void put(uint16_t* to, V v) {
        store_words(to, v);
    }
    template <class T>
    static Vec number(const T* sum, const T*) {
        return to_floats(load_ints(sum));
    }
};

struct Wholes : Single {  // as fp32, where there is neither
    static constexpr bool rounded = true;
    static constexpr int lane = 1;
    static Vec weights(const char* w, int) { return load_bytes(w); }
    static void put(float* to, Vec v) { store(to, (v + set1(12582912.0f)) - set1(12582912.0f)); }
};

// What int8 weights are multiplied as; they are packed for it.
constexpr auto kind_of_int8() {
    if constexpr (kBytes)
        return Bytes{};
    else if constexpr (kWords)
        return Words{};
    else
        return Wholes{};
}
using KindOfInt8 = decltype(kind_of_int8());

// Kind where kTwoByTwo, for an even number of rows and whole tiles: a group is 16 bytes of k.
template <class Kind>
struct TwoByTwo : Kind {
    static constexpr int step = 4 * Kind::step, bytes = 16, lane = 16;
};
template <class Kind>
constexpr int kRowsOfGroup = 1;
template <class Kind>
constexpr int kRowsOfGroup<TwoByTwo<Kind>> = 2;
template <class Kind>
constexpr auto of_many_rows() {
    if constexpr (kTwoByTwo && Kind::step > 1)
        return TwoByTwo<Kind>{};
    else
        return Kind{};
}
template <class Kind>
using OfManyRows = decltype(of_many_rows<Kind>());

// Copies a tile's weights for it: `groups` of 4 bytes an output, an even number, and zeros up to a multiple of four.
// Vector: Ints.
template <class Vector>
inline const char* turn_weights(const char* w, int64_t groups, char* to) {
    constexpr int64_t registers = kTile / kLanes, bytes = sizeof(Vector);
    for (int64_t g = 0; g < padded(groups, 4); g += 2)
        for (int64_t c = 0; c < registers; ++c) {
            const char* from = w + (g * registers + c) * bytes;
            Vector v[2] = {};
            if (g < groups) interleave_words(load_ints(from), load_ints(from + registers * bytes), v[0], v[1]);
            __builtin_memcpy(to + (g * registers + 2 * c) * bytes, v, sizeof v);
        }
    return to;
}

inline void put_sums(float* to, Vec v, bool first) { store(to, first ? v : load(to) + v); }
inline void put_sums(float* to, Ints v, bool first) { store(to, floats(first ? v : add_ints(load_ints(to), v))); }

// A group of TwoByTwo. Of two rows, acc[even][c] has the first two outputs of register c, and acc[odd][c] the others.
template <class Kind, int R, int C, class Vector = Ints>
[[gnu::always_inline]] inline void add_two_by_two(const char* x, int64_t row_bytes, const char* w,
                                                  typename Kind::Sum (&acc)[R][C]) {
    static_assert(R % 2 == 0 && C * kLanes == kTile);
    Vector a[2][R / 2];
    each<R / 2>([&](auto r) {
        const char* row = x + 2 * r * row_bytes;
        pair_halves(load_ints(row), load_ints(row + row_bytes), a[0][r], a[1][r]);
    });
    each<2>([&](auto half) {
        each<2 * C>([&](auto c) {
            const Vector v = load_ints(w + (half * 2 * C + c) * sizeof v);
            each<R / 2>([&](auto r) {
                auto& sum = acc[2 * r + c % 2][c / 2];
                sum = multiply_two(sum, a[half][r], v);
            });
        });
    });
}

template <class Kind, int R, int C>
[[gnu::always_inline]] inline void add_group(const char* x, int64_t row_bytes, const char* w,
                                             typename Kind::Sum (&acc)[R][C]) {
    if constexpr (kRowsOfGroup<Kind> == 2) return add_two_by_two<Kind>(x, row_bytes, w, acc);
    each<Kind::parts>([&](auto part) {
        decltype(Kind::weights(w, 0)) v[C];
        each<C>([&](auto c) { v[c] = Kind::weights(w + Kind::lane * c * kLanes, part); });
        each<R>([&](auto r) {
            const auto a = Kind::inputs(x + r * row_bytes, part);
            each<C>([&](auto c) { acc[r][c] = Kind::add(acc[r][c], a, v[c]); });
        });
    });
}

// Flat: sums that a call could see would be kept in memory.
template <class Kind, int R, int C>
[[gnu::flatten]] void run_block(const Block& p) {
    constexpr int64_t groups = kLineBytes / Kind::bytes, unrolled = 2, group = Kind::lane * kTile;
    typename Kind::Sum acc[R][C];
    each<R>([&](auto r) { each<C>([&](auto c) { acc[r][c] = typename Kind::Sum{}; }); });
    const char *x = p.x, *w = p.w;
    int64_t left = padded(p.depth, Kind::step) / Kind::step;
    for (; left >= groups; left -= groups, x += p.line_bytes)
        for (int64_t g = 0; g < groups; g += unrolled, w += unrolled * group) {
            add_group<Kind>(x + g * Kind::bytes, p.row_bytes, w, acc);
            add_group<Kind>(x + (g + 1) * Kind::bytes, p.row_bytes, w + group, acc);
        }
    for (; left > 0; --left, x += Kind::bytes, w += group) add_group<Kind>(x, p.row_bytes, w, acc);
    if constexpr (kRowsOfGroup<Kind> == 2)
        each<R / 2>([&](auto r) {
            each<C>([&](auto c) {
                auto &even = acc[2 * r][c], &odd = acc[2 * r + 1][c];
                pair_halves(even, odd, even, odd);
            });
        });
    const bool first = p.first;
    each<R>([&](auto r) {
        float* sums = p.sums + r * p.ld;
        each<C>([&](auto c) { put_sums(sums + c * kLanes, acc[r][c], first); });
    });
}

// Some rows, in blocks as even as can be.
template <class Kind, int Rows, int C>
inline void run_rows(const Block& p) {
    constexpr int blocks = (Rows + kBlockRows - 1) / kBlockRows;
    each<blocks>([&](auto b) {
        constexpr int first = Rows * b / blocks, end = Rows * (b + 1) / blocks;
        Block own = p;
        own.x += first * p.row_bytes;
        own.sums += first * p.ld;
        run_block<Kind, end - first, C>(own);
    });
}

// Of a tile's registers, of which there are whole 32 outputs or all: all rows with some, and then with the next.
template <class Kind, int Rows>
void run_blocks(Block p, int64_t registers) {
    const auto with = [&](auto c) {
        run_rows<Kind, Rows, c>(p);
        p.w += Kind::lane * c * kLanes;
        p.sums += c * kLanes;
        registers -= c;
    };
    constexpr int rest = 32 / kLanes % kBlockRegisters;
    while (registers >= kBlockRegisters) with(Number<kBlockRegisters>());
    if constexpr (rest != 0)
        if (registers > 0) with(Number<rest>());
}

}  // namespace
}  // namespace igpt::cpu
