// The emulator's half of csrc/cuda/memory.cuh: alignment is checked, the access is counted, and then it happens.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace igpt::emulator {

enum class Access { global_load, global_store, shared };

void note(Access access, const void* address, size_t bytes, Where where = {});
// Of `bytes` bytes that a copy reads: no more than whether they may be read yet.
void check_read(const void* address, size_t bytes, Where where);
// A load by the hardware beside the threads: like note() but that it is not counted.
void note_copy(const void* from, size_t bytes, Where where);
// In place of note(), in a lane that takes no part in an access of its warp: keeps its later ones beside the others'.
void skip(Access access);
// The running thread writes to shared memory, in the way that copies and wgmma do not see without a fence.
void wrote_shared(const void* address, size_t bytes);

}  // namespace igpt::emulator

namespace igpt::cuda {

template <typename V>
inline V load_global(const V* address, emulator::Where where = {}) {
    emulator::note(emulator::Access::global_load, address, sizeof(V), where);
    return *address;
}
template <typename V>
inline void store_global(V* address, const V& value, emulator::Where where = {}) {
    emulator::note(emulator::Access::global_store, address, sizeof(V), where);
    *address = value;
}
template <typename V>
inline V load_shared(const V* address) {
    emulator::note(emulator::Access::shared, address, sizeof(V));
    return *address;
}
template <typename V>
inline void store_shared(V* address, const V& value) {
    emulator::note(emulator::Access::shared, address, sizeof(V));
    emulator::wrote_shared(address, sizeof(V));
    *address = value;
}

}  // namespace igpt::cuda
