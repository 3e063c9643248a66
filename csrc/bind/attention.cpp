// Causal attention on the CPU for Python: addresses, strides and sizes by name. No maths, no torch.
// Whoever calls it has checked every argument (igpt_fast/ops/causal_attention.py).
#include "bind.h"
#include "cpu/ops.h"
#include "params.h"

namespace {

namespace cpu = igpt::cpu;
using igpt::bind::Cpu, igpt::bind::members, igpt::bind::members_of;

struct Forward : Cpu<cpu::causal_attention_fwd> {
    static constexpr auto fields =
        members<P, &P::q, &P::k, &P::v, &P::out, &P::lse, &P::starts, &P::key_mask, &P::key_mask_stride, &P::batch,
                &P::heads, &P::t_q, &P::t_k, &P::head_dim, &P::scale, &P::threads>;
};

struct Backward : Cpu<cpu::causal_attention_bwd> {
    using Of = cpu::CausalAttentionParams;
    static constexpr auto fields = members<P, &P::dout, &P::dq, &P::dk, &P::dv> +
                                   members_of<P, &P::of, &Of::q, &Of::k, &Of::v, &Of::out, &Of::lse, &Of::starts,
                                              &Of::key_mask, &Of::key_mask_stride, &Of::batch, &Of::heads, &Of::t_q,
                                              &Of::t_k, &Of::head_dim, &Of::scale, &Of::threads>;
};

}  // namespace

void bind_attention(pybind11::module_& m) {
    igpt::bind::def<Forward>(m, "causal_attention_fwd_cpu");
    igpt::bind::def<Backward>(m, "causal_attention_bwd_cpu");
}
