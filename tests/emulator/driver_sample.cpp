#include "driver.h"

namespace {

using driver::check;
using driver::Memory;
namespace cuda = igpt::cuda;
using cuda::DType;

size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// In place, by settings in memory: the last rows are behind the columns.
void step(cuda::SampleParams p, double temperature, int64_t top_k, double top_p) {
    const Memory settings(1, sizeof(cuda::SampleSettings)), tokens(size_t(p.rows * 3), 8);
    const Memory logprobs(size_t(p.rows * 3), 4);
    *settings.get<cuda::SampleSettings>() = {7, top_p, temperature, -1.0, top_k, 1, 1};
    p.settings = settings.get<cuda::SampleSettings>();
    p.tokens = tokens.get<int64_t>();
    p.logprobs = logprobs.get<float>();
    p.columns = 3;
    p.advance = true;
    p.dependent = cuda::Dependent::late;
    check(cuda::sample(p));
}

void draw(DType dtype, int64_t rows, int32_t k, int32_t n_embd, float temperature, int32_t top_k, double top_p) {
    const size_t size = size_of(dtype);
    const Memory logits(size_t(rows * k), size), uniform(size_t(rows), 4), tokens(size_t(rows), 8);
    const Memory streams(size_t(rows), 8), position(size_t(rows), 4);
    const Memory wte(size_t(k * n_embd), size), wpe(size_t(4 * n_embd), size), embedding(size_t(rows * n_embd), size);
    for (int64_t i = 0; i < rows; ++i) position.get<int32_t>()[i] = int32_t(i);
    cuda::SampleParams p{};
    p.logits = logits.get();
    p.tokens = tokens.get<int64_t>();
    p.row_stride = p.k = k;
    p.rows = rows;
    p.columns = 1;
    p.temperature = temperature;
    p.top_k = top_k;
    p.top_p = top_p;
    p.min_score = -1.0f;
    p.dtype = p.embed_dtype = dtype;
    p.uniform = uniform.get<float>();
    for (int64_t i = 0; i < rows; ++i) uniform.get<float>()[i] = 0.5f;
    check(cuda::sample(p));
    p.uniform = nullptr;
    p.streams = streams.get<int64_t>();
    p.position = position.get<int32_t>();
    p.position_stride = 1;
    p.wte = wte.get();
    p.wpe = wpe.get();
    p.embedding = embedding.get();
    p.n_embd = n_embd;
    p.n_positions = 4;
    check(cuda::sample(p));
    step(p, temperature, top_k, top_p);
}

void sample(bool brief) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) draw(dtype, 5, 77, 24, 1.0f, 0, 1.0);
    for (int32_t k : {1, 3, 64, 512, 513, 1024}) {
        draw(DType::bf16, 2, k, 13, 0.9f, k / 2, 0.7);
        if (!brief) draw(DType::f32, 5, k, 520, 1.0f, k / 2, 1.0);
    }
    draw(DType::f32, 2, 512, 8, 0.0f, 0, 1.0);
    draw(DType::f32, 0, 512, 8, 1.0f, 5, 0.5);
}

const driver::Case added("sample", sample);

}  // namespace
