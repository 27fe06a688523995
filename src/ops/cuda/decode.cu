// One token of each sequence through a layer, in five launches: norm and q, k, v with bias; RoPE,
// cache and attention; o and residual; norm, gate and up with SiLU and product; down and residual.
//
// Products are with few rows, so what counts is that every weight is read once, by many threads,
// with many loads under way: a block takes R rows of the weight and all B rows of the input, its
// threads split the summed dimension. What does not depend on the kernel before (the first weights)
// is fetched before waiting for it.
//
// The number of tokens held is read from memory, so that one recorded graph serves every step.
#include "common.cuh"

#define THREADS 128

// What is multiplied by what, and what happens to the sums.
enum Kind {
    PLAIN = 0, // out = sum + bias
    ADD = 1,   // out = out + sum
    GATED = 2, // out = silu(sum with the first weight) · sum with the second
};

// Up to three weights one after another as the rows of one, each with its bias or none.
template <typename T> struct Weights {
    const T *w0, *w1, *w2;
    const T *b0, *b1, *b2;
    u32 n0, n01, n; // rows of the first, of the first two, of all

    __device__ const T *row(u32 r, u32 k) const {
        if (r < n0) return w0 + (u64)r * k;
        if (r < n01) return w1 + (u64)(r - n0) * k;
        return w2 + (u64)(r - n01) * k;
    }
    __device__ float bias(u32 r) const {
        const T *b = r < n0 ? b0 : r < n01 ? b1 : b2;
        return b ? widen(b[r < n0 ? r : r < n01 ? r - n0 : r - n01]) : 0.0f;
    }
};

// Weights that a later kernel reads, to be fetched into the L2 cache while this one leaves memory
// idle: two tensors, of so many bytes each.
struct Ahead {
    const char *p0, *p1;
    u64 n0, n1;

    // A share of them, by each of `count` threads.
    __device__ void fetch(u32 thread, u32 count) const {
        share(p0, n0, thread, count);
        share(p1, n1, thread, count);
    }
    static __device__ void share(const char *p, u64 bytes, u32 thread, u32 count) {
#if __CUDA_ARCH__ >= 900
        u64 each = (bytes / count + 127) / 128 * 128, from = thread * each;
        if (from >= bytes) return;
        u32 size = (u32)(bytes - from < each ? bytes - from : each) & ~15u;
        if (size) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p + from), "r"(size));
#endif
    }
};

// Eight elements as they lie in memory, so that those on their way take few registers.
template <typename T> struct Raw;
template <> struct Raw<bf16> {
    uint4 v;
    __device__ void fetch(const bf16 *p) { v = __ldcs(reinterpret_cast<const uint4 *>(p)); }
    __device__ void widen_to(float (&out)[8]) const {
        const __nv_bfloat162 *pairs = reinterpret_cast<const __nv_bfloat162 *>(&v);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = __bfloat1622float2(pairs[i]);
            out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
        }
    }
};
template <> struct Raw<float> {
    float4 a, b;
    __device__ void fetch(const float *p) {
        a = __ldcs(reinterpret_cast<const float4 *>(p));
        b = __ldcs(reinterpret_cast<const float4 *>(p) + 1);
    }
    __device__ void widen_to(float (&out)[8]) const {
        out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
        out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    }
};

// Sums over a warp of M values each lane holds, M a power of 2 up to 32: value i ends in the lanes
// whose index, divided by 32 / M, is i. Each step halves what is still held.
template <int S, int MASK, int M> __device__ __forceinline__ void halve(float (&v)[M]) {
    if constexpr (S > 0) {
        bool upper = threadIdx.x & MASK;
#pragma unroll
        for (int i = 0; i < S; i++) {
            float sent = upper ? v[i] : v[i + S];
            v[i] = (upper ? v[i + S] : v[i]) + __shfl_xor_sync(~0u, sent, MASK);
        }
        halve<S / 2, MASK / 2>(v);
    } else if constexpr (MASK > 0) {
        v[0] += __shfl_xor_sync(~0u, v[0], MASK);
        halve<0, MASK / 2>(v);
    }
}
template <int M> __device__ __forceinline__ float scatter_sums(float (&v)[M]) {
    halve<M / 2, 16>(v);
    return v[0];
}

