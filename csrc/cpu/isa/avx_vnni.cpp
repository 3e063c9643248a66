// The avx_vnni table: the shared bodies, compiled with the flags CMakeLists.txt gives this file.
#include "../bodies/table.h"

namespace igpt::cpu {
const Ops avx_vnni_ops = make_ops("avx_vnni");
}
