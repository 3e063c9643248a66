// The avx512 table: the shared bodies, compiled with the flags CMakeLists.txt gives this file.
#include "../bodies/table.h"

namespace igpt::cpu {
const Ops avx512_ops = make_ops("avx512");
}
