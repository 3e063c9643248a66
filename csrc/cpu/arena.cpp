#include "arena.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace igpt::cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

}  // namespace

Arena::Arena(size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
#ifdef __SANITIZE_ADDRESS__
    // Of the heap, whose ends the sanitizer guards; what is behind a mapping is another one.
    void* heap = nullptr;
    if (posix_memalign(&heap, 4096, bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<char*>(std::memset(heap, 0, bytes));
    block_ = std::unique_ptr<char, Unmap>(data_, Unmap{bytes});
#else
    const bool huge = bytes >= 2 * kHugePage;
    // One page more, to begin at a multiple of its size.
    const size_t mapped = huge ? (bytes + 2 * kHugePage - 1) / kHugePage * kHugePage : bytes;
    void* block = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<char*>(block);
    block_ = std::unique_ptr<char, Unmap>(data_, Unmap{mapped});
    if (!huge) return;
    data_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data_) + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
    madvise(data_, mapped - size_t(data_ - block_.get()), MADV_HUGEPAGE);  // a wish: may fail
#endif
#endif
}

void Arena::Unmap::operator()(char* block) const {
#ifdef __SANITIZE_ADDRESS__
    std::free(block);
#else
    munmap(block, bytes);
#endif
}

char* workspace(int64_t bytes) {
    static thread_local Arena memory;
    if (int64_t(memory.size()) < bytes) {
        memory = Arena();  // the old one goes before the new one comes
        memory = Arena(size_t(bytes));
    }
    return memory.data();
}

}  // namespace igpt::cpu
