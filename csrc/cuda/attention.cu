// The launchers of causal attention: chooses the kernels by head dimension, which attention_hdim*.cu hold, a file for
// each so that they compile side by side.
#include "attention_common.cuh"

namespace igpt::cuda {
namespace {

template <typename F>
int dispatch_head_dim(const AttentionShape& shape, F&& f) {
    const DeviceGuard device(shape.device);
    if (device.error != cudaSuccess) return device.error;
    switch (shape.head_dim) {
        case 32:
            return f(std::integral_constant<int, 32>());
        case 64:
            return f(std::integral_constant<int, 64>());
        case 96:
            return f(std::integral_constant<int, 96>());
        case 128:
            return f(std::integral_constant<int, 128>());
    }
    return cudaErrorInvalidValue;
}

}  // namespace

int attention_fwd(const AttentionFwdParams& params) {
    return dispatch_head_dim(params.shape, [&](auto d) { return attention::forward<decltype(d)::value>(params); });
}

int attention_bwd(const AttentionBwdParams& params) {
    return dispatch_head_dim(params.shape, [&](auto d) { return attention::backward<decltype(d)::value>(params); });
}

}  // namespace igpt::cuda
