// The CPU ops. One table of function pointers per instruction set; `ops()` is the one that was chosen.
// No torch, no pybind11: addresses and sizes only. Layouts stand beside each Params.
//
// An op is two parts. Its driver (quantize.cpp) is compiled once, for the plainest processor: it allocates, opens
// the one region of threads and may throw. Its body (bodies/quantize.h) is compiled by every isa/*.cpp with that file's
// flags and works on one thread's share with memory it is given. A body uses nothing of the standard library: the
// linker keeps one copy of an inline function or template for the whole module, and it could keep the AVX-512 one.
#pragma once

#include "attention_kernels.h"
#include "decoder_kernels.h"
#include "elementwise_kernels.h"
#include "forward_kernels.h"
#include "matmul_kernels.h"
#include "quantize_kernels.h"

namespace igpt::cpu {

struct Ops {
    const char* isa;
    // The pixels begin .. end - 1, or the first of them that `cells.stops` has left out; returns the end of those done.
    int64_t (*quantize_u8)(const QuantizeParams&, QuantizeCells&, int64_t begin, int64_t end);
    int64_t (*quantize_f32)(const QuantizeParams&, QuantizeCells&, int64_t begin, int64_t end);
    DecoderKernels decoder;
    CausalAttentionKernels causal_attention[2];  // by Format: fp32, bf16
    ElementwiseKernels elementwise;
    ForwardKernels forward[3];  // by the format of the weights: fp32, bf16, int8
    uint64_t (*checksum)(const char* data, int64_t bytes);
    MatmulKernels matmul;
    bool bf16_products;  // whether the processor multiplies bf16: where not, products of such numbers are in fp32
};

// The tables that were compiled in. `supported` asks the processor and the operating system.
struct Isa {
    const Ops* table;
    bool supported;
};

extern const Ops generic_ops;
#ifdef IGPT_X86
extern const Ops avx2_ops;
extern const Ops avx_vnni_ops;
extern const Ops avx512_ops;
extern const Ops avx512_vnni_ops;
extern const Ops avx512_bf16_ops;
extern const Ops amx_ops;
#endif
#ifdef IGPT_AARCH64
extern const Ops neon_ops;
extern const Ops neon_dotprod_ops;
extern const Ops neon_bf16_ops;
#endif

// All compiled tables, slowest first; returns how many were written into `out` (room for 8).
int isas(Isa* out);

// The table in use: the fastest supported one, or what `select_isa` chose.
const Ops& ops();

// Whether the processor is one of AMD's, for which Intel's libraries have other code than for theirs.
bool by_amd();

// Chooses a table by name. False when it is unknown or this processor lacks it.
bool select_isa(const char* name);

// `wanted`, or the processors that this process may use where those are fewer, or fewer while others want them too, or
// 1 in a forked child: a region's other threads do not survive a fork, and it would wait for them forever.
int usable_threads(int wanted);

}  // namespace igpt::cpu
