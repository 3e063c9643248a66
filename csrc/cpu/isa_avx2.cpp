// The avx2 table: the shared bodies, compiled with the flags CMakeLists.txt gives this file.
#include "attend.h"
#include "quantize.h"

namespace igpt::cpu {
const Ops avx2_ops{"avx2", quantize_u8, quantize_f32, decoder_kernels};
}
