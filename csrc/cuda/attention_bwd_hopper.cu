// The backward kernels of attention for Hopper; see attention_bwd_hopper.cuh.
#include "attention_bwd_hopper.cuh"

namespace igpt::cuda::attention {

template int backward_hopper<64>(const AttentionBwdParams& params);
template int backward_hopper<96>(const AttentionBwdParams& params);
template int backward_hopper<128>(const AttentionBwdParams& params);

}  // namespace igpt::cuda::attention
