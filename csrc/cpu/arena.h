// Zeroed memory for weights, caches and scratch: one block, handed out front to back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace igpt::cpu {

class Arena {
  public:
    Arena() = default;
    // Throws std::bad_alloc. Large blocks ask the system for huge pages: a decode step walks through all of it, and
    // with pages of 4 KB the walk would wait for address translations.
    explicit Arena(size_t bytes);

    // Room for all that `lay`, which is called twice, takes: what it takes the first time is only counted.
    template <class Lay>
    static Arena of(Lay lay) {
        Arena counted;
        lay(counted);
        Arena arena(counted.used_);
        lay(arena);
        return arena;
    }

    // The next `count` elements, on a line of the cache of their own; the block must have room.
    template <class T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data_) + used_);
        used_ += bytes<T>(count);
        return at;
    }
    // What `take` uses up.
    template <class T>
    static constexpr size_t bytes(int64_t count) {
        return (size_t(count) * sizeof(T) + 63) / 64 * 64;
    }
    char* data() const { return data_; }
    size_t size() const { return size_; }

  private:
    struct Unmap {
        size_t bytes;
        void operator()(char* block) const;
    };
    char* data_ = nullptr;
    size_t size_ = 0, used_ = 0;
    std::unique_ptr<char, Unmap> block_;  // what was mapped
};

// At least `bytes`, kept by the calling thread for its next call: pages of new memory cost more than a short call. What
// was there is the caller's until then.
char* workspace(int64_t bytes);

}  // namespace igpt::cpu
