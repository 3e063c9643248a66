// attention_decode_ring.cuh for float16.
#include "attention_decode_ring.cuh"

namespace igpt::cuda::decode {

int launch_ring_f16(const AttentionDecodeParams& p) { return launch_ring_of<__half>(p); }

}  // namespace igpt::cuda::decode
