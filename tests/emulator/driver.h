// What the driver's cases share. Each driver_<op>.cpp adds a Case of the op's name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#include "cuda/ops.h"

namespace driver {

constexpr igpt::cuda::Launch kHere{0, nullptr};

// Runs an op's kernels on odd shapes. `brief`: under the thread sanitizer, for which a few small shapes do.
struct Case {
    Case(const char* name, void (*run)(bool brief));
};

// `count` elements that a sanitizer sees the end of. 0x3c01 and its repetition are harmless numbers in every type.
enum class Fill { numbers, none };

class Memory {
  public:
    Memory(size_t count, size_t size, Fill fill = Fill::numbers)
        : bytes_(count * size), data_(std::malloc(bytes_ ? bytes_ : 1)) {
        if (fill == Fill::none) return;
        for (size_t i = 0; i < bytes_; ++i) static_cast<unsigned char*>(data_)[i] = i % 2 ? 0x3c : 0x01;
    }
    ~Memory() { std::free(data_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    template <typename T = void>
    T* get() const {
        return static_cast<T*>(data_);
    }

  private:
    size_t bytes_;
    void* data_;
};

inline void check(int code) {
    if (code != 0) throw std::runtime_error(igpt::cuda::error_string(code));
}

}  // namespace driver
