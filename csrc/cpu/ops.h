// The CPU ops. One table of function pointers per instruction set; `ops()` is the one that was chosen.
// No torch, no pybind11: addresses and sizes only. Layouts stand beside each Params.
#pragma once

#include <cstdint>

namespace igpt::cpu {

// Nearest colour cluster: out[i] = argmin_k sum_c (x[i][c] - clusters[k][c])^2, the lowest k on ties.
//   uint8 input stands for v / 127.5 - 1 and is evaluated in float64: exact but for true ties.
//   float input is evaluated in float32, in the order (dr^2 + dg^2) + db^2, as in reference.py.
struct QuantizeParams {
    const void* x;          // (n, 3) uint8 or float32
    const float* clusters;  // (k, 3)
    int64_t* out;           // (n,)
    int64_t n;
    int32_t k;
    int32_t threads;
};

struct Ops {
    const char* isa;
    void (*quantize_u8)(const QuantizeParams&);
    void (*quantize_f32)(const QuantizeParams&);
};

// The tables that were compiled in. `supported` asks the processor.
struct Isa {
    const Ops* table;
    bool supported;
};

extern const Ops generic_ops;
#ifdef IGPT_X86
extern const Ops avx2_ops;
extern const Ops avx512_ops;
#endif

// All compiled tables, slowest first; returns how many were written into `out` (room for 8).
int isas(Isa* out);

// The table in use: the fastest supported one, or what `select_isa` chose.
const Ops& ops();

// Chooses a table by name. False when it is unknown or this processor lacks it.
bool select_isa(const char* name);

}  // namespace igpt::cpu
