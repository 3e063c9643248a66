// What a thread of attention_decode.cu has of keys and values: 16-byte vectors, of those of the cache and of new ones.
#pragma once

#include <type_traits>

#include "attention_decode.cuh"
#include "e4m3.cuh"

namespace igpt::cuda::decode {

// How the lanes of a group share keys, or values: 16 bytes of what is stored, T or E4M3, at a time.
template <typename T_, typename Stored_, int kDim_, int kLanes_>
struct Layout {
    using T = T_;
    using V = Vector<T>;
    using Stored = Stored_;
    using Codes = Vector<Stored>;
    static constexpr bool kScaled = std::is_same_v<Stored, E4M3>;
    static constexpr int kDim = kDim_, kLanes = kLanes_;
    static constexpr int kGroups = kThreads / kLanes;               // keys side by side
    static constexpr int kParts = kDim / Codes::kSize;              // vectors of a key
    static constexpr int kTogether = kParts % kLanes == 0 ? 1 : 2;  // keys whose vectors a group's lanes share
    static constexpr int kVectors = kTogether * kParts / kLanes;    // of a lane for these
    static constexpr int kElements = kVectors * Codes::kSize;       // of a lane
    static constexpr int kWhole = Codes::kSize / V::kSize;          // vectors of T for one of them
    static_assert(kTogether * kParts % kLanes == 0);
};

template <typename T>
__device__ __forceinline__ T* offset(T* base, int64_t elements, size_t size) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return static_cast<Byte*>(base) + elements * int64_t(size);
}

// A lane's part of kTogether keys or values: vectors lane, lane + kLanes, ... of them one behind the other.
template <typename L>
struct Cached {
    typename L::Codes vectors[L::kVectors];
    float scales[L::kTogether];  // where they have some

    // Which of them vector i is of, and its first element there.
    __device__ __forceinline__ static int which(int i) {
        return L::kTogether == 1 ? 0 : (int(threadIdx.x % L::kLanes) + i * L::kLanes) / L::kParts;
    }
    __device__ __forceinline__ static int start(int i) {
        const int vector = int(threadIdx.x % L::kLanes) + i * L::kLanes;
        return (L::kTogether == 1 ? vector : vector % L::kParts) * L::Codes::kSize;
    }

    // Those at `first` and first + kGroups before `end`; zeros behind: a weight of 0 does not silence a NaN.
    __device__ __forceinline__ void load(const void* cache, const float* all_scales, int first, int end) {
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i) {
            const int key = first + which(i) * L::kGroups;
            if (L::kTogether == 1 || key < end) {
                const void* at = offset(cache, int64_t(key) * L::kDim + start(i), sizeof(typename L::Stored));
                vectors[i] = load_global(static_cast<const typename L::Codes*>(at));
            } else {
                vectors[i] = {};
            }
        }
        if constexpr (L::kScaled) {
#pragma unroll
            for (int n = 0; n < L::kTogether; ++n) {
                const int key = first + n * L::kGroups;
                scales[n] = n == 0 || key < end ? load_global(all_scales + key) : 0.0f;
            }
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i) {
            if constexpr (L::kScaled) {
                vectors[i] = {};
            } else {
#pragma unroll
                for (int e = 0; e < L::Codes::kSize; ++e) vectors[i].at[e] = from_float<typename L::T>(0);
            }
        }
        if constexpr (L::kScaled) {
#pragma unroll
            for (int n = 0; n < L::kTogether; ++n) scales[n] = 0.0f;
        }
    }
    // The first, without its scale, at a position of the cache.
    __device__ __forceinline__ void store(void* cache, int position) const {
        void* row = offset(cache, int64_t(position) * L::kDim, sizeof(typename L::Stored));
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i) {
            void* at = offset(row, start(i), sizeof(typename L::Stored));
            if (which(i) == 0) store_global(static_cast<typename L::Codes*>(at), vectors[i]);
        }
    }
    // The numbers of vector i.
    __device__ __forceinline__ void get(int i, float (&numbers)[L::Codes::kSize]) const {
        if constexpr (L::kScaled) {
#pragma unroll
            for (int e = 0; e < L::Codes::kSize; e += 2) {
                const float2 two = from_e4m3x2(vectors[i].words[e / 4] >> 8 * (e % 4));
                numbers[e] = two.x;
                numbers[e + 1] = two.y;
            }
        } else {
#pragma unroll
            for (int e = 0; e < L::Codes::kSize; ++e) numbers[e] = to_float(vectors[i].at[e]);
        }
    }
    // Of vector i, when the values' are these.
    __device__ __forceinline__ float weight(const float* weights, int i) const {
        if constexpr (!L::kScaled) return weights[0];
        float weight = weights[0] * scales[0];
        if (L::kTogether == 2 && which(i) == 1) weight = weights[L::kTogether - 1] * scales[L::kTogether - 1];
        return weight;
    }
};

// A query, key or value of the new position: what the lane has of the first of kTogether. The second one's vectors are
// the same.
template <typename L>
struct New {
    typename L::V vectors[L::kVectors][L::kWhole];

    __device__ __forceinline__ void load(const void* row) {
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i) {
#pragma unroll
            for (int n = 0; n < L::kWhole; ++n) {
                const void* at = offset(row, Cached<L>::start(i) + n * L::V::kSize, sizeof(typename L::T));
                vectors[i][n] = load_global(static_cast<const typename L::V*>(at));
            }
        }
    }
    __device__ __forceinline__ float get(int i, int e) const {
        return to_float(vectors[i][e / L::V::kSize].at[e % L::V::kSize]);
    }
    // In every lane of the group.
    __device__ __forceinline__ float scale() const {
        unsigned largest = 0;  // bits of |x|, whose order is that of the numbers, then infinity, then NaN
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i) {
#pragma unroll
            for (int e = 0; e < L::Codes::kSize; ++e) {
                const unsigned size = __float_as_uint(get(i, e)) & 0x7fffffffu;
                largest = size > largest ? size : largest;
            }
        }
#pragma unroll
        for (int lane = 1; lane < L::kLanes; lane *= 2) {
            const unsigned other = __shfl_xor_sync(kFullMask, largest, lane);
            largest = other > largest ? other : largest;
        }
        return largest < 0x7f800000u ? __uint_as_float(largest) / kLargestE4M3 : NAN;
    }
    // As the cache keeps it, with nothing beside it. All lanes of the warp take part.
    __device__ __forceinline__ void keep(Cached<L>& kept) const {
        if constexpr (L::kScaled) {
            const float of_all = scale();
#pragma unroll
            for (int i = 0; i < L::kVectors; ++i) {
                kept.vectors[i] = {};
#pragma unroll
                for (int e = 0; e < L::Codes::kSize; ++e) {
                    const unsigned code = of_all == 0.0f ? 0u : to_e4m3(get(i, e) / of_all);
                    kept.vectors[i].words[e / 4] |= code << 8 * (e % 4);
                }
            }
#pragma unroll
            for (int n = 0; n < L::kTogether; ++n) kept.scales[n] = n == 0 ? of_all : 0.0f;
        } else {
#pragma unroll
            for (int i = 0; i < L::kVectors; ++i) kept.vectors[i] = vectors[i][0];
        }
    }
};

}  // namespace igpt::cuda::decode