// out (batch, n) from x (batch, k), B rows at most; with `gain`, x is normalized first.
// AHEAD packs of every row are under way at once.
template <typename T, int B, int R, int KIND, int AHEAD>
__device__ void project(T *out, const T *x, const T *gain, Weights<T> w, u32 batch, u32 k, float eps,
                        Ahead ahead) {
    constexpr int SETS = KIND == GATED ? 2 : 1;
    constexpr int SUMS = SETS * R * B;
    u32 first = blockIdx.x * R;
    const T *rows[SETS * R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        u32 row = min(first + r, w.n - 1); // past the end: again the last, and dropped
        if constexpr (KIND == GATED) {
            rows[2 * r] = w.w0 + (u64)row * k;
            rows[2 * r + 1] = w.w1 + (u64)row * k;
        } else {
            rows[r] = w.row(row, k);
        }
    }
    float sums[SUMS] = {}, squares[B] = {};
    Raw<T> weights[AHEAD][SETS * R];
    auto fetch = [&](int c, u32 i) {
        if (i < k) {
#pragma unroll
            for (int r = 0; r < SETS * R; r++) weights[c][r].fetch(rows[r] + i);
        }
    };
#pragma unroll
    for (int c = 0; c < AHEAD; c++) fetch(c, (c * THREADS + threadIdx.x) * 8);
    if (threadIdx.x == 0) ahead.fetch(blockIdx.x, gridDim.x);
    wait_for_inputs();
    let_next_start();
    for (u32 start = threadIdx.x * 8; start < k; start += AHEAD * THREADS * 8) {
#pragma unroll
        for (int c = 0; c < AHEAD; c++) {
            u32 i = start + c * THREADS * 8;
            if (i >= k) break;
            float g[8], v[B][8];
            if (gain) load<8>(gain + i, g);
#pragma unroll
            for (int b = 0; b < B; b++) {
                if (b < batch) load<8>(x + (u64)b * k + i, v[b]);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    if (b >= batch) v[b][j] = 0.0f;
                    if (gain) {
                        squares[b] += v[b][j] * v[b][j];
                        v[b][j] *= g[j];
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < SETS * R; r++) {
                float w[8];
                weights[c][r].widen_to(w);
#pragma unroll
                for (int b = 0; b < B; b++) {
#pragma unroll
                    for (int j = 0; j < 8; j++) sums[r * B + b] += v[b][j] * w[j];
                }
            }
            fetch(c, i + AHEAD * THREADS * 8);
        }
    }
    constexpr int WARPS = THREADS / 32;
    __shared__ float parts[WARPS][SUMS + B];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if constexpr (SUMS <= 32) {
        float sum = scatter_sums<SUMS>(sums);
        if (lane % (32 / SUMS) == 0) parts[warp][lane / (32 / SUMS)] = sum;
    } else {
#pragma unroll
        for (int part = 0; part < SUMS / 32; part++) {
            float some[32];
#pragma unroll
            for (int j = 0; j < 32; j++) some[j] = sums[part * 32 + j];
            parts[warp][part * 32 + lane] = scatter_sums<32>(some);
        }
    }
    if (gain) {
        float sum = scatter_sums<B>(squares);
        if (lane % (32 / B) == 0) parts[warp][SUMS + lane / (32 / B)] = sum;
    }
    __syncthreads();
    int r = threadIdx.x / B, b = threadIdx.x % B;
    if (r >= R || b >= batch || first + r >= w.n) return;
    auto total = [&](int i) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < WARPS; j++) sum += parts[j][i];
        return sum;
    };
    float inverse = gain ? rsqrtf(total(SUMS + b) / k + eps) : 1.0f;
    T *to = out + (u64)b * w.n + first + r;
    if constexpr (KIND == GATED) {
        float gate = rounded<T>(total(2 * r * B + b) * inverse);
        float up = rounded<T>(total((2 * r + 1) * B + b) * inverse);
        *to = narrow<T>(rounded<T>(gate / (1.0f + __expf(-gate))) * up);
    } else {
        float sum = rounded<T>(total(r * B + b) * inverse);
        *to = narrow<T>(sum + (KIND == ADD ? widen(*to) : w.bias(first + r)));
    }
}

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// `project` for 8 · NT rows of input at most, in bf16 by the tensor cores: the weight's rows are
// the rows of a tile, the input's its columns. A block takes 16 rows of the weight (of each, if
// gated); its warps take turns along the summed dimension, 32 elements at a time, of which a lane
// loads 8 that lie together. The order in which a tile sums them is of no account, so these serve
// as what the instruction calls elements 2t, 2t + 1, 2t + 8 and 2t + 9 of two tiles.
#define TILE_WARPS 8
template <int NT, int KIND>
__device__ void project_tiles(bf16 *out, const bf16 *x, const bf16 *gain, Weights<bf16> w,
                              u32 batch, u32 k, float eps, Ahead ahead) {
    constexpr int SETS = KIND == GATED ? 2 : 1, TURNS = 4;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 first = blockIdx.x * 16;
    const bf16 *rows[SETS][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 row = min(first + half * 8 + g, w.n - 1);
        if constexpr (KIND == GATED) {
            rows[0][half] = w.w0 + (u64)row * k;
            rows[1][half] = w.w1 + (u64)row * k;
        } else {
            rows[0][half] = w.row(row, k);
        }
    }
    uint4 weights[TURNS][SETS][2];
    auto fetch = [&](int turn, u32 i) {
#pragma unroll
        for (int s = 0; s < SETS; s++) {
#pragma unroll
            for (int half = 0; half < 2; half++)
                weights[turn][s][half] =
                    i < k ? __ldcs(reinterpret_cast<const uint4 *>(rows[s][half] + i)) : uint4{};
        }
    };
    u32 start = warp * 32 + t * 8;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) fetch(turn, start + turn * TILE_WARPS * 32);
    if (threadIdx.x == 0) ahead.fetch(blockIdx.x, gridDim.x);
    wait_for_inputs();
    let_next_start();

    float sums[SETS][NT][4] = {}, squares[NT] = {};
    for (; start - t * 8 < k; start += TURNS * TILE_WARPS * 32) {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            u32 i = start + turn * TILE_WARPS * 32;
            float gains[8];
            if (gain && i < k) load<8>(gain + i, gains);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                u32 row = n * 8 + g;
                uint4 pack = {};
                if (row < batch && i < k)
                    pack = *reinterpret_cast<const uint4 *>(x + (u64)row * k + i);
                if (gain) {
                    __nv_bfloat162 *pairs = reinterpret_cast<__nv_bfloat162 *>(&pack);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float2 v = __bfloat1622float2(pairs[j]);
                        squares[n] += v.x * v.x + v.y * v.y;
                        pairs[j] = i < k ? __floats2bfloat162_rn(v.x * gains[2 * j],
                                                                 v.y * gains[2 * j + 1])
                                         : pairs[j];
                    }
                }
