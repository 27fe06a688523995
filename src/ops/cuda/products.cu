// Products with few rows, of which what counts is that every weight is read once, by many threads,
// with many loads under way: a block takes R rows of the weight and all B rows of the input, its
// threads split the summed dimension. What does not depend on the kernel before (the first weights)
// is fetched before waiting for it.
#include "tensor_cores.cuh"

#define THREADS PROJECT_THREADS

// What is multiplied by what, and what happens to the sums, each with its bias where there is one.
enum Kind {
    PLAIN = 0, // out = sum
    ADD = 1,   // out = out + sum
    GATED = 2, // out = activation of the sum with the first weight · sum with the second
};
template <int KIND> constexpr int SETS_OF = KIND == GATED ? 2 : 1;

// Row `r` of all weights, of k elements.
template <typename T>
__device__ __forceinline__ const T *row_of(const Weights<T> &w, u32 r, u32 k) {
    if (r < w.ends[0]) return w.weights[0] + (u64)r * k;
    if (r < w.ends[1]) return w.weights[1] + (u64)(r - w.ends[0]) * k;
    return w.weights[2] + (u64)(r - w.ends[1]) * k;
}
// What is added to the product of row `r` of all weights, or of weight `set` of a gated unit.
template <int KIND, typename T>
__device__ __forceinline__ float bias_of(const Weights<T> &w, int set, u32 r) {
    u32 first = 0;
    if constexpr (KIND != GATED) {
        if (r >= w.ends[0]) set = 1, first = w.ends[0];
        if (r >= w.ends[1]) set = 2, first = w.ends[1];
    }
    const T *b = set == 0 ? w.biases[0] : set == 1 ? w.biases[1] : w.biases[2];
    return b ? widen(b[r - first]) : 0.0f;
}

// A share, by each of `count` threads, of weights that a later kernel reads: fetched into the L2
// cache while this one leaves memory idle.
template <typename T>
__device__ __forceinline__ void fetch_ahead(const Ahead<T> (&all)[2], u32 thread, u32 count) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (const Ahead<T> &ahead : all) {
        u64 bytes = ahead.bytes, each = (bytes / count + 127) / 128 * 128, from = thread * each;
        if (from >= bytes) continue;
        const char *p = reinterpret_cast<const char *>(ahead.weight) + from;
        u32 size = (u32)(bytes - from < each ? bytes - from : each) & ~15u;
        if (size) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(size));
    }
#endif
}

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

// What becomes of a column's sums, for one row of the input, where `old` is there.
template <int KIND, typename T, int SETS = SETS_OF<KIND>>
__device__ __forceinline__ T finished(const float (&sums)[SETS], const float (&biases)[SETS],
                                      float old, bool gelu) {
    float y[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) y[s] = rounded<T>(rounded<T>(sums[s]) + biases[s]);
    if constexpr (KIND == GATED) return narrow<T>(rounded<T>(activated(y[0], gelu)) * y[1]);
    return narrow<T>(KIND == ADD ? old + y[0] : y[0]);
}

