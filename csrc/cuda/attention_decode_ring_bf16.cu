// attention_decode_ring.cuh for bfloat16.
#include "attention_decode_ring.cuh"

namespace igpt::cuda::decode {

int launch_ring_bf16(const AttentionDecodeParams& p) { return launch_ring_of<__nv_bfloat16>(p); }

}  // namespace igpt::cuda::decode
