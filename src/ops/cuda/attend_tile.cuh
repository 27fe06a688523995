// Attention of one token by the tensor cores: the query heads of a key head are the rows of a tile, 8 at
// most, and a warp goes over its part of the keys 16 at a time.
#pragma once
#include "tensor_cores.cuh"

// Where 16 bytes of a row of a tile (16, D) lie in shared memory: permuted, so that eight rows' same
// chunk lies in all banks.
template <int D> __device__ __forceinline__ u32 chunk_of(const bf16 *tile, u32 row, u32 chunk) {
    return (u32)__cvta_generic_to_shared(tile + row * D + (chunk ^ (row & 7)) * 8);
}

// A warp's part of the softmax and of the mixed values. Lane (g, t) has those of query head g: the
// maximum, its lanes' part of the sum, and columns 2t and 2t + 1 of each 8 of the values.
template <int D> struct TilePart {
    u32 q[D / 16][4] = {};
    float max = NONE, sum = 0.0f, mixed[D / 8][4] = {};

    // Of `heads` queries.
    __device__ __forceinline__ TilePart(const float (*query)[D], u32 heads) {
        u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        if (g >= heads) return;
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            const float *p = &query[g][s * 16 + 2 * t];
            q[s][0] = packed(p[0], p[1]), q[s][2] = packed(p[8], p[9]);
        }
    }
    // 16 keys, and their values right behind them, of tokens from `from` on; there are none from `end` on.
    __device__ __forceinline__ void look(const bf16 *tile, u32 from, u32 end) {
        u32 lane = threadIdx.x % 32, t = lane % 4;
        float scores[2][4] = {};
#pragma unroll
        for (int s = 0; s < D / 32; s++) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                u32 r[4];
                ldmatrix(r, chunk_of<D>(tile, n * 8 + lane % 8, s * 4 + lane / 8));
                mma(scores[n], q[2 * s], r[0], r[1]);
                mma(scores[n], q[2 * s + 1], r[2], r[3]);
            }
        }
        float top = max;
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float &x = scores[n][j];
                x = from + n * 8 + 2 * t + j < end ? x : -INFINITY;
                top = fmaxf(top, x);
            }
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        float shrink = __expf(max - top);
        max = top, sum *= shrink;
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int j = 0; j < 2; j++) sum += scores[n][j] = __expf(scores[n][j] - top);
        }
        u32 weights[4] = {packed(scores[0][0], scores[0][1]), 0, packed(scores[1][0], scores[1][1]), 0};
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            u32 r[4];
            ldmatrix_transposed(r, chunk_of<D>(tile + 16 * D, lane % 16, d * 2 + lane / 16));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float(&m)[4] = mixed[2 * d + half];
                m[0] *= shrink, m[1] *= shrink;
                mma(m, weights, r[2 * half], r[2 * half + 1]);
            }
        }
    }
    // The sum of a head's four lanes.
    __device__ __forceinline__ float whole_sum() const {
        float all = sum + __shfl_xor_sync(~0u, sum, 1);
        return all + __shfl_xor_sync(~0u, all, 2);
    }
};
