#include <vector>

#include "driver.h"
#include "emulator.h"

namespace {

using driver::check;
using driver::Memory;
using igpt::cuda::DType;

struct Sizes {
    int64_t rows, heads, positions, group, prefix;  // group 0: no prefix
    int32_t dim, splits, prefix_splits;
    bool values8 = false, keys8 = false;  // in e4m3
    bool ring = false, cluster = false;
};

void decode(DType dtype, const Sizes& s, const std::vector<int32_t>& at, const std::vector<int32_t>& from) {
    const size_t size = dtype == DType::f32 ? 4 : 2, rows = size_t(s.rows), heads = size_t(s.heads);
    const size_t row = heads * size_t(s.dim), cache = rows * size_t(s.positions) * row;
    // q, k and v side by side, as the packed projection has them.
    const Memory packed(rows * 3 * row, size), out(rows * row, size);
    const Memory keys(cache, s.keys8 ? 1 : size), values(cache, s.values8 ? 1 : size);
    const size_t positions = rows * heads * size_t(s.positions);
    const Memory key_scales(s.keys8 ? positions : 0, 4), value_scales(s.values8 ? positions : 0, 4);
    const size_t prefix = s.group ? rows / size_t(s.group) * size_t(s.prefix) * row : 0;
    const Memory prefix_k(prefix, size), prefix_v(prefix, size);
    const size_t slots = size_t(s.splits + s.prefix_splits);
    const Memory partial(slots > 1 ? rows * heads * slots * size_t(s.dim + 2) : 0, 4);
    const Memory position(at.size(), 4), starts(from.size(), 4);
    for (size_t i = 0; i < at.size(); ++i) position.get<int32_t>()[i] = at[i];
    for (size_t i = 0; i < from.size(); ++i) starts.get<int32_t>()[i] = from[i];
    const auto part = [&](size_t i) { return packed.get<char>() + i * row * size; };
    const int64_t step = int64_t(3 * row), of_prefix = s.prefix * s.dim;
    check(igpt::cuda::attention_decode({driver::kHere,
                                        part(0),
                                        part(1),
                                        part(2),
                                        keys.get(),
                                        s.keys8 ? key_scales.get<float>() : nullptr,
                                        values.get(),
                                        s.values8 ? value_scales.get<float>() : nullptr,
                                        position.get<int32_t>(),
                                        from.empty() ? nullptr : starts.get<int32_t>(),
                                        prefix ? prefix_k.get() : nullptr,
                                        prefix ? prefix_v.get() : nullptr,
                                        out.get(),
                                        slots > 1 ? partial.get<float>() : nullptr,
                                        step,
                                        s.dim,
                                        step,
                                        s.dim,
                                        step,
                                        s.dim,
                                        s.heads * of_prefix,
                                        of_prefix,
                                        s.rows,
                                        s.heads,
                                        s.positions,
                                        s.group ? s.group : 1,
                                        s.prefix,
                                        s.dim,
                                        at.size() > 1,
                                        s.splits,
                                        s.prefix_splits,
                                        0.1f,
                                        dtype,
                                        igpt::cuda::Dependent::none,
                                        s.ring,
                                        s.cluster}));
}

// Through the ring, with few blocks that have many parts, in clusters too.
void decode_by_ring(bool brief) {
    igpt::emulator::set_multiprocessors(1);
    igpt::emulator::set_capability(90);
    for (int32_t dim : {32, 64, 96, 128}) {
        decode(DType::bf16, {2, 3, 70, 0, 0, dim, 2, 0, false, false, true, true}, {69, 35}, {5, 0});
        decode(DType::f16, {2, 3, 70, 0, 0, dim, 2, 0, true, true, true, false}, {69, 35}, {5, 0});
        if (brief) continue;
        decode(DType::bf16, {2, 5, 67, 0, 0, dim, 1, 0, true, false, true, false}, {-1, 66}, {});
        decode(DType::f16, {2, 1, 300, 2, 67, dim, 2, 2, true, true, true, true}, {299}, {66, 90});
    }
    igpt::emulator::set_multiprocessors(132);
    igpt::emulator::set_capability(80);
}

void attention_decode(bool brief) {
    for (int32_t dim : {32, 64, 96, 128}) {
        decode(DType::bf16, {2, 2, 130, 0, 0, dim, 3, 0}, {129, 62}, {5, 0});
        decode(DType::f16, {6, 1, 70, 3, 67, dim, 2, 2}, {0, 1, 63, 64, 69, 70}, {0, 1, 66, 70, 90, 500});
        decode(DType::bf16, {2, 2, 130, 0, 0, dim, 3, 0, true}, {129, 62}, {5, 0});
        decode(DType::bf16, {2, 2, 130, 0, 0, dim, 3, 0, true, true}, {129, 62}, {5, 0});
        if (brief) continue;
        decode(DType::f16, {6, 1, 70, 3, 67, dim, 2, 2, true}, {0, 1, 63, 64, 69, 70}, {0, 1, 66, 70, 90, 500});
        decode(DType::f16, {6, 1, 70, 3, 67, dim, 2, 2, true, true}, {0, 1, 63, 64, 69, 70}, {0, 1, 66, 70, 90, 500});
        decode(DType::f32, {2, 2, 70, 0, 0, dim, 1, 0}, {69}, {});
        decode(DType::bf16, {17, 1, 1, 17, 33, dim, 1, 1}, {0}, {});
        decode(DType::bf16, {1, 2, 65, 1, 1, dim, 2, 1}, {64}, {});
    }
    decode(DType::bf16, {2, 2, 70, 0, 0, 64, 1, 0}, {-1, 70}, {0, 0});
    decode(DType::bf16, {0, 2, 70, 0, 0, 64, 1, 0}, {0}, {});
}

const driver::Case added("attention_decode", attention_decode), ring("attention_decode_ring", decode_by_ring);

}  // namespace
