#include "arena.h"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace igpt::cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

}  // namespace

Arena::Arena(size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    const bool huge = bytes >= 2 * kHugePage;
    mapped_ = huge ? (bytes + 2 * kHugePage - 1) / kHugePage * kHugePage : bytes;  // one more, to begin at a multiple
    block_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block_ == MAP_FAILED) {
        block_ = nullptr;
        throw std::bad_alloc();
    }
    data_ = static_cast<char*>(block_);
    if (!huge) return;
    data_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data_) + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
    madvise(data_, mapped_ - size_t(data_ - static_cast<char*>(block_)), MADV_HUGEPAGE);  // a wish: may fail
#endif
}

Arena::~Arena() {
    if (block_) munmap(block_, mapped_);
}

Arena::Arena(Arena&& other) noexcept { *this = std::move(other); }

Arena& Arena::operator=(Arena&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(used_, other.used_);
    std::swap(block_, other.block_);
    std::swap(mapped_, other.mapped_);
    return *this;
}

}  // namespace igpt::cpu
