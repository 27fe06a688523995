// Attention of whole sequences in bf16 by the tensor cores: scores, mask, softmax and mixed values
// of a tile at a time, so that scores never go to memory. All of them are computed, also those that
// the causal mask then takes to −∞: it is what the same ops one by one do.
//
// A block takes query rows of one head, a warp 16 · MT of them; keys and values come in
// tiles of BN tokens, the next one fetched while this one is worked on. A row's maximum and sum run
// along; what has been summed shrinks whenever the maximum grows.
#include "common.cuh"

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// 16 bytes to shared memory while the thread goes on; zeros where there is nothing.
__device__ __forceinline__ void copy_async(u32 to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(there ? 16 : 0));
}

__device__ __forceinline__ u32 packed(float a, float b) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<u32 *>(&pair);
}

// out (batch, seq, heads · D) from q (batch, heads, seq, D), scaled already, and keys and values
// (batch, kv_heads, …, D), of which each head has `held` tokens and begins `stride` elements after
// the one before. The queries are the last `seq` of these tokens; each sees no token after its own
// and none before its window.
template <int D, int MT, int BN, bool WINDOWED>
__device__ void attention(const Attention<bf16> &a) {
    constexpr int THREADS = ATTENTION_WARPS * 32;
    constexpr int CHUNKS = D / 8; // of 16 bytes in a row
    __shared__ __align__(128) bf16 tiles[2][2][BN * D]; // [buffer][keys, values]
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 head = blockIdx.y, b = blockIdx.z;
    u32 seq = a.seq, held = a.held, heads = a.heads;
    u32 first = (blockIdx.x * ATTENTION_WARPS + warp) * 16 * MT;
    const bf16 *k = a.keys + ((u64)b * a.kv_heads + head / (heads / a.kv_heads)) * a.stride;
    const bf16 *v = a.values + (k - a.keys);

    // Rows are stored with their chunks permuted, so that eight rows' same chunk lies in all banks.
    auto place = [&](int buffer, int which, u32 row, u32 chunk) {
        const bf16 *p = &tiles[buffer][which][row * D + (chunk ^ (row & 7)) * 8];
        return (u32)__cvta_generic_to_shared(p);
    };
    auto fetch = [&](int buffer, u32 from) {
#pragma unroll
        for (int i = threadIdx.x; i < BN * CHUNKS; i += THREADS) {
            u32 row = i / CHUNKS, chunk = i % CHUNKS;
            bool there = from + row < held;
            u64 at = there ? (u64)(from + row) * D + chunk * 8 : 0;
            copy_async(place(buffer, 0, row, chunk), k + at, there);
            copy_async(place(buffer, 1, row, chunk), v + at, there);
        }
        asm volatile("cp.async.commit_group;");
    };
    fetch(0, 0);

    u32 query[MT][D / 16][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 row = min(first + m * 16 + half * 8 + g, seq - 1);
            const bf16 *p = a.q + (((u64)b * heads + head) * seq + row) * D + 2 * t;
#pragma unroll
            for (int s = 0; s < D / 16; s++) {
                query[m][s][half] = *reinterpret_cast<const u32 *>(p + s * 16);
                query[m][s][half + 2] = *reinterpret_cast<const u32 *>(p + s * 16 + 8);
            }
        }
    }
    float mixed[MT][D / 8][4] = {}, max[MT][2], sum[MT][2] = {};
#pragma unroll
    for (int m = 0; m < MT; m++) max[m][0] = max[m][1] = -1e30f;

    for (u32 from = 0, buffer = 0; from < held; from += BN, buffer ^= 1) {
        if (from + BN < held) {
            fetch(buffer ^ 1, from + BN);
            asm volatile("cp.async.wait_group 1;");
        } else {
            asm volatile("cp.async.wait_group 0;");
        }
        __syncthreads();

        float scores[MT][BN / 8][4] = {};
#pragma unroll
        for (int n = 0; n < BN / 8; n++) {
#pragma unroll
            for (int s = 0; s < D / 32; s++) {
                u32 r[4];
                ldmatrix(r, place(buffer, 0, n * 8 + lane % 8, s * 4 + lane / 8));
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma(scores[m][n], query[m][2 * s], r[0], r[1]);
                    mma(scores[m][n], query[m][2 * s + 1], r[2], r[3]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 row = first + m * 16 + half * 8 + g;
                u32 own = min(held - seq + row + 1, held); // and what is before it
                Seen seen(own, a.window);
                float top = max[m][half];
#pragma unroll
                for (int n = 0; n < BN / 8; n++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float &x = scores[m][n][half * 2 + j];
                        u32 token = from + n * 8 + 2 * t + j;
                        x += (WINDOWED ? seen.has(token) : token < own) ? 0.0f : -INFINITY;
                        top = fmaxf(top, x);
                    }
                }
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                constexpr float LOG2_E = 1.4426950408889634f;
                float shrink = exp2f((max[m][half] - top) * LOG2_E), minus = -top * LOG2_E;
                max[m][half] = top;
                float part = 0.0f;
#pragma unroll
                for (int n = 0; n < BN / 8; n++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float &x = scores[m][n][half * 2 + j];
                        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x * LOG2_E + minus));
                        part += x;
                    }
                }
                sum[m][half] = sum[m][half] * shrink + part;
#pragma unroll
                for (int d = 0; d < D / 8; d++) {
                    mixed[m][d][half * 2] *= shrink;
                    mixed[m][d][half * 2 + 1] *= shrink;
                }
            }
        }
#pragma unroll
        for (int s = 0; s < BN / 16; s++) {
            u32 weights[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const float(&x)[4] = scores[m][2 * s], (&y)[4] = scores[m][2 * s + 1];
                weights[m][0] = packed(x[0], x[1]), weights[m][1] = packed(x[2], x[3]);
                weights[m][2] = packed(y[0], y[1]), weights[m][3] = packed(y[2], y[3]);
            }
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                u32 r[4];
                ldmatrix_transposed(r, place(buffer, 1, s * 16 + lane % 16, d * 2 + lane / 16));
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma(mixed[m][2 * d], weights[m], r[0], r[1]);
                    mma(mixed[m][2 * d + 1], weights[m], r[2], r[3]);
                }
            }
        }
        __syncthreads(); // before this buffer is filled anew
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[m][half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            float inverse = 1.0f / total;
            u32 row = first + m * 16 + half * 8 + g;
            if (row >= seq) continue;
            bf16 *p = a.out + (((u64)b * seq + row) * heads + head) * D + 2 * t;
#pragma unroll
            for (int d = 0; d < D / 8; d++)
                *reinterpret_cast<u32 *>(p + d * 8) = packed(mixed[m][d][half * 2] * inverse,
                                                             mixed[m][d][half * 2 + 1] * inverse);
        }
    }
}

#define ATTENTION(NAME, WINDOWED, T, t, D, MT, BN)                                                 \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32)                             \
        NAME##_##t##_##D(Attention<T> a) {                                                         \
        attention<D, MT, BN, WINDOWED>(a);                                                         \
    }

ATTENTION_SHAPES(ATTENTION, attention, false, bf16, bf16)
ATTENTION_SHAPES(ATTENTION, attention_windowed, true, bf16, bf16)
