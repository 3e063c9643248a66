// The neon_bf16 table: the shared bodies, compiled with the flags CMakeLists.txt gives this file.
#include "../bodies/table.h"

namespace igpt::cpu {
const Ops neon_bf16_ops = make_ops("neon_bf16");
}
