// Products with few rows, of which what counts is that every weight is read once, by many threads,
// with many loads under way: a block takes R rows of the weight and all B rows of the input, its
// threads split the summed dimension. What does not depend on the kernel before (the first weights)
// is fetched before waiting for it.
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

// What adapters add to up to three products: to o0, o1, o2, whose rows are `stride` apart,
// scaling · low · Bᵀ, each from its own `rank` columns of low (batch, columns). Blocks (columns of
// all, row).
template <typename T>
__device__ void adapt(T *o0, T *o1, T *o2, const T *low, Weights<T> b, const T *scaling, u32 stride,
                      u32 columns, u32 rank) {
    wait_for_inputs();
    let_next_start();
    u32 i = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    if (i >= b.n) return;
    u32 which = i < b.n0 ? 0 : i < b.n01 ? 1 : 2;
    const T *x = low + (u64)row * columns + which * rank, *w = b.row(i, rank);
    float sum = 0.0f;
    if (rank % 8 == 0) {
        for (u32 r = 0; r < rank; r += 8) {
            float v[8], u[8];
            load<8>(x + r, v), load<8>(w + r, u);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += v[j] * u[j];
        }
    } else {
        for (u32 r = 0; r < rank; r++) sum += widen(x[r]) * widen(w[r]);
    }
    T *to = which == 0 ? o0 + i : which == 1 ? o1 + (i - b.n0) : o2 + (i - b.n01);
    to += (u64)row * stride;
    *to = narrow<T>(widen(*to) + rounded<T>(rounded<T>(sum) * widen(*scaling)));
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

#define ALL(T, t)                                                                                  \
    PROJECTS(T, t, 1)                                                                              \
    PROJECTS(T, t, 2)                                                                              \
    PROJECTS(T, t, 4)                                                                              \
    PROJECTS(T, t, 8)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) adapt_##t(                               \
        T *o0, T *o1, T *o2, const T *low, const T *b0, const T *b1, const T *b2, u32 n0, u32 n01, \
        u32 n, const T *scaling, u32 stride, u32 columns, u32 rank) {                              \
        Weights<T> b = {b0, b1, b2, nullptr, nullptr, nullptr, n0, n01, n};                        \
        adapt<T>(o0, o1, o2, low, b, scaling, stride, columns, rank);                              \
    }

ALL(float, f32)
ALL(bf16, bf16)