#pragma unroll
                for (int s = 0; s < SETS; s++) {
                    const uint4 &a = weights[turn][s][0], &b = weights[turn][s][1];
                    mma(sums[s][n], a.x, b.x, a.y, b.y, pack.x, pack.y);
                    mma(sums[s][n], a.z, b.z, a.w, b.w, pack.z, pack.w);
                }
            }
            fetch(turn, i + TURNS * TILE_WARPS * 32);
        }
    }

    // The warps' sums: half of the warps give theirs to the other half, until one has all.
    __shared__ float given[TILE_WARPS / 2][SETS * NT * 4][32], of_squares[TILE_WARPS][NT * 8];
    if (gain) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            squares[n] += __shfl_xor_sync(~0u, squares[n], 1);
            squares[n] += __shfl_xor_sync(~0u, squares[n], 2);
            if (t == 0) of_squares[warp][n * 8 + g] = squares[n];
        }
    }
#pragma unroll
    for (int left = TILE_WARPS / 2; left > 0; left /= 2) {
        if (warp >= left && warp < 2 * left) {
#pragma unroll
            for (int i = 0; i < SETS * NT * 4; i++)
                given[warp - left][i][lane] = sums[i / (NT * 4)][i / 4 % NT][i % 4];
        }
        __syncthreads();
        if (warp < left) {
#pragma unroll
            for (int i = 0; i < SETS * NT * 4; i++)
                sums[i / (NT * 4)][i / 4 % NT][i % 4] += given[warp][i][lane];
        }
        __syncthreads();
    }
    if (warp) return;
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 b = n * 8 + 2 * t + j % 2, row = first + g + j / 2 * 8;
            if (b >= batch || row >= w.n) continue;
            float inverse = 1.0f;
            if (gain) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < TILE_WARPS; i++) sum += of_squares[i][b];
                inverse = rsqrtf(sum / k + eps);
            }
            bf16 *to = out + (u64)b * w.n + row;
            float sum = rounded<bf16>(sums[0][n][j] * inverse);
            if constexpr (KIND == GATED) {
                float up = rounded<bf16>(sums[1][n][j] * inverse);
                *to = narrow<bf16>(rounded<bf16>(sum / (1.0f + __expf(-sum))) * up);
            } else {
                *to = narrow<bf16>(sum + (KIND == ADD ? widen(*to) : w.bias(row)));
            }
        }
    }
}

