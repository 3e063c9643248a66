// Nearest-cluster quantization, the body that every isa_*.cpp compiles with its own flags.
//
// uint8: the colour cube is cut into cells of 16^3 (8^3 for large inputs) colours. The nearest cluster of any
// colour of a cell is among those whose smallest distance to the cell does not exceed the smallest of all largest
// distances; that list is made when a cell is first met and costs about as much as one brute-force pixel, so the
// method is never much slower than brute force, and the final comparison is in float64, so it is exact.
// float32: brute force over blocks of 64 pixels, one cluster after the other; 8 FLOPs per pixel and cluster,
// bound by arithmetic. No intermediate grows with n.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"

namespace igpt::cpu {
namespace {

class Cells {
  public:
    Cells(const float* clusters, int k, int bits) : k_(k), bits_(bits), count_(size_t(1) << (3 * bits)) {
        first_.assign(count_, -1);
        size_.assign(count_, 0);
        // Clusters in units of pixel values, so that a cell is a box of integers.
        for (auto& axis : axes_) axis.resize(k);
        near_.resize(k);
        found_.resize(k);
        for (int i = 0; i < k; ++i)
            for (int c = 0; c < 3; ++c) axes_[c][i] = (clusters[3 * i + c] + 1.0f) * 127.5f;
    }

    // Candidates of the cell that (r, g, b) lies in, in rising order.
    const int32_t* candidates(int r, int g, int b, int& n) {
        const int shift = 8 - bits_;
        const size_t cell = (size_t(r >> shift) << (2 * bits_)) | (size_t(g >> shift) << bits_) | size_t(b >> shift);
        if (first_[cell] < 0) build(cell);
        n = size_[cell];
        return list_.data() + first_[cell];
    }

  private:
    void build(size_t cell) {
        const int width = 256 >> bits_, mask = (1 << bits_) - 1;
        const float lo[3] = {float(int(cell >> (2 * bits_)) * width), float((int(cell >> bits_) & mask) * width),
                             float((int(cell) & mask) * width)};
        const float half = 0.5f * float(width - 1);
        const float *c0 = axes_[0].data(), *c1 = axes_[1].data(), *c2 = axes_[2].data();
        float* near = near_.data();
        float limit = INFINITY;
#pragma omp simd reduction(min : limit)
        for (int i = 0; i < k_; ++i) {
            // Distance to the box's centre along each axis; the box reaches `half` to both sides.
            const float d0 = std::fabs(c0[i] - lo[0] - half), d1 = std::fabs(c1[i] - lo[1] - half),
                        d2 = std::fabs(c2[i] - lo[2] - half);
            const float n0 = d0 > half ? d0 - half : 0.0f, n1 = d1 > half ? d1 - half : 0.0f,
                        n2 = d2 > half ? d2 - half : 0.0f;
            const float f0 = d0 + half, f1 = d1 + half, f2 = d2 + half;
            near[i] = n0 * n0 + n1 * n1 + n2 * n2;
            const float far = f0 * f0 + f1 * f1 + f2 * f2;
            limit = far < limit ? far : limit;
        }
        // Wide enough for the rounding of both bounds, in units of squared pixel values.
        limit = limit * 1.0001f + 0.01f;
        int n = 0;
        for (int i = 0; i < k_; ++i) {
            found_[n] = i;
            n += !(near[i] > limit);
        }
        first_[cell] = int64_t(list_.size());
        size_[cell] = n;
        list_.insert(list_.end(), found_.begin(), found_.begin() + n);
    }

    int k_, bits_;
    size_t count_;
    std::vector<int64_t> first_;
    std::vector<int32_t> size_, list_, found_;
    std::vector<float> axes_[3], near_;
};

void quantize_u8(const QuantizeParams& p) {
    const auto* x = static_cast<const uint8_t*>(p.x);
    std::vector<double> clusters(p.clusters, p.clusters + 3 * int64_t(p.k));
    double level[256];
    for (int v = 0; v < 256; ++v) level[v] = v / 127.5 - 1.0;
    const int bits = p.n < (int64_t(1) << 20) ? 4 : 5;
#pragma omp parallel num_threads(p.threads) if (p.n >= 4096)
    {
        Cells cells(p.clusters, p.k, bits);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.n; ++i) {
            const uint8_t r = x[3 * i], g = x[3 * i + 1], b = x[3 * i + 2];
            int n;
            const int32_t* list = cells.candidates(r, g, b, n);
            double best = INFINITY;
            int32_t index = 0;
            for (int j = 0; j < n; ++j) {
                const double* c = clusters.data() + 3 * int64_t(list[j]);
                const double dr = level[r] - c[0], dg = level[g] - c[1], db = level[b] - c[2];
                const double d = (dr * dr + dg * dg) + db * db;
                if (d < best) {
                    best = d;
                    index = list[j];
                }
            }
            p.out[i] = index;
        }
    }
}

constexpr int kBlock = 64;

void quantize_block(const float* x, const float* clusters, int k, int n, int64_t* out) {
    alignas(64) float r[kBlock] = {}, g[kBlock] = {}, b[kBlock] = {}, best[kBlock];
    alignas(64) int32_t index[kBlock] = {};
    for (int j = 0; j < n; ++j) {
        r[j] = x[3 * j];
        g[j] = x[3 * j + 1];
        b[j] = x[3 * j + 2];
    }
    std::fill(best, best + kBlock, INFINITY);
    for (int i = 0; i < k; ++i) {
        const float c0 = clusters[3 * i], c1 = clusters[3 * i + 1], c2 = clusters[3 * i + 2];
#pragma omp simd
        for (int j = 0; j < kBlock; ++j) {
            const float dr = r[j] - c0, dg = g[j] - c1, db = b[j] - c2;
            const float d = (dr * dr + dg * dg) + db * db;
            const bool nearer = d < best[j];
            best[j] = nearer ? d : best[j];
            index[j] = nearer ? i : index[j];
        }
    }
    for (int j = 0; j < n; ++j) out[j] = index[j];
}

void quantize_f32(const QuantizeParams& p) {
    const auto* x = static_cast<const float*>(p.x);
    const int64_t blocks = (p.n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.n * p.k >= 1 << 18)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i = block * kBlock;
        quantize_block(x + 3 * i, p.clusters, p.k, int(std::min<int64_t>(kBlock, p.n - i)), p.out + i);
    }
}

}  // namespace
}  // namespace igpt::cpu
