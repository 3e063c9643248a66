// temporary
#pragma once
#include "rows.h"
namespace igpt::cpu {
namespace {
inline float one(const float* p) { return *p; }
inline float one(const uint16_t* p) {
    const uint32_t u = uint32_t(*p) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}
inline void set(float* p, float f) { *p = f; }
inline void set(uint16_t* p, float f) { *p = to_bf16(f); }
template <class E>
void pack_heads_plain(const HeadsParams& p) {
    const int64_t d = p.head_dim, wide = padded(d, 32);
    for (int64_t h = 0; h < p.heads; ++h) {
        p.flawed[h * p.flawed_stride] = 0;
        for (int64_t t = 0; t < kRows; ++t)
            for (int64_t i = 0; i < d; ++i) {
                const E* from = static_cast<const E*>(p.qkv) + t * p.ld + h * 3 * d + i;
                static_cast<E*>(p.q)[h * p.head_stride + t * wide + i] = from[0];
                static_cast<E*>(p.k)[h * p.head_stride + t * wide + i] = from[d];
                static_cast<E*>(p.v)[h * p.head_stride + t * wide + i] = from[2 * d];
                if (p.keys && t < p.seen)
                    for (int64_t j = 0; j < 2; ++j) {
                        void* to = j ? p.values : p.keys;
                        const int64_t at = h * p.cache_stride + t * d + i;
                        const float x = one(from + (1 + j) * d);
                        if (p.cache == Format::fp32)
                            set(static_cast<float*>(to) + at, x);
                        else
                            set(static_cast<uint16_t*>(to) + at, x);
                    }
            }
    }
}
template <class E>
void causal_attention_plain(const AttentionBlocksParams& p) {
    const int64_t d = p.head_dim, wide = padded(d, 32);
    const E *q = static_cast<const E*>(p.q), *k = static_cast<const E*>(p.k), *v = static_cast<const E*>(p.v);

    static thread_local double s[1 << 16];
    for (int64_t t = p.begin * kRows; t < p.end * kRows; ++t) {
        double top = -1e300;
        for (int64_t j = 0; j <= t; ++j) {
            double sum = 0;
            for (int64_t i = 0; i < d; ++i) sum += double(one(q + t * wide + i)) * one(k + j * wide + i);
            s[j] = sum * p.scale;
            top = s[j] > top ? s[j] : top;
        }
        double sum = 0;
        for (int64_t j = 0; j <= t; ++j) {
            s[j] = __builtin_exp(s[j] - top);
            sum += s[j];
        }
        E* line = tiles_at<E>(p.tiles, p.width, t);
        for (int64_t i = 0; i < d; ++i) {
            double y = 0;
            for (int64_t j = 0; j <= t; ++j) y += s[j] * one(v + j * wide + i);
            set(line + along_line<E>(p.column + i), float(y / sum));
        }
        if (p.column + d == p.columns)
            for (int64_t i = p.columns; i < p.width; ++i) set(line + along_line<E>(i), 0.0f);
    }
}
}  // namespace
}  // namespace igpt::cpu
