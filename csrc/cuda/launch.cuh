// The one place where a kernel starts: <<<>>> under nvcc, fibres on the CPU under the host compiler.
//
// A kernel takes one Params struct by value. Shared memory is dynamic, so that its size stands at the launch and the
// emulator can poison it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

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

#ifdef __CUDACC__
// What `find` says of a key, which names a kernel and a device: asked until it is not 0, and then known to all threads,
// so that a launch asks the runtime nothing.
template <typename Key, typename Find>
int remembered(const Key& key, const Find& find) {
    static std::mutex mutex;
    static std::map<Key, int> known;  // for each `find`
    const std::lock_guard<std::mutex> lock(mutex);
    const auto at = known.find(key);
    if (at != known.end()) return at->second;
    const int found = find();
    if (found != 0) known.emplace(key, found);
    return found;
}

// Lets a kernel have as much dynamic shared memory as a block can have on the current device: no launch asks for its
// own share, which another thread's launch could lower again. With `dependent` the multiprocessors' memory goes to that
// rather than to L1, since they move the border only when they are idle: a launch that wants another one than the
// launch before could not begin beside it.
template <typename Params>
cudaError_t prepare(void (*kernel)(Params), size_t bytes, bool dependent) {
    if (bytes <= 48 * 1024 && !dependent) return cudaSuccess;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const int done = remembered(std::make_tuple(kernel, device, dependent), [&] {
        int most = 0;
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (error == cudaSuccess) {
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        }
        if (error == cudaSuccess && dependent) {
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared);
        }
        return int(error == cudaSuccess);
    });
    if (done == 0) cudaGetLastError();  // takes it, lest the next launch report it
    return error;
}
#endif

// Whether a kernel's blocks can be put together in clusters, and it has its grid_dependency_wait in it: its code on the
// current device is of PTX for sm_90 or later. What the driver makes there of older PTX is not: it would trap, or read
// what is not written yet.
template <typename Params>
bool has_clusters([[maybe_unused]] void (*kernel)(Params)) {
#ifdef __CUDACC__
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    const int version = remembered(std::make_tuple(kernel, device), [&] {
        cudaFuncAttributes code{};
        if (cudaFuncGetAttributes(&code, kernel) == cudaSuccess) return code.ptxVersion;
        cudaGetLastError();
        return 0;
    });
    return version >= 90;
#else
    return emulator::capability() >= 90;
#endif
}

// How many blocks of a kernel run at a time on the current device, number `device`, in whole clusters; 0 after an
// error.
template <typename Params>
int resident_blocks([[maybe_unused]] void (*kernel)(Params), [[maybe_unused]] int device, unsigned threads,
                    size_t shared_bytes, unsigned cluster) {
#ifdef __CUDACC__
    return remembered(std::make_tuple(kernel, device, threads, shared_bytes, cluster), [&] {
        int count = 0, multiprocessors = 0;
        cudaError_t error = prepare(kernel, shared_bytes, true);
        if (error == cudaSuccess && cluster == 1) {
            error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
            if (error == cudaSuccess) {
                error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, int(threads), shared_bytes);
            }
            count *= multiprocessors;
        } else if (error == cudaSuccess) {
            cudaLaunchAttribute attribute{};
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = cluster;
            attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
            cudaLaunchConfig_t config{};
            config.gridDim = cluster;
            config.blockDim = threads;
            config.dynamicSmemBytes = shared_bytes;
            config.attrs = &attribute;
            config.numAttrs = 1;
            error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
            count *= int(cluster);
        }
        cudaGetLastError();
        return error == cudaSuccess ? count : 0;
    });
#else
    return emulator::resident_blocks(threads, shared_bytes, cluster);
#endif
}

// Launches on `stream` of the current device, which a DeviceGuard has chosen. `cluster`: how many blocks, side by side
// in x, are a cluster, up to 8; more than one only where it has_clusters(). `dependent`: the kernel, which calls
// grid_dependency_wait before it reads what launches before it have written, writes anything or returns, may begin when
// all blocks of the launch before have called grid_dependency_launch or ended (programmatic dependent launch).
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Params& params, unsigned cluster = 1, bool dependent = false) {
#ifdef __CUDACC__
    if (const cudaError_t error = prepare(kernel, shared_bytes, dependent); error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = cluster;
        attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
        ++count;
    }
    if (dependent && has_clusters(kernel)) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count].val.programmaticStreamSerializationAllowed = 1;
        ++count;
    }
    if (count == 0) {
        kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
        return cudaGetLastError();
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = count;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
    cudaGetLastError();
    return error;
#else
    static_cast<void>(stream);
    if (!emulator::record(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes)) {
        emulator::launch(grid, block, shared_bytes, cluster, dependent && has_clusters(kernel),
                         [&] { kernel(params); });
    }
    return cudaSuccess;
#endif
}

}  // namespace igpt::cuda
