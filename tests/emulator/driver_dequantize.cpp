#include "driver.h"
#include "emulator.h"

namespace {

using driver::check;
using driver::Memory;
namespace cuda = igpt::cuda;

void dequantize(cuda::TokenType type, size_t size, int64_t n, int32_t k) {
    const Memory tokens(size_t(n), size), clusters(size_t(3 * k), 4), out(size_t(3 * n), 1);
    for (size_t i = 0; i < size_t(n) * size; ++i) tokens.get<uint8_t>()[i] = 0;
    check(cuda::dequantize({driver::kHere, tokens.get(), clusters.get<float>(), out.get<uint8_t>(), n, k, type}));
}

void dequantize_all(bool) {
    for (int64_t n : {0, 1, 511, 2048 + 700}) {
        dequantize(cuda::TokenType::i64, 8, n, 300);
        dequantize(cuda::TokenType::i32, 4, n, 300);
        dequantize(cuda::TokenType::i16, 2, n, 1);
        dequantize(cuda::TokenType::u8, 1, n, 1);
    }
    // Two blocks that take two turns.
    igpt::emulator::set_blocks(0, 2);
    dequantize(cuda::TokenType::u8, 1, 1024 * 2048 + 2049, 5);
    igpt::emulator::set_blocks(0, igpt::emulator::kAllBlocks);
}

const driver::Case added("dequantize", dequantize_all);

}  // namespace
