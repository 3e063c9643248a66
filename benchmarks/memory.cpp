// Reads and copies memory as fast as it comes: the ceilings of bytes. Compiled by ceilings.py.
#include <cstddef>
#include <cstdint>
#include <cstring>

// The exclusive or of `bytes` (a multiple of 4096) at `data`, by `threads` threads.
extern "C" uint64_t streaming_read(const char* data, size_t bytes, int threads) {
    typedef uint64_t Line __attribute__((vector_size(64)));
    uint64_t total = 0;
    const long pages = long(bytes / 4096);
#pragma omp parallel for schedule(static) num_threads(threads) reduction(^ : total)
    for (long page = 0; page < pages; ++page) {
        Line a{}, b{}, c{}, d{};
        const char* p = data + page * 4096;
        for (int i = 0; i < 4096; i += 256) {
            __builtin_prefetch(p + i + 8192, 0, 2);
            __builtin_prefetch(p + i + 8192 + 64, 0, 2);
            __builtin_prefetch(p + i + 8192 + 128, 0, 2);
            __builtin_prefetch(p + i + 8192 + 192, 0, 2);
            a ^= *reinterpret_cast<const Line*>(p + i);
            b ^= *reinterpret_cast<const Line*>(p + i + 64);
            c ^= *reinterpret_cast<const Line*>(p + i + 128);
            d ^= *reinterpret_cast<const Line*>(p + i + 192);
        }
        a ^= b ^ c ^ d;
        total ^= a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
    }
    return total;
}

// Copies `bytes` by `threads` threads, each a part of its own; memcpy chooses the stores.
extern "C" void streaming_copy(char* to, const char* from, size_t bytes, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const size_t first = bytes / threads * part, end = part + 1 == threads ? bytes : bytes / threads * (part + 1);
        std::memcpy(to + first, from + first, end - first);
    }
}
