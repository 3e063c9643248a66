// What is asked of CUDA's runtime besides launches: the words of its errors, and streams.
#include "launch.cuh"
#include "ops.h"

namespace igpt::cuda {

int make_stream(int device, void** stream) {
    const DeviceGuard guard(device);
    if (guard.error != cudaSuccess) return guard.error;
    cudaStream_t made{};
    const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
    *stream = made;
    return error;
}

const char* error_string(int code) { return cudaGetErrorString(cudaError_t(code)); }

}  // namespace igpt::cuda
