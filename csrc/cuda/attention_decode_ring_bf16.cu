// attention_decode_ring.cuh for bfloat16.
#include "attention_decode_ring.cuh"

namespace igpt::cuda::decode {

int launch_ring_bf16(const AttentionDecodeParams& p) {
    if (!p.v_scale) return launch_ring_of<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16>(p);
    return launch_ring_of<__nv_bfloat16, __nv_bfloat16, E4M3>(p);
}

}  // namespace igpt::cuda::decode
