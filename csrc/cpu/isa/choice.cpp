// Chooses the instruction set once, by what the processor says: cpuid; on AArch64 what the operating system says of it.
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "../ops.h"

namespace igpt::cpu {
namespace {

#ifdef IGPT_X86
// Whether the processor has VNNI's products in registers of 256 bits without AVX-512; not every compiler's own question
// knows these.
bool have_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

// Whether the processor multiplies tiles of bf16 and int8, the operating system saves them, and the kernel lets this
// process use them: tiles are a state that has to be asked for, once in a process.
bool have_amx() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned a, b, c, d;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, osxsave = 1u << 27, states = 3u << 17;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile | int8)) != (bf16 | tile | int8)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr int ask_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (low & states) == states && syscall(SYS_arch_prctl, ask_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

#ifdef IGPT_AARCH64
// BF16 with products of two rows by two columns, of bf16 and of bytes: an extension of its own (I8MM), but Armv8.6 asks
// for both, and a processor with one alone runs the level below.
struct Features {
    bool dotprod, bf16;
};

#if defined(__linux__)
Features features() {
    constexpr unsigned long dotprod = 1ul << 20, bf16 = 3ul << 13;  // HWCAP_ASIMDDP; HWCAP2_I8MM, HWCAP2_BF16
    return {(getauxval(AT_HWCAP) & dotprod) != 0, (getauxval(AT_HWCAP2) & bf16) == bf16};
}
#elif defined(__APPLE__)
bool have(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
Features features() {
    return {have("hw.optional.arm.FEAT_DotProd"),
            have("hw.optional.arm.FEAT_BF16") && have("hw.optional.arm.FEAT_I8MM")};
}
#else
Features features() { return {}; }
#endif
#endif

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
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    out[n++] = {&avx2_ops, avx2};
    out[n++] = {&avx_vnni_ops, avx2 && have_avx_vnni()};
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    out[n++] = {&avx512_ops, avx512};
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    out[n++] = {&avx512_vnni_ops, vnni};
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    out[n++] = {&avx512_bf16_ops, bf16};
    static const bool amx = have_amx();
    out[n++] = {&amx_ops, bf16 && amx};
#endif
#ifdef IGPT_AARCH64
    const Features found = features();
    out[n++] = {&neon_ops, true};  // every AArch64 processor has it
    out[n++] = {&neon_dotprod_ops, found.dotprod};
    out[n++] = {&neon_bf16_ops, found.dotprod && found.bf16};
#endif
    return n;
}

bool by_amd() {
#ifdef IGPT_X86
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
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
