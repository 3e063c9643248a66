// Chooses the instruction set once, by cpuid.
#include <atomic>
#include <cstring>

#include "ops.h"

namespace igpt::cpu {
namespace {

const Ops* fastest() {
    Isa all[8];
    const Ops* best = &generic_ops;
    for (int i = 0, n = isas(all); i < n; ++i)
        if (all[i].supported) best = all[i].table;
    return best;
}

std::atomic<const Ops*>& chosen() {
    static std::atomic<const Ops*> table{fastest()};
    return table;
}

}  // namespace

int isas(Isa* out) {
    int n = 0;
    out[n++] = {&generic_ops, true};
#ifdef IGPT_X86
    __builtin_cpu_init();  // its answers for AVX include the state that the operating system saves (xgetbv)
    out[n++] = {&avx2_ops, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    out[n++] = {&avx512_ops, avx512};
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    out[n++] = {&avx512_vnni_ops, vnni};
    out[n++] = {&avx512_bf16_ops, vnni && __builtin_cpu_supports("avx512bf16")};
#endif
    return n;
}

const Ops& ops() { return *chosen().load(std::memory_order_relaxed); }

bool select_isa(const char* name) {
    Isa all[8];
    for (int i = 0, n = isas(all); i < n; ++i)
        if (std::strcmp(all[i].table->isa, name) == 0 && all[i].supported) {
            chosen().store(all[i].table, std::memory_order_relaxed);
            return true;
        }
    return false;
}

}  // namespace igpt::cpu
