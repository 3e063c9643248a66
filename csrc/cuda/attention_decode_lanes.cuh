// What the lanes of attention_decode_ring.cuh have: of keys, values and sums.
#pragma once

#include <type_traits>

#include "attention_decode.cuh"
#include "e4m3.cuh"

namespace igpt::cuda::decode {

// What a lane has of a row of kDim elements that kLanes share: vectors lane, lane + kLanes, ... Of e4m3 a vector has 8
// elements too, or 16 where that is what a lane has: other lanes' vectors are in other banks then.
template <typename Stored, int kDim, int kLanes>
struct Part {
    static constexpr bool kScaled = std::is_same_v<Stored, E4M3>;
    static constexpr int kElements = kDim / kLanes, kSize = kScaled && kElements == 16 ? 16 : 8;
    static constexpr int kOwn = kElements / kSize, kBytes = kDim * int(sizeof(Stored));
    struct alignas(kSize) Codes {
        uint32_t words[kSize / 4];
    };
    using V = std::conditional_t<kScaled, Codes, Vector<Stored>>;
    V vectors[kOwn];

    // The first element of vector i.
    __device__ __forceinline__ static int start(int i) { return (int(threadIdx.x) % kLanes + i * kLanes) * kSize; }
    // From a row in shared memory, or nothing.
    __device__ __forceinline__ void load(const unsigned char* row, bool there) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            vectors[i] = {};
            if (there) vectors[i] = load_shared(reinterpret_cast<const V*>(row + start(i) * sizeof(Stored)));
        }
    }
    __device__ __forceinline__ void store(void* row) const {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            store_global(reinterpret_cast<V*>(static_cast<unsigned char*>(row) + start(i) * sizeof(Stored)),
                         vectors[i]);
        }
    }
    __device__ __forceinline__ float get(int e) const {
        const V& vector = vectors[e / kSize];
        if constexpr (kScaled) {
            const float2 two = from_e4m3x2(vector.words[e % kSize / 4] >> 8 * (e % 4 / 2 * 2));
            return e % 2 == 0 ? two.x : two.y;
        } else {
            return to_float(vector.at[e % kSize]);
        }
    }
};

// A row as it comes from the projection, where its lane has the same elements as of a cached one.
template <typename T, typename P, int kLanes>
struct Fresh {
    static constexpr int kWhole = P::kSize / Vector<T>::kSize;
    Vector<T> vectors[P::kOwn * kWhole];

    __device__ __forceinline__ void load(const void* row) {
#pragma unroll
        for (int i = 0; i < P::kOwn * kWhole; ++i) {
            const T* at = static_cast<const T*>(row) + P::start(i / kWhole) + i % kWhole * Vector<T>::kSize;
            vectors[i] = load_global(reinterpret_cast<const Vector<T>*>(at));
        }
    }
    __device__ __forceinline__ float get(int e) const {
        return to_float(vectors[e / Vector<T>::kSize].at[e % Vector<T>::kSize]);
    }
    // Of e4m3, in every lane of the group; NaN where an element is no number.
    __device__ __forceinline__ float scale() const {
        unsigned largest = 0;  // bits of |x|, whose order is that of the numbers, then infinity, then NaN
#pragma unroll
        for (int e = 0; e < P::kElements; ++e) largest = max(largest, __float_as_uint(get(e)) & 0x7fffffffu);
#pragma unroll
        for (int lane = 1; lane < kLanes; lane *= 2) {
            largest = max(largest, __shfl_xor_sync(kFullMask, largest, lane));
        }
        return largest < 0x7f800000u ? __uint_as_float(largest) / kLargestE4M3 : NAN;
    }
    // As the cache keeps it, and its scale, 1 where it has none.
    __device__ __forceinline__ float keep(P& kept) const {
        if constexpr (P::kScaled) {
            const float by = scale();
#pragma unroll
            for (int i = 0; i < P::kOwn; ++i) kept.vectors[i] = {};
#pragma unroll
            for (int e = 0; e < P::kElements; ++e) {
                const unsigned code = by == 0.0f ? 0u : to_e4m3(get(e) / by);
                kept.vectors[e / P::kSize].words[e % P::kSize / 4] |= code << 8 * (e % 4);
            }
            return by;
        } else {
#pragma unroll
            for (int i = 0; i < P::kOwn; ++i) kept.vectors[i] = vectors[i];
            return 1.0f;
        }
    }
};

// The softmax of the keys that a group of lanes has seen. sums: of the lane's elements.
template <typename S>
struct Sums {
    using K = typename S::K;
    using V = typename S::V;
    float m = -INFINITY, l = 0.0f;
    float sums[V::kElements] = {};

    __device__ __forceinline__ void rescale(float largest) {
        const float factor = weight_of(m, largest);
        m = largest;
        l *= factor;
#pragma unroll
        for (int e = 0; e < V::kElements; ++e) sums[e] *= factor;
    }
    __device__ __forceinline__ void add(float p, const V& value) {
#pragma unroll
        for (int e = 0; e < V::kElements; ++e) sums[e] += p * value.get(e);
    }
    // The score of a key in every lane of its group.
    __device__ __forceinline__ static float score(const float (&q)[K::kElements], const K& k, float scale) {
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < K::kElements; ++e) sum += q[e] * k.get(e);
#pragma unroll
        for (int lane = 1; lane < S::kLanes; lane *= 2) sum += __shfl_xor_sync(kFullMask, sum, lane);
        return K::kScaled ? sum * scale : sum;
    }

    // Takes a tile of `count` keys in; q is scaled.
    __device__ __forceinline__ void add_tile(const float (&q)[K::kElements], const unsigned char* tile, int count) {
        const int group = int(threadIdx.x) % kWarpSize / S::kLanes;
        const auto scale_of = [&](int at, int key) {
            return key < count ? load_shared(reinterpret_cast<const float*>(tile + at) + key) : 0.0f;
        };
        float scores[S::kUnroll], largest = m;
#pragma unroll
        for (int u = 0; u < S::kUnroll; ++u) {
            const int key = u * S::kGroups + group;
            K k;
            k.load(tile + S::kKeys + key * K::kBytes, key < count);
            const float s = score(q, k, K::kScaled ? scale_of(S::kKeyScales, key) : 1.0f);
            scores[u] = key < count ? s : -INFINITY;
            largest = fmaxf(largest, scores[u]);
        }
        rescale(largest);
#pragma unroll
        for (int u = 0; u < S::kUnroll; ++u) {
            const int key = u * S::kGroups + group;
            V v;
            v.load(tile + S::kValues + key * V::kBytes, key < count);
            const float p = weight_of(scores[u], m);
            l += p;
            add(V::kScaled ? p * scale_of(S::kValueScales, key) : p, v);
        }
    }

    // Puts the warp's groups together, in every one of them.
    __device__ __forceinline__ void merge_warp() {
        float largest = m;
#pragma unroll
        for (int lane = S::kLanes; lane < kWarpSize; lane *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, lane));
        }
        rescale(largest);
#pragma unroll
        for (int lane = S::kLanes; lane < kWarpSize; lane *= 2) {
            l += __shfl_xor_sync(kFullMask, l, lane);
#pragma unroll
            for (int e = 0; e < V::kElements; ++e) sums[e] += __shfl_xor_sync(kFullMask, sums[e], lane);
        }
    }
};

}  // namespace igpt::cuda::decode
