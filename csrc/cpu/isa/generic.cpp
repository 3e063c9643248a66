// The generic table: the shared bodies, compiled with the flags CMakeLists.txt gives this file.
#include "../bodies/table.h"

namespace igpt::cpu {
const Ops generic_ops = make_ops("generic");
}