// x (batch, width) = rows `ids` of the table
template <typename T> __device__ void embed(T *x, const T *table, const u32 *ids, u32 width) {
    wait_for_inputs();
    let_next_start();
    const T *row = table + (u64)ids[blockIdx.y] * width;
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < width) x[(u64)blockIdx.y * width + i] = row[i];
}

// Attention of one query token over `*held` tokens before it and itself, grouped: block (split,
// key head, sequence) takes the G query heads of one key head and one of `splits` shares of the
// keys. q, k, v are the new token's, before RoPE; k after it and v go into the caches
// (batch, K, capacity, D). The block that finishes last of a head's adds the shares up.
//
// A key's D elements lie in D / 8 lanes, so a warp looks at 256 / D keys at once, and each of these
// groups of lanes keeps a running maximum, sum and weighted value of its own for every query head.
#define MOST_G 8
#define MOST_SPLITS 32
#define LOOKERS 256
#define KEYS 2 // that a group looks at together
template <typename T, int D>
__device__ void attend(T *out, const T *q, const T *k, const T *v, T *keys, T *values, const T *cos,
                       const T *sin, const T *scale, const u32 *held, float *shares, u32 *done,
                       u32 heads, u32 kv_heads, u32 capacity, u32 q_stride, u32 kv_stride) {
    constexpr int LANES = D / 8, GROUPS = LOOKERS / LANES;
    u32 split = blockIdx.x, splits = gridDim.x, head = blockIdx.y, b = blockIdx.z;
    u32 g_count = heads / kv_heads;
    int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    // What was held before this step is there: whoever wrote it has ended.
    u32 past = *held;
    u64 base = ((u64)b * kv_heads + head) * capacity * D + lane * 8;
    u32 start = (u64)past * split / splits, end = (u64)past * (split + 1) / splits;
    Raw<T> next_key[KEYS], next_value[KEYS];
    auto fetch = [&](u32 from) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            u32 t = from + i * GROUPS + group;
            if (t >= end) continue;
            next_key[i].fetch(keys + base + (u64)t * D);
            next_value[i].fetch(values + base + (u64)t * D);
        }
    };
    fetch(start);
    wait_for_inputs();
    let_next_start();

    // RoPE of the queries and of the new key.
    __shared__ float query[MOST_G][D], new_key[D];
    const T *co = cos + (u64)past * (D / 2), *si = sin + (u64)past * (D / 2);
    for (u32 i = threadIdx.x; i < (g_count + 1) * (D / 2); i += LOOKERS) {
        u32 g = i / (D / 2), j = i % (D / 2);
        const T *from = g < g_count ? q + (u64)b * q_stride + (head * g_count + g) * D
                                    : k + (u64)b * kv_stride + head * D;
        float first = widen(from[j]), second = widen(from[j + D / 2]);
        float c = widen(co[j]), s = widen(si[j]);
        float x = rounded<T>(first * c - second * s), y = rounded<T>(first * s + second * c);
        if (g < g_count) {
            float f = widen(scale[0]);
            query[g][j] = rounded<T>(x * f), query[g][j + D / 2] = rounded<T>(y * f);
        } else {
            new_key[j] = x, new_key[j + D / 2] = y;
        }
    }
    __syncthreads();
    // Below any score, yet a number: a group without keys weighs exp(NONE − max) = 0.
    constexpr float NONE = -1e30f;
    float qs[MOST_G][8], max[MOST_G], sum[MOST_G], mixed[MOST_G][8];
