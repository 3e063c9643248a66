// The attention kernels of head dimension 96; see attention_fwd.cuh and attention_bwd.cuh.
#include "attention_bwd.cuh"
#include "attention_fwd.cuh"

namespace igpt::cuda::attention {

template int forward<96>(const AttentionFwdParams& params);
template int backward<96>(const AttentionBwdParams& params);
template int backward_terms<96>(const AttentionBwdParams& params);

}  // namespace igpt::cuda::attention
