// What the kernels of quantize share: the definition of the distance, and the exact comparison of uint8 colours.
//
// Every operation rounds, as in reference.py: the files that include this are compiled without contraction to FMA.
#pragma once

#include "memory.cuh"
#include "primitives.cuh"

namespace igpt::cuda {

// Squared distance, in the order of reference.py.
template <typename T>
__device__ __forceinline__ T squared_distance(T r, T g, T b, T cluster_r, T cluster_g, T cluster_b) {
    const T dr = r - cluster_r, dg = g - cluster_g, db = b - cluster_b;
    return (dr * dr + dg * dg) + db * db;
}

// The colour that a uint8 stands for.
__device__ __forceinline__ double level(int value) { return value / 127.5 - 1.0; }

// The nearest of the clusters offered so far to a uint8 colour. float32 sorts out those that cannot win: a distance in
// float32 is off by less than `limit` lies above the best. The others are compared in float64, the lowest index first.
struct Nearest {
    double best = INFINITY;
    float limit = INFINITY;
    int index = 0;

    // Whether a cluster at this float32 distance might win. NaN might, and then does not.
    __device__ __forceinline__ bool may_win(float distance) const { return !(distance > limit); }
    __device__ __forceinline__ void offer(double distance, int k) {
        if (distance < best) {
            best = distance;
            limit = float(distance) * 1.001f + 1e-5f;
            index = k;
        }
    }
};

}  // namespace igpt::cuda
