// The formats of numbers, the activations, and sizes rounded up.
#pragma once

#include <cstdint>

namespace igpt::cpu {

enum class Format : int32_t { fp32 = 0, bf16 = 1, int8 = 2 };

constexpr int64_t format_bytes(Format format) { return format == Format::fp32 ? 4 : format == Format::bf16 ? 2 : 1; }

enum class Activation : int32_t { none = -1, quick_gelu = 0, gelu_tanh = 1, gelu_erf = 2 };

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace igpt::cpu