#pragma unroll
    for (int g = 0; g < MOST_G; g++) {
        max[g] = NONE, sum[g] = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            qs[g][j] = g < g_count ? query[g][lane * 8 + j] : 0.0f;
            mixed[g][j] = 0.0f;
        }
    }
    // By whole warps, of whose groups some may have no key.
    auto look = [&](const float (&key)[KEYS][8], const float (&value)[KEYS][8], const bool (&valid)[KEYS]) {
#pragma unroll
        for (int g = 0; g < MOST_G; g++) {
            if (g < g_count) {
                float s[KEYS], now = max[g];
#pragma unroll
                for (int i = 0; i < KEYS; i++) {
                    s[i] = 0.0f;
#pragma unroll
                    for (int j = 0; j < 8; j++) s[i] += qs[g][j] * key[i][j];
                }
#pragma unroll
                for (int mask = LANES / 2; mask > 0; mask >>= 1) {
#pragma unroll
                    for (int i = 0; i < KEYS; i++) s[i] += __shfl_xor_sync(~0u, s[i], mask);
                }
#pragma unroll
                for (int i = 0; i < KEYS; i++) {
                    s[i] = valid[i] ? s[i] : -INFINITY;
                    now = fmaxf(now, s[i]);
                }
                float shrink = __expf(max[g] - now);
                max[g] = now;
                sum[g] *= shrink;
#pragma unroll
                for (int j = 0; j < 8; j++) mixed[g][j] *= shrink;
#pragma unroll
                for (int i = 0; i < KEYS; i++) {
                    float weight = __expf(s[i] - now);
                    sum[g] += weight;
#pragma unroll
                    for (int j = 0; j < 8; j++) mixed[g][j] += weight * value[i][j];
                }
            }
        }
    };
    float key[KEYS][8], value[KEYS][8];
    bool valid[KEYS];
    for (u32 t = start; t < end; t += KEYS * GROUPS) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            valid[i] = t + i * GROUPS + group < end;
            next_key[i].widen_to(key[i]), next_value[i].widen_to(value[i]);
            // Whatever is there without a token may be no number.
#pragma unroll
            for (int j = 0; j < 8; j++) value[i][j] = valid[i] ? value[i][j] : 0.0f;
        }
        fetch(t + KEYS * GROUPS);
        look(key, value, valid);
    }
    // The new token itself, in the first share.
    if (split == 0 && threadIdx.x < 32) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            valid[i] = i == 0 && group == 0;
#pragma unroll
            for (int j = 0; j < 8; j++) key[i][j] = new_key[lane * 8 + j], value[i][j] = 0.0f;
        }
        load<8>(v + (u64)b * kv_stride + head * D + lane * 8, value[0]);
        if (group == 0) {
            store<8>(keys + base + (u64)past * D, key[0]);
            store<8>(values + base + (u64)past * D, value[0]);
        }
        look(key, value, valid);
    }

    // The groups' results into one share, (max, sum, D values) for each query head: first within a
    // warp, then over the warps.
    constexpr int WARPS = LOOKERS / 32;
    __shared__ float maxes[WARPS][MOST_G], sums[WARPS][MOST_G], part[WARPS][MOST_G][D];
    int warp = threadIdx.x / 32;
