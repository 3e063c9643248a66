// driver OP|all [brief]: runs the kernels of one op, or of all, on odd shapes under every schedule, in memory of the
// exact size, for the sanitizers. It looks at no result: test_norm.py and test_quantize.py do.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ops.h"
#include "emulator.h"

namespace {

using igpt::cuda::DType;
using igpt::emulator::Order;

// `count` elements that a sanitizer sees the end of. 0x3c01 and its repetition are harmless numbers in every type.
class Memory {
  public:
    Memory(size_t count, size_t size) : bytes_(count * size), data_(std::malloc(bytes_ ? bytes_ : 1)) {
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

void check(int code) {
    if (code != 0) throw std::runtime_error(igpt::cuda::error_string(code));
}

void quantize() {
    for (int64_t n : {0, 1, 255, 257, 600}) {
        for (int32_t k : {1, 255, 257}) {
            const Memory bytes(size_t(3 * n), 1), floats(size_t(3 * n), 4), clusters(size_t(3 * k), 4);
            const Memory out(size_t(n), 8);
            check(igpt::cuda::quantize_u8({bytes.get(), clusters.get<float>(), out.get<int64_t>(), n, k, 0, nullptr}));
            check(
                igpt::cuda::quantize_f32({floats.get(), clusters.get<float>(), out.get<int64_t>(), n, k, 0, nullptr}));
        }
    }
}

void rms_norm(DType dtype, int64_t rows, int32_t n, int32_t parts, bool fused) {
    const size_t size = dtype == DType::f32 ? 4 : 2, count = size_t(rows * n);
    const Memory x(count, size), residual(count, size), weight(size_t(n), size), sum(count, size), out(count, size);
    check(igpt::cuda::rms_norm_fwd({x.get(), fused ? residual.get() : nullptr, weight.get(),
                                    fused ? sum.get() : nullptr, out.get(), rows, n, 1e-5f, dtype, 0, nullptr}));
    const Memory dx(count, size), dweight(size_t(n), size), partial(size_t(parts) * size_t(n), 4);
    check(igpt::cuda::rms_norm_bwd({out.get(), fused ? residual.get() : nullptr, x.get(), weight.get(), dx.get(),
                                    dweight.get(), partial.get<float>(), rows, n, parts, 1e-5f, dtype, 0, nullptr}));
}

void norm() {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) rms_norm(dtype, 5, 72, 1, false);
    for (int32_t n : {8, 520, 1032, 2056}) rms_norm(DType::bf16, 7, n, 2, true);
    rms_norm(DType::bf16, 0, 64, 0, true);
}

void long_rows() {
    rms_norm(DType::bf16, 2, 8192, 2, true);
    rms_norm(DType::f32, 2, 8192, 1, true);
}

}  // namespace

int main(int argc, char** argv) {
    const std::string op = argc > 1 ? argv[1] : "all";
    const bool brief = argc > 2;  // races do not depend on the schedule
    try {
        for (Order order : {Order::random, Order::skewed, Order::fifo}) {
            igpt::emulator::set_schedule({order, 1});
            if (op == "all" || op == "quantize") quantize();
            if (op == "all" || op == "norm") norm();
            if (brief) break;
            if (op == "all" || op == "norm") long_rows();
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    std::puts("done");
    return 0;
}
