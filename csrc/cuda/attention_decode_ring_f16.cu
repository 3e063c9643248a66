// attention_decode_ring.cuh for float16.
#include "attention_decode_ring.cuh"

namespace igpt::cuda::decode {

int launch_ring_f16(const AttentionDecodeParams& p) {
    if (!p.v_scale) return launch_ring_of<__half, __half, __half>(p);
    return launch_ring_of<__half, __half, E4M3>(p);
}

}  // namespace igpt::cuda::decode
