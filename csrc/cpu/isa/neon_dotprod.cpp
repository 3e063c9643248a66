// The neon_dotprod table: the shared bodies, compiled with the flags CMakeLists.txt gives this file.
#include "../bodies/table.h"

namespace igpt::cpu {
const Ops neon_dotprod_ops = make_ops("neon_dotprod");
}
