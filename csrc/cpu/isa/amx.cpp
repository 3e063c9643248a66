// The amx table: the shared bodies and those of tiles, compiled with the flags CMakeLists.txt gives this file.
#include "../bodies/table_tiles.h"

namespace igpt::cpu {
const Ops amx_ops = make_ops_with_tiles("amx");
}
