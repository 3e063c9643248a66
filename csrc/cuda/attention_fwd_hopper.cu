// The attention kernels for Hopper; see attention_fwd_hopper.cuh.
#include "attention_fwd_hopper.cuh"

namespace igpt::cuda::attention {

template int forward_hopper<64>(const AttentionFwdParams& params);
template int forward_hopper<96>(const AttentionFwdParams& params);
template int forward_hopper<128>(const AttentionFwdParams& params);

}  // namespace igpt::cuda::attention
