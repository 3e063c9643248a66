// The amx table: the shared bodies, compiled with the flags CMakeLists.txt gives this file.
#include "attend.h"
#include "quantize.h"

namespace igpt::cpu {
const Ops amx_ops{"amx", quantize_u8, quantize_f32, decoder_kernels};
}
