// A unit is its keys and then its values, in tiles (decoder_kernels.h); in int8, beside them, three vectors of the
// positions: the keys' scales, the values' scales, the keys' sums.
#include "kv_cache.h"

#include <algorithm>

namespace igpt::cpu {
KvCache::KvCache(const DecoderKernels& kernels, Format format, int64_t head_dim, int64_t units, int64_t capacity) {
    const int64_t size = format_bytes(format), tiled = padded(capacity, kernels.tile);
    key_bytes_ = padded(tiled * head_dim * size, 64);
    unit_bytes_ = key_bytes_ + padded(padded(capacity, value_rows) * padded(head_dim, kernels.lanes) * size, 64);
    data_ = Arena(size_t(units * unit_bytes_));
    if (format != Format::int8) return;
    unit_scales_ = 3 * padded(tiled, 16);
    scales_ = Arena(size_t(units * unit_scales_) * sizeof(float));
}

void KvCache::point(int64_t unit, AttentionDecodeParams& params) const {
    params.keys = data_.data() + unit * unit_bytes_;
    params.values = params.keys + key_bytes_;
    if (unit_scales_ == 0) return;
    const int64_t each = unit_scales_ / 3;
    params.key_scale = reinterpret_cast<float*>(scales_.data()) + unit * unit_scales_;
    params.value_scale = params.key_scale + each;
    params.key_sums = reinterpret_cast<int32_t*>(params.value_scale + each);
}

void KvCache::copy(int64_t unit, const KvCache& from) {
    AttentionDecodeParams to{}, source{};
    point(unit, to);
    from.point(unit, source);
    std::copy_n(source.keys, key_bytes_, to.keys);
    std::copy_n(source.values, unit_bytes_ - key_bytes_, to.values);
    const int64_t each = unit_scales_ / 3;
    if (each == 0) return;
    std::copy_n(source.key_scale, each, to.key_scale);
    std::copy_n(source.value_scale, each, to.value_scale);
    std::copy_n(source.key_sums, each, to.key_sums);
}

}  // namespace igpt::cpu
