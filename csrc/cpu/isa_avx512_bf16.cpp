// The avx512_bf16 table: the shared bodies, compiled with the flags CMakeLists.txt gives this file.
#include "attend.h"
#include "quantize.h"

namespace igpt::cpu {
const Ops avx512_bf16_ops{"avx512_bf16", quantize_u8, quantize_f32, decoder_kernels};
}