#pragma unroll
    for (int g = 0; g < MOST_G; g++) {
        if (g < g_count) {
#pragma unroll
            for (int mask = LANES; mask < 32; mask <<= 1) {
                float other = __shfl_xor_sync(~0u, max[g], mask), now = fmaxf(max[g], other);
                float mine = __expf(max[g] - now), theirs = __expf(other - now);
                max[g] = now;
                sum[g] = sum[g] * mine + __shfl_xor_sync(~0u, sum[g], mask) * theirs;
#pragma unroll
                for (int j = 0; j < 8; j++)
                    mixed[g][j] =
                        mixed[g][j] * mine + __shfl_xor_sync(~0u, mixed[g][j], mask) * theirs;
            }
            if (threadIdx.x % 32 < LANES) {
                maxes[warp][g] = max[g], sums[warp][g] = sum[g];
#pragma unroll
                for (int j = 0; j < 8; j++) part[warp][g][lane * 8 + j] = mixed[g][j];
            }
        }
    }
    __syncthreads();
    u64 row = (u64)b * heads + head * g_count;
    for (u32 i = threadIdx.x; i < g_count * D; i += LOOKERS) {
        u32 g = i / D, j = i % D;
        float top = NONE, total = 0.0f, v = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, maxes[w][g]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float weight = __expf(maxes[w][g] - top);
            total += weight * sums[w][g];
            v += weight * part[w][g][j];
        }
        if (splits == 1) {
            out[(row + g) * D + j] = narrow<T>(v / total);
        } else {
            float *share = shares + ((row + g) * splits + split) * (D + 2);
            share[2 + j] = v;
            if (j == 0) share[0] = top, share[1] = total;
        }
    }
    if (splits == 1) return;

    // Whoever is last of this head adds the shares up.
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(done + b * kv_heads + head, splits - 1) == splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    __shared__ float tops[MOST_G][MOST_SPLITS], totals[MOST_G][MOST_SPLITS];
    for (u32 i = threadIdx.x; i < g_count * splits; i += LOOKERS) {
        const float *share = shares + (row * splits + i) * (D + 2);
        tops[i / splits][i % splits] = __ldcg(share);
        totals[i / splits][i % splits] = __ldcg(share + 1);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < g_count * D; i += LOOKERS) {
        u32 g = i / D, j = i % D;
        const float *share = shares + (row + g) * splits * (D + 2) + 2 + j;
        float top = NONE, total = 0.0f, v = 0.0f;
        for (u32 s = 0; s < splits; s++) top = fmaxf(top, tops[g][s]);
#pragma unroll 8
        for (u32 s = 0; s < splits; s++) {
            float weight = __expf(tops[g][s] - top);
            total += weight * totals[g][s];
            v += weight * __ldcg(share + s * (D + 2));
        }
        out[(row + g) * D + j] = narrow<T>(v / total);
    }
}

// The largest of each row's logits becomes the row's next input, and entry `*held - first` of
// `chosen` (steps, batch): (order of its bits, ~index). Blocks (share of a row, row); the last one
// to finish writes, and counts the token that has just been fed. `best` (batch) is 0 before and
// after.
template <typename T>
__device__ void choose(u32 *ids, u64 *chosen, u64 *best, u32 *held, u32 *done, const T *logits,
                       u32 width, u32 first) {
    wait_for_inputs();
    const T *p = logits + (u64)blockIdx.y * width;
    u64 mine = 0;
    for (u32 i = (blockIdx.x * 256 + threadIdx.x) * 8; i < width; i += gridDim.x * 256 * 8) {
        float v[8];
        load<8>(p + i, v);
#pragma unroll
        for (int j = 0; j < 8; j++) mine = larger(mine, ranked(v[j], i + j));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1)
        mine = larger(mine, __shfl_xor_sync(~0u, mine, mask));
    if (threadIdx.x % 32 == 0) atomicMax(best + blockIdx.y, mine);
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    u32 blocks = gridDim.x * gridDim.y;
    if (threadIdx.x == 0) last = atomicInc(done, blocks - 1) == blocks - 1;
    __syncthreads();
    if (!last) return;
    for (u32 row = threadIdx.x; row < gridDim.y; row += 256) {
        u64 top = atomicExch(best + row, 0ull);
        ids[row] = ~(u32)top;
        chosen[(u64)(*held - first) * gridDim.y + row] = top;
    }
    __syncthreads();
    if (threadIdx.x == 0) *held += 1;
}

