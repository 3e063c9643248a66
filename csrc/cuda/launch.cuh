// The one place where a kernel starts: <<<>>> under nvcc, fibres on the CPU under the host compiler.
//
// A kernel takes one Params struct by value. Shared memory is dynamic, so that its size stands at the launch and the
// emulator can poison it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "../emulator/emulator.h"
#include "../emulator/record.h"
#endif

namespace igpt::cuda {

// The block's dynamic shared memory, 128-byte aligned.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char igpt_dynamic_shared[];
    return reinterpret_cast<T*>(igpt_dynamic_shared);
#else
    return reinterpret_cast<T*>(emulator::dynamic_shared());
#endif
}

// Makes a device the current one and, at the end, the one before: the caller's thread goes on using its own.
struct DeviceGuard {
    explicit DeviceGuard(int device) : error(cudaGetDevice(&before)) {
        if (error == cudaSuccess && before != device) {
            changed = true;
            error = cudaSetDevice(device);
        }
    }
    ~DeviceGuard() {
        if (changed) cudaSetDevice(before);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    int before = 0;
    bool changed = false;
    cudaError_t error;
};

// Whether blocks can be put together in clusters.
inline bool has_clusters([[maybe_unused]] int device) {
#ifdef __CUDACC__
    int major = 0;
    return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
#else
    return true;
#endif
}

// Launches on `stream` of the current device, which a DeviceGuard has chosen. `cluster`: how many blocks, side by side
// in x, are a cluster, up to 8; more than one only where has_clusters().
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Params& params, unsigned cluster = 1) {
#ifdef __CUDACC__
    if (shared_bytes > 48 * 1024) {  // more than a kernel has without asking
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) return cudaGetLastError();  // takes it, lest the next launch report it
    }
    if (cluster == 1) {
        kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
        return cudaGetLastError();
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
    cudaGetLastError();
    return error;
#else
    static_cast<void>(stream);
    if (!emulator::record(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes)) {
        emulator::launch(grid, block, shared_bytes, cluster, [&] { kernel(params); });
    }
    return cudaSuccess;
#endif
}

}  // namespace igpt::cuda