// out (batch, n) from x (batch, k), B rows at most; with a norm, x is normalized first.
// AHEAD packs of every row are under way at once.
template <typename T, int B, int R, int KIND, int AHEAD>
__device__ void project(const Project<T> &a) {
    constexpr int SETS = SETS_OF<KIND>, SUMS = SETS * R * B;
    const T *gain = KIND == ADD ? nullptr : a.norm.gain; // what is added is never normed
    u32 batch = a.batch, k = a.k, n = a.w.ends[2];
    u32 first = blockIdx.x * R;
    const T *rows[SETS * R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        u32 row = min(first + r, n - 1); // past the end: again the last, and dropped
        if constexpr (KIND == GATED) {
            rows[2 * r] = a.w.weights[0] + (u64)row * k;
            rows[2 * r + 1] = a.w.weights[1] + (u64)row * k;
        } else {
            rows[r] = row_of(a.w, row, k);
        }
    }
    let_next_start();
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
    if (threadIdx.x == 0) fetch_ahead(a.ahead, blockIdx.x, gridDim.x);
    wait_for_inputs();
    for (u32 start = threadIdx.x * 8; start < k; start += AHEAD * THREADS * 8) {
#pragma unroll
        for (int c = 0; c < AHEAD; c++) {
            u32 i = start + c * THREADS * 8;
            if (i >= k) break;
            float v[B][8];
#pragma unroll
            for (int b = 0; b < B; b++) load<8>(a.x + (u64)min(b, batch - 1) * k + i, v[b]);
            if (gain) {
                float g[8];
                load<8>(gain + i, g);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    g[j] += a.norm.shift;
#pragma unroll
                    for (int b = 0; b < B; b++) {
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
    // What the end reads is fetched meanwhile.
    u32 r = threadIdx.x / B, b = threadIdx.x % B, row = first + r;
    bool ends = r < R && b < batch && row < n;
    T *to = a.out + (u64)b * n + row;
    float biases[SETS] = {}, old = 0.0f;
    if (ends) {
#pragma unroll
        for (int s = 0; s < SETS; s++) biases[s] = bias_of<KIND>(a.w, s, row);
        if (KIND == ADD) old = widen(*to);
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
    if (!ends) return;
    auto total = [&](int i) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < WARPS; j++) sum += parts[j][i];
        return sum;
    };
    float inverse = gain ? rsqrtf(total(SUMS + b) / k + a.norm.eps) : 1.0f, all[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) all[s] = total((SETS * r + s) * B + b) * inverse;
    *to = finished<KIND, T>(all, biases, old, a.gelu);
}

// `project` for NT tiles of rows of the input at most, in bf16 by the tensor cores: the weight's
// rows are the rows of a tile, the input's its columns. A block takes one tile of the weight (of
// each, if gated); its warps take turns along the summed dimension, 32 elements at a time, of which a
// lane loads 8 that lie together. The order in which a tile sums them is of no account, so these
// serve as what the instruction calls elements 2t, 2t + 1, 2t + 8 and 2t + 9 of two tiles.
template <int NT, int KIND> __device__ void project_tiles(const Project<bf16> &a) {
    static_assert(TILE_ROWS == 16 && TILE_COLUMNS == 8, "as the instruction takes them");
    constexpr int SETS = SETS_OF<KIND>, TURNS = 4;
    const bf16 *gain = KIND == ADD ? nullptr : a.norm.gain;
    u32 batch = a.batch, k = a.k, height = a.w.ends[2];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 first = blockIdx.x * TILE_ROWS;
    const bf16 *rows[SETS][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 row = min(first + half * 8 + g, height - 1);
        if constexpr (KIND == GATED) {
            rows[0][half] = a.w.weights[0] + (u64)row * k;
            rows[1][half] = a.w.weights[1] + (u64)row * k;
        } else {
            rows[0][half] = row_of(a.w, row, k);
        }
    }
    let_next_start();
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
    if (threadIdx.x == 0) fetch_ahead(a.ahead, blockIdx.x, gridDim.x);
    wait_for_inputs();

    float sums[SETS][NT][4] = {}, squares[NT] = {};
    for (; start - t * 8 < k; start += TURNS * TILE_WARPS * 32) {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            u32 i = start + turn * TILE_WARPS * 32;
            float gains[8];
            if (gain && i < k) {
                load<8>(gain + i, gains);
#pragma unroll
                for (int j = 0; j < 8; j++) gains[j] += a.norm.shift;
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                u32 row = n * 8 + g;
                uint4 pack = {};
                if (row < batch && i < k)
                    pack = *reinterpret_cast<const uint4 *>(a.x + (u64)row * k + i);
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
                    const uint4 &top = weights[turn][s][0], &low = weights[turn][s][1];
                    const u32 one[4] = {top.x, low.x, top.y, low.y}, two[4] = {top.z, low.z, top.w, low.w};
                    mma(sums[s][n], one, pack.x, pack.y);
                    mma(sums[s][n], two, pack.z, pack.w);
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
    float biases[2][SETS], old[NT][4] = {}, inverse[NT][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 row = min(first + g + half * 8, height - 1);
#pragma unroll
        for (int s = 0; s < SETS; s++) biases[half][s] = bias_of<KIND>(a.w, s, row);
    }
    auto each = [&](auto f) { // a sum's place in the output, its tile, its place in that
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 b = n * 8 + 2 * t + j % 2, row = first + g + j / 2 * 8;
                if (b < batch && row < height) f(a.out + (u64)b * height + row, n, j);
            }
        }
    };
    if (KIND == ADD) each([&](bf16 *to, int n, int j) { old[n][j] = widen(*to); });
#pragma unroll
    for (int i = 0; i < NT * 2; i++) {
        float sum = 0.0f;
        if (gain) {
#pragma unroll
            for (int w = 0; w < TILE_WARPS; w++) sum += of_squares[w][i / 2 * 8 + 2 * t + i % 2];
        }
        inverse[i / 2][i % 2] = gain ? rsqrtf(sum / k + a.norm.eps) : 1.0f;
    }
    bf16 y[NT][4];
#pragma unroll
    for (int i = 0; i < NT * 4; i++) {
        int n = i / 4, j = i % 4;
        float all[SETS];
#pragma unroll
        for (int s = 0; s < SETS; s++) all[s] = sums[s][n][j] * inverse[n][j % 2];
        y[n][j] = finished<KIND, bf16>(all, biases[j / 2], old[n][j], a.gelu);
    }
    each([&](bf16 *to, int n, int j) { *to = y[n][j]; });
}

// What adapters add to up to three products: to columns of each output scaling · low · Bᵀ, each
// from its own `rank` columns of low (batch, columns). Blocks (columns of all, row).
template <typename T> __device__ void adapt(const Adapt<T> &a) {
    wait_for_inputs();
    let_next_start();
    u32 i = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y, rank = a.rank;
    const u32(&ends)[3] = a.w.ends;
    if (i >= ends[2]) return;
    u32 which = i < ends[0] ? 0 : i < ends[1] ? 1 : 2;
    const T *x = a.low + (u64)row * a.columns + which * rank, *w = row_of(a.w, i, rank);
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
    T *to = which == 0   ? a.outs[0] + (u64)row * a.strides[0] + i
            : which == 1 ? a.outs[1] + (u64)row * a.strides[1] + (i - ends[0])
                         : a.outs[2] + (u64)row * a.strides[2] + (i - ends[1]);
    *to = narrow<T>(widen(*to) + rounded<T>(rounded<T>(sum) * widen(*a.scaling)));
}

// ---- what the host calls: NAME_TYPE_B, or NAME_tiles_TYPE_NT ------------------------------------

#define PROJECT(NAME, KIND, T, t, B, R, AHEAD)                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_##t##_##B(Project<T> a) {         \
        project<T, B, R, KIND, AHEAD>(a);                                                          \
    }

#define TILE(NAME, KIND, NT)                                                                       \
    extern "C" __global__ void __launch_bounds__(TILE_WARPS * 32)                                  \
        NAME##_tiles_bf16_##NT(Project<bf16> a) {                                                  \
        project_tiles<NT, KIND>(a);                                                                \
    }

#define ALL(T, t)                                                                                  \
    PROJECT_SHAPES(PROJECT, project, PLAIN, T, t)                                                  \
    PROJECT_ADD_SHAPES(PROJECT, project_add, ADD, T, t)                                            \
    PROJECT_GATED_SHAPES(PROJECT, project_gated, GATED, T, t)                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) adapt_##t(Adapt<T> a) { adapt<T>(a); }

ALL(float, f32)
ALL(bf16, bf16)
TILES(TILE, project, PLAIN)
TILES(TILE, project_add, ADD)
TILES(TILE, project_gated, GATED)
