// Gradients that are sums over rows: of an embedding, of a norm's gain, of a bias. Sums are in f32,
// and always in the same order.
#include "common.cuh"

// Of each id, the sum of dy's rows with that id, in their order, into the table's row. The block of
// the id's first row does it; N columns a thread.
template <typename T, int N> __device__ void embed_grad(const EmbedGrad<T> &a) {
    constexpr int THREADS = EMBED_GRAD_THREADS, WARPS = THREADS / 32;
    __shared__ u32 same[THREADS], of_warp[WARPS];
    u32 row = blockIdx.x, id = a.ids[row];
    bool is_before = false;
    for (u32 i = threadIdx.x; i < row; i += THREADS) is_before |= a.ids[i] == id;
    if (__syncthreads_or(is_before)) return;

    u32 column = (blockIdx.y * THREADS + threadIdx.x) * N;
    bool has_columns = column < a.width;
    const T *dy = a.dy + column;
    float sum[N];
    if (has_columns) load<N>(dy + (u64)row * a.width, sum);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 start = row + 1; start < a.rows; start += THREADS) {
        u32 i = start + threadIdx.x;
        bool is_same = i < a.rows && a.ids[i] == id;
        u32 found = __ballot_sync(~0u, is_same);
        if (lane == 0) of_warp[warp] = __popc(found);
        int all = __syncthreads_count(is_same);
        if (all == 0) continue;
        // As a list, so that several of its rows are on their way at once.
        if (is_same) {
            u32 place = __popc(found & ((1u << lane) - 1));
            for (u32 w = 0; w < warp; w++) place += of_warp[w];
            same[place] = i;
        }
        __syncthreads();
        if (has_columns) {
#pragma unroll 4
            for (int k = 0; k < all; k++) {
                float v[N];
                load<N>(dy + (u64)same[k] * a.width, v);
#pragma unroll
                for (int j = 0; j < N; j++) sum[j] += v[j];
            }
        }
        __syncthreads(); // the list has been read
    }
    if (has_columns) store<N>(a.table + (u64)id * a.width + column, sum);
}

// Over THREADS neighbours; every one of them gets the result.
template <int THREADS> __device__ __forceinline__ float sum_over(float v) {
    if constexpr (THREADS >= 32) {
        v = reduce<Sum, THREADS>(v);
    } else {
#pragma unroll
        for (int mask = THREADS / 2; mask > 0; mask >>= 1) v += __shfl_xor_sync(~0u, v, mask);
    }
    return v;
}

// A part of the sum over rows, one a block: of dy, or of dy · x · i, i = 1 / sqrt(mean(x²) + eps).
// A row has THREADS threads, each up to K packs of N elements; a block goes on in steps of all.
template <bool NORMED, typename T, int N, int K, int THREADS>
__device__ void sum_rows(const SumRows<T> &a) {
    constexpr int ROWS = SUM_THREADS / THREADS;
    int lane = threadIdx.x % THREADS;
    auto at = [&](int k) { return (u32)(k * THREADS + lane) * N; };
    float sums[K][N] = {};
    for (u64 first = (u64)blockIdx.x * ROWS; first < a.rows; first += (u64)gridDim.x * ROWS) {
        u64 row = first + threadIdx.x / THREADS;
        bool is_row = row < a.rows;
        float d[K][N], x[K][N], squares = 0.0f;
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (!is_row || at(k) >= a.width) continue;
            load<N>(a.dy + row * a.width + at(k), d[k]);
            if constexpr (NORMED) {
                load<N>(a.x + row * a.width + at(k), x[k]);
#pragma unroll
                for (int j = 0; j < N; j++) squares += x[k][j] * x[k][j];
            }
        }
        float inverse = 1.0f;
        if constexpr (NORMED) {
            inverse = 1.0f / sqrtf(sum_over<THREADS>(squares) / a.width + a.eps);
        }
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (!is_row || at(k) >= a.width) continue;
#pragma unroll
            for (int j = 0; j < N; j++) {
                if constexpr (NORMED) d[k][j] *= x[k][j] * inverse;
                sums[k][j] += d[k][j];
            }
        }
    }

    float *part = a.parts + (u64)blockIdx.x * a.width;
    if constexpr (THREADS > 32) {
        // The block has one row at a time: its threads' sums are the block's.
#pragma unroll
        for (int k = 0; k < K; k++)
            if (at(k) < a.width) store<N>(part + at(k), sums[k]);
    } else {
        __shared__ float of_warps[SUM_THREADS / 32][K * N * THREADS];
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                float sum = sums[k][j];
#pragma unroll
                for (int rows = THREADS; rows < 32; rows *= 2) {
                    sum += __shfl_xor_sync(~0u, sum, rows);
                }
                if (threadIdx.x % 32 < THREADS) of_warps[threadIdx.x / 32][at(k) + j] = sum;
            }
        }
        __syncthreads();
        for (u32 column = threadIdx.x; column < a.width; column += SUM_THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (int warp = 0; warp < SUM_THREADS / 32; warp++) sum += of_warps[warp][column];
            part[column] = sum;
        }
    }
}

// The sum of all blocks' parts: a warp for every so many of them, a lane for each column.
template <typename T> __device__ void sum_parts(const SumParts<T> &a) {
    constexpr int WARPS = SUM_PARTS_THREADS / SUM_COLUMNS;
    u32 lane = threadIdx.x % SUM_COLUMNS, warp = threadIdx.x / SUM_COLUMNS;
    u32 column = blockIdx.x * SUM_COLUMNS + lane;
    float sum = 0.0f;
    if (column < a.width) {
#pragma unroll 8
        for (u32 row = warp; row < a.rows; row += WARPS) {
            sum += a.parts[(u64)row * a.width + column];
        }
    }
    __shared__ float sums[WARPS][SUM_COLUMNS];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= a.width) return;
#pragma unroll
    for (int w = 1; w < WARPS; w++) sum += sums[w][lane];
    a.out[column] = narrow<T>(sum);
}

// ---- what the host calls: NAME_TYPE, NAME_TYPE_N, or NAME_TYPE_N_K_THREADS ----------------------

#define PACKED(T, t, N)                                                                            \
    extern "C" __global__ void __launch_bounds__(EMBED_GRAD_THREADS)                               \
        embed_grad_##t##_##N(EmbedGrad<T> a) {                                                     \
        embed_grad<T, N>(a);                                                                       \
    }

#define SUMS(T, t, N, K, THREADS, NAME, NORMED)                                                    \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS)                                      \
        NAME##_##t##_##N##_##K##_##THREADS(SumRows<T> a) {                                         \
        sum_rows<NORMED, T, N, K, THREADS>(a);                                                     \
    }

#define ROWS_OF(T, t, N, K, THREADS)                                                               \
    SUMS(T, t, N, K, THREADS, sum_rows, false)                                                     \
    SUMS(T, t, N, K, THREADS, gain_grad, true)

#define ALL(T, t)                                                                                  \
    PACKS(PACKED, T, t)                                                                            \
    SUM_SHAPES(ROWS_OF, T, t)                                                                      \
    extern "C" __global__ void __launch_bounds__(SUM_PARTS_THREADS) sum_parts_##t(                 \
        SumParts<T> a) {                                                                           \
        sum_parts<T>(a);                                                                           \
    }

ALL(float, f32)
ALL(bf16, bf16)
