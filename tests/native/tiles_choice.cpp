// In place of csrc/cpu/isa/choice.cpp, for tests: the plain table, that of AVX-VNNI, which tests/native/avx_vnni.h
// runs, and that of tiles, which tests/native/tiles.h runs.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "cpu/ops.h"

namespace igpt::cpu {
namespace {

std::atomic<const Ops*> chosen{&amx_ops};

}  // namespace

int isas(Isa* out) {
    out[0] = {&generic_ops, true};
    out[1] = {&avx_vnni_ops, true};
    out[2] = {&amx_ops, true};
    return 3;
}

const Ops& ops() { return *chosen.load(std::memory_order_relaxed); }

bool select_isa(const char* name) {
    for (const Ops* table : {&generic_ops, &avx_vnni_ops, &amx_ops})
        if (std::strcmp(table->isa, name) == 0) {
            chosen.store(table, std::memory_order_relaxed);
            return true;
        }
    return false;
}

}  // namespace igpt::cpu
