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

// Whether TMA takes a tensor: not an empty one. The stride of a dimension with one element is never used.
bool has_tensor_map(const AttentionTensor& tensor, const AttentionShape& shape, int64_t positions) {
    const auto good = [](int64_t size, int64_t stride) {
        return size == 1 || (size > 1 && stride > 0 && stride % 8 == 0 && stride < int64_t(1) << 39);
    };
    return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && good(positions, tensor.position) &&
           good(shape.heads, tensor.head) && good(shape.batch, tensor.batch);
}

// What attention_fwd_hopper.cuh solves, and what attention_bwd_hopper.cuh does.
bool hopper_can_run(const AttentionFwdParams& p) {
    const AttentionShape& shape = p.shape;
    return p.rows == 0 && shape.head_dim >= 64 && shape.key_mask == nullptr && has_tensor_map(p.q, shape, shape.t_q) &&
           has_tensor_map(p.k, shape, shape.t_k) && has_tensor_map(p.v, shape, shape.t_k);
}
bool hopper_can_run(const AttentionBwdParams& p) {
    return !p.portable && has_tensor_map(p.dout, p.shape, p.shape.t_q) &&
           hopper_can_run(AttentionFwdParams{p.shape, p.q, p.k, p.v, p.out, nullptr, 0});
}

// Whether the device runs wgmma and TMA, and the build has code for it.
bool is_hopper(int device) {
#if defined(IGPT_SM_90A) || !defined(__CUDACC__)
    int major = 0, minor = 0;
    return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
           minor == 0;
#else
    static_cast<void>(device);
    return false;
#endif
}

}  // namespace

int causal_attention_fwd(const AttentionFwdParams& params) {
    const bool hopper = hopper_can_run(params) && is_hopper(params.shape.device);
    return dispatch_head_dim(params.shape, [&](auto d) {
        constexpr int D = decltype(d)::value;
        if constexpr (D >= 64) {
            if (hopper) return attention::forward_hopper<D>(params);
        }
        return attention::forward<D>(params);
    });
}

int causal_attention_bwd(const AttentionBwdParams& params) {
    const bool hopper = hopper_can_run(params) && is_hopper(params.shape.device);
    return dispatch_head_dim(params.shape, [&](auto d) {
        constexpr int D = decltype(d)::value;
        if (const int error = attention::backward_terms<D>(params)) return error;
        if constexpr (D >= 64) {
            if (hopper) return attention::backward_hopper<D>(params);
        }
        return attention::backward<D>(params);
    });
}

}  // namespace igpt::cuda