// ---- what the host calls ------------------------------------------------------------------------

#define PROJECT(T, t, NAME, B, R, KIND, AHEAD)                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_##t##_##B(                        \
        T *o, const T *x, const T *g, const T *w0, const T *w1, const T *w2, const T *b0,          \
        const T *b1, const T *b2, u32 n0, u32 n01, u32 n, u32 batch, u32 k, float eps,             \
        const char *p0, u64 s0, const char *p1, u64 s1) {                                          \
        Weights<T> w = {w0, w1, w2, b0, b1, b2, n0, n01, n};                                       \
        project<T, B, R, KIND, AHEAD>(o, x, g, w, batch, k, eps, {p0, p1, s0, s1});                \
    }

#define TILES(NAME, NT, KIND)                                                                      \
    extern "C" __global__ void __launch_bounds__(TILE_WARPS * 32) NAME##_tiles_bf16_##NT(          \
        bf16 *o, const bf16 *x, const bf16 *g, const bf16 *w0, const bf16 *w1, const bf16 *w2,     \
        const bf16 *b0, const bf16 *b1, const bf16 *b2, u32 n0, u32 n01, u32 n, u32 batch, u32 k,  \
        float eps, const char *p0, u64 s0, const char *p1, u64 s1) {                               \
        Weights<bf16> w = {w0, w1, w2, b0, b1, b2, n0, n01, n};                                    \
        project_tiles<NT, KIND>(o, x, g, w, batch, k, eps, {p0, p1, s0, s1});                      \
    }

#define ALL_TILES(NT)                                                                              \
    TILES(project, NT, PLAIN)                                                                      \
    TILES(project_add, NT, ADD)                                                                    \
    TILES(project_gated, NT, GATED)

ALL_TILES(1)
ALL_TILES(2)
ALL_TILES(4)

#define PROJECTS(T, t, B)                                                                          \
    PROJECT(T, t, project, B, 4, PLAIN, 1)                                                         \
    PROJECT(T, t, project_add, B, 2, ADD, 5)                                                       \
    PROJECT(T, t, project_gated, B, (B > 4 ? 2 : 4), GATED, 1)

#define ATTEND(T, t, D)                                                                            \
    extern "C" __global__ void __launch_bounds__(LOOKERS) attend_##t##_##D(                        \
        T *o, const T *q, const T *k, const T *v, T *keys, T *values, const T *cos, const T *sin,  \
        const T *scale, const u32 *held, float *shares, u32 *done, u32 heads, u32 kv_heads,        \
        u32 capacity, u32 q_stride, u32 kv_stride) {                                               \
        attend<T, D>(o, q, k, v, keys, values, cos, sin, scale, held, shares, done, heads,         \
                     kv_heads, capacity, q_stride, kv_stride);                                     \
    }

#define ALL(T, t)                                                                                  \
    PROJECTS(T, t, 1)                                                                              \
    PROJECTS(T, t, 2)                                                                              \
    PROJECTS(T, t, 4)                                                                              \
    PROJECTS(T, t, 8)                                                                              \
    ATTEND(T, t, 8)                                                                                \
    ATTEND(T, t, 64)                                                                               \
    ATTEND(T, t, 128)                                                                              \
    extern "C" __global__ void embed_##t(T *x, const T *table, const u32 *ids, u32 width) {        \
        embed<T>(x, table, ids, width);                                                            \
    }                                                                                              \
    extern "C" __global__ void choose_##t(u32 *ids, u64 *chosen, u64 *best, u32 *held, u32 *done,  \
                                          const T *x, u32 width, u32 first) {                      \
        choose<T>(ids, chosen, best, held, done, x, width, first);                                 \
    }

ALL(float, f32)
ALL(bf16, bf16)
