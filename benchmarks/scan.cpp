// The plain scan: every pixel is compared with every cluster, pixels in lanes, float32. What quantize is measured by;
// palettes.py has it compiled for the instructions that quantize uses.
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kRegisters = 2, kPixels = kRegisters * kLanes;
typedef float Values __attribute__((vector_size(4 * kLanes)));
typedef int32_t Places __attribute__((vector_size(4 * kLanes)));

void scan(const float* x, const float* clusters, int k, int64_t n, int64_t* out) {
    float colours[3][kPixels];
    for (int j = 0; j < kPixels; ++j)
        for (int c = 0; c < 3; ++c) colours[c][j] = x[3 * (j < n ? j : 0) + c];
    Values at[3][kRegisters], best[kRegisters];
    Places index[kRegisters], place{};
    std::memcpy(at, colours, sizeof at);
    for (int v = 0; v < kRegisters; ++v) best[v] = Values{} + __builtin_inff(), index[v] = Places{};
    for (int i = 0; i < k; ++i, place += 1)
        for (int v = 0; v < kRegisters; ++v) {
            const float* c = clusters + 3 * int64_t(i);
            const Values dr = at[0][v] - c[0], dg = at[1][v] - c[1], db = at[2][v] - c[2];
            const Values d = (dr * dr + dg * dg) + db * db;
            index[v] = d < best[v] ? place : index[v];
            best[v] = d < best[v] ? d : best[v];
        }
    int32_t found[kPixels];
    std::memcpy(found, index, sizeof found);
    for (int j = 0; j < n && j < kPixels; ++j) out[j] = found[j];
}

}  // namespace

extern "C" void plain_scan(const float* x, const float* clusters, int64_t* out, int64_t n, int k, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i += kPixels) scan(x + 3 * i, clusters, k, n - i, out + i);
}
