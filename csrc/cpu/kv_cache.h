// Keys and values of a decoder's heads: one unit for each head of each sequence in each layer, at the same positions.
#pragma once

#include "arena.h"
#include "ops.h"

namespace igpt::cpu {

class KvCache {
  public:
    KvCache() = default;
    // Zeroed. Throws std::bad_alloc.
    KvCache(const DecoderKernels& kernels, Format format, int64_t head_dim, int64_t units, int64_t capacity);

    // Where a unit lies.
    void point(int64_t unit, AttentionDecodeParams& params) const;

    // Takes the unit's first positions, all that this cache has, from another of the same heads.
    void copy(int64_t unit, const KvCache& from);

    size_t bytes() const { return data_.size() + scales_.size(); }

  private:
    Arena data_, scales_;
    int64_t unit_bytes_ = 0, key_bytes_ = 0, unit_scales_ = 0;
};

}  // namespace igpt::cpu
