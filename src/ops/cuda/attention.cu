// Attention of whole sequences in bf16 by the tensor cores: scores, mask, softmax and mixed values
// of a tile at a time, so that scores never go to memory. Dense attention computes all of them, also
// those that the causal mask then takes to −∞: it is what the same ops one by one do. Blocked
// attention leaves out the blocks that the mask or the window hides from a whole block of queries.
//
// A block takes query rows of one head, a warp 16 · MT of them; keys and values come in
// tiles of BN tokens, the next one fetched while this one is worked on. A row's maximum and sum run
// along; what has been summed shrinks whenever the maximum grows.
#include "attention_grad_wide.cuh"

// out (batch, seq, heads · D) from q (batch, heads, seq, D), scaled already, and keys and values
// (batch, kv_heads, …, D), of which each head has `held` tokens and begins `stride` elements after
// the one before. The queries are the last `seq` of these tokens; each sees no token after its own
// and none before its window. Where `highest` is given, it and `sums` (batch, heads, seq) keep each
// row's maximum and sum.
template <int D, int MT, int BN, int WARPS, bool WINDOWED, bool BLOCKED>
__device__ void attention(const Attention<bf16> &a) {
    constexpr int THREADS = WARPS * 32;
    constexpr int CHUNKS = D / 8; // of 16 bytes in a row
    __shared__ __align__(128) bf16 tiles[2][2][BN * D]; // [buffer][keys, values]
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 head = blockIdx.y, b = blockIdx.z;
    u32 seq = a.seq, held = a.held, heads = a.heads;
    // Of blocks, the longest come first.
    u32 tile = BLOCKED ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    u32 first = (tile * WARPS + warp) * 16 * MT;
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
    // What this warp reaches, and what any of this block does.
    Reach reach(min(first, seq - 1), seq, held, a.window);
    u32 begin = 0, end = held;
    if constexpr (BLOCKED) {
        u32 row = tile * WARPS * 16 * MT;
        begin = Reach(row, seq, held, a.window).begin;
        row = min(row + WARPS * 16 * MT, seq) - 1;
        end = Reach(row, seq, held, a.window).end;
    }
    fetch(0, begin);

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

    for (u32 from = begin, buffer = 0; from < end; from += BN, buffer ^= 1) {
        if (from + BN < end) {
            fetch(buffer ^ 1, from + BN);
            asm volatile("cp.async.wait_group 1;");
        } else {
            asm volatile("cp.async.wait_group 0;");
        }
        __syncthreads();
        if (BLOCKED && !reach.has(from)) {
            __syncthreads(); // before this buffer is filled anew
            continue;
        }

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
                if (!BLOCKED || reach.masks(from)) {
#pragma unroll
                    for (int n = 0; n < BN / 8; n++) {
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            u32 token = from + n * 8 + 2 * t + j;
                            bool sees = WINDOWED ? seen.has(token) : token < own;
                            scores[m][n][half * 2 + j] += sees ? 0.0f : -INFINITY;
                        }
                    }
                }
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
                    top = fmaxf(top, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
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
            if (a.highest && t == 0) {
                u64 at = ((u64)b * heads + head) * seq + row;
                a.highest[at] = max[m][half];
                a.sums[at] = total;
            }
            bf16 *p = a.out + (((u64)b * seq + row) * heads + head) * D + 2 * t;
#pragma unroll
            for (int d = 0; d < D / 8; d++)
                *reinterpret_cast<u32 *>(p + d * 8) = packed(mixed[m][d][half * 2] * inverse,
                                                             mixed[m][d][half * 2 + 1] * inverse);
        }
    }
}

// dots (batch, heads, seq): of each row of out (batch, seq, heads · D) and its gradient dy, laid out
// alike, Σ out · dy.
template <int D> __device__ void attention_dots(const AttentionDots<bf16> &a) {
    constexpr int THREADS = D / 8; // of a row
    u64 row = (u64)blockIdx.x * (ELEMENT_THREADS / THREADS) + threadIdx.x / THREADS;
    if (row >= a.rows) return; // whole groups of THREADS
    float x[8], y[8], sum = 0.0f;
    load<8>(a.out + row * D + threadIdx.x % THREADS * 8, x);
    load<8>(a.dy + row * D + threadIdx.x % THREADS * 8, y);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += x[j] * y[j];
    u32 group = threadIdx.x % 32 / THREADS * THREADS, mask = ((1u << THREADS) - 1) << group;
#pragma unroll
    for (int step = THREADS / 2; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
    u64 head = row % a.heads, token = row / a.heads;
    if (threadIdx.x % THREADS == 0)
        a.dots[(token / a.seq * a.heads + head) * a.seq + token % a.seq] = sum;
}

// Gradients of blocked attention, those that are not null: a block takes ATTENTION_BLOCK keys of one
// query head and goes over the queries that reach them, BM at a time; scores and weights are computed
// again from the kept maxima and sums. A warp has 16 keys and keeps their dk and dv in registers; dq
// goes to memory tile by tile. All three are f32 sums that begin at 0: several blocks add to each.
//
// With P = exp(s − max) / sum, dP = dy · vᵀ and dS = P ∘ (dP − dots): dv = Pᵀ · dy, dk = dSᵀ · q,
// dq = dS · k. What is computed here has keys as rows, so Pᵀ and dSᵀ.
template <int D, int BM, bool WINDOWED>
__device__ void attention_grad(const AttentionGrad<bf16> &a) {
    constexpr int THREADS = ATTENTION_WARPS * 32, BN = ATTENTION_BLOCK;
    static_assert(BN == ATTENTION_WARPS * 16, "a warp has 16 keys");
    constexpr int CHUNKS = D / 8;                  // of 16 bytes in a row
    constexpr int SHARERS = ATTENTION_WARPS * 16 / BM; // warps that share 16 queries of dq
    constexpr int COLUMNS = D / SHARERS;           // of dq that a warp has
    extern __shared__ __align__(128) bf16 shared[];
    bf16 *const keys = shared, *const values = keys + BN * D;
    bf16 *const queries = values + BN * D, *const dys = queries + 2 * BM * D; // two tiles of each
    bf16 *const slopes = dys + 2 * BM * D;                                    // dSᵀ
    float *const kept = reinterpret_cast<float *>(slopes + BN * BM); // [2][max, 1 / sum, dots][BM]
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 head = blockIdx.y, b = blockIdx.z, from = blockIdx.x * BN;
    u32 seq = a.seq, held = a.held, heads = a.heads;
    u64 of_keys = (u64)b * a.kv_heads + head / (heads / a.kv_heads), of_queries = (u64)b * heads + head;

    auto place = [&](const bf16 *tile, u32 row, u32 chunk) {
        return (u32)__cvta_generic_to_shared(tile + row * D + (chunk ^ (row & 7)) * 8);
    };
    // The same of dSᵀ, whose rows are BM wide.
    auto slope = [&](u32 key, u32 chunk) {
        u32 swap = BM == 64 ? key & 7 : key >> 1 & 3;
        return slopes + key * BM + (chunk ^ swap) * 8;
    };
    auto fetch = [&](bf16 *tile, const bf16 *rows, u64 stride, int n, u32 first, u32 all) {
        for (int i = threadIdx.x; i < n * CHUNKS; i += THREADS) {
            u32 row = i / CHUNKS, chunk = i % CHUNKS;
            bool there = first + row < all;
            copy_async(place(tile, row, chunk), rows + (there ? first + row : 0) * stride + chunk * 8,
                       there);
        }
    };
    auto fetch_queries = [&](int buffer, u32 first) {
        fetch(queries + buffer * BM * D, a.q + of_queries * seq * D, D, BM, first, seq);
        fetch(dys + buffer * BM * D, a.dy + ((u64)b * seq * heads + head) * D, (u64)heads * D, BM,
              first, seq);
        asm volatile("cp.async.commit_group;");
        float *to = kept + buffer * 3 * BM;
        for (int i = threadIdx.x; i < BM; i += THREADS) {
            bool there = first + i < seq;
            u64 at = of_queries * seq + first + i;
            to[i] = there ? a.highest[at] * LOG2_E : INFINITY; // a weight of 0
            to[BM + i] = there ? 1.0f / a.sums[at] : 0.0f;
            to[2 * BM + i] = there && a.dots ? a.dots[at] : 0.0f;
        }
    };

    // The queries that reach these keys are whole blocks, but for the last.
    u32 begin = 0, end = seq;
    while (begin < seq && !Reach(begin, seq, held, a.window).has(from)) begin += BN;
    if (WINDOWED)
        while (end > begin && !Reach(end - 1, seq, held, a.window).has(from)) end = (end - 1) / BN * BN;
    if (begin >= end) return;
    fetch(keys, a.keys + of_keys * a.stride, D, BN, from, held);
    fetch(values, a.values + of_keys * a.stride, D, BN, from, held);
    fetch_queries(0, begin);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};

    for (u32 first = begin, buffer = 0; first < end; first += BM, buffer ^= 1) {
        asm volatile("cp.async.wait_group 0;");
        __syncthreads();
        if (first + BM < end) fetch_queries(buffer ^ 1, first + BM);
        const bf16 *q = queries + buffer * BM * D, *dy = dys + buffer * BM * D;
        const float *top = kept + buffer * 3 * BM, *inverse = top + BM, *dots = inverse + BM;

        // rows (16 keys of this warp) · columnsᵀ (BM queries)
        auto by_query = [&](float(&out)[BM / 8][4], const bf16 *rows, const bf16 *columns) {
#pragma unroll
            for (int s = 0; s < D / 32; s++) {
                u32 x[4], y[4];
                ldmatrix(x, place(rows, warp * 16 + lane % 16, s * 4 + lane / 16));
                ldmatrix(y, place(rows, warp * 16 + lane % 16, s * 4 + 2 + lane / 16));
#pragma unroll
                for (int n = 0; n < BM / 8; n++) {
                    u32 r[4];
                    ldmatrix(r, place(columns, n * 8 + lane % 8, s * 4 + lane / 8));
                    mma(out[n], x, r[0], r[1]);
                    mma(out[n], y, r[2], r[3]);
                }
            }
        };
        // sum (16 keys, D) += x (16 keys, BM queries) · rows (BM queries, D)
        auto by_column = [&](float(&sum)[D / 8][4], const float(&x)[BM / 8][4], const bf16 *rows) {
#pragma unroll
            for (int s = 0; s < BM / 16; s++) {
                const float(&l)[4] = x[2 * s], (&h)[4] = x[2 * s + 1];
                u32 left[4] = {packed(l[0], l[1]), packed(l[2], l[3]), packed(h[0], h[1]),
                               packed(h[2], h[3])};
#pragma unroll
                for (int d = 0; d < D / 16; d++) {
                    u32 r[4];
                    ldmatrix_transposed(r, place(rows, s * 16 + lane % 16, d * 2 + lane / 16));
                    mma(sum[2 * d], left, r[0], r[1]);
                    mma(sum[2 * d + 1], left, r[2], r[3]);
                }
            }
        };
        float weights[BM / 8][4] = {};
        by_query(weights, keys, q);
        bool masked = Reach(first, seq, held, a.window).masks(from);
#pragma unroll
        for (int n = 0; n < BM / 8; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 column = n * 8 + 2 * t + j % 2, token = from + warp * 16 + g + j / 2 * 8;
                float &x = weights[n][j];
                if (masked) {
                    u32 own = min(held - seq + first + column + 1, held);
                    Seen seen(own, a.window);
                    x += (WINDOWED ? seen.has(token) : token < own) ? 0.0f : -INFINITY;
                }
                asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x * LOG2_E - top[column]));
                x *= inverse[column];
            }
        }
        if (a.dv) by_column(dv, weights, dy);
        if (!a.dots) continue; // neither dq nor dk
        float ds[BM / 8][4] = {};
        by_query(ds, values, dy);
#pragma unroll
        for (int n = 0; n < BM / 8; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++)
                ds[n][j] = weights[n][j] * (ds[n][j] - dots[n * 8 + 2 * t + j % 2]);
        }
        if (a.dk) by_column(dk, ds, q);
        if (!a.dq) continue;
#pragma unroll
        for (int n = 0; n < BM / 8; n++) {
            u32 key = warp * 16 + g;
            *reinterpret_cast<u32 *>(slope(key, n) + 2 * t) = packed(ds[n][0], ds[n][1]);
            *reinterpret_cast<u32 *>(slope(key + 8, n) + 2 * t) = packed(ds[n][2], ds[n][3]);
        }
        __syncthreads();
        // 16 queries, and COLUMNS of them.
        u32 group = warp / SHARERS, column = warp % SHARERS * COLUMNS;
        float dq[COLUMNS / 8][4] = {};
#pragma unroll
        for (int s = 0; s < BN / 16; s++) {
            u32 left[4];
            const bf16 *p = slope(s * 16 + lane / 16 * 8 + lane % 8, group * 2 + lane / 8 % 2);
            ldmatrix_transposed(left, (u32)__cvta_generic_to_shared(p));
#pragma unroll
            for (int d = 0; d < COLUMNS / 16; d++) {
                u32 r[4];
                ldmatrix_transposed(r, place(keys, s * 16 + lane % 16, column / 8 + d * 2 + lane / 16));
                mma(dq[2 * d], left, r[0], r[1]);
                mma(dq[2 * d + 1], left, r[2], r[3]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 row = first + group * 16 + half * 8 + g;
            if (row >= seq) continue;
            float *p = a.dq + (of_queries * seq + row) * D + column + 2 * t;
#pragma unroll
            for (int d = 0; d < COLUMNS / 8; d++)
                add_two(p + d * 8, dq[d][half * 2], dq[d][half * 2 + 1]);
        }
    }
    auto add_keys = [&](float *to, const float(&sum)[D / 8][4]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 key = from + warp * 16 + half * 8 + g;
            if (key >= held) continue;
            float *p = to + (of_keys * held + key) * D + 2 * t;
#pragma unroll
            for (int d = 0; d < D / 8; d++) add_two(p + d * 8, sum[d][half * 2], sum[d][half * 2 + 1]);
        }
    };
    if (a.dk) add_keys(a.dk, dk);
    if (a.dv) add_keys(a.dv, dv);
}

#define ATTENTION(NAME, WINDOWED, T, t, D, MT, BN)                                                 \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32)                             \
        NAME##_##t##_##D(Attention<T> a) {                                                         \
        attention<D, MT, BN, ATTENTION_WARPS, WINDOWED, false>(a);                                 \
    }

ATTENTION_SHAPES(ATTENTION, attention, false, bf16, bf16)
ATTENTION_SHAPES(ATTENTION, attention_windowed, true, bf16, bf16)

#define BLOCKED(NAME, WINDOWED, T, t, D, MT, BN)                                                   \
    extern "C" __global__ void __launch_bounds__(ATTENTION_BLOCKED_WARPS * 32, D == 64 ? 2 : 1)    \
        NAME##_##t##_##D(Attention<T> a) {                                                         \
        attention<D, 1, BN, ATTENTION_BLOCKED_WARPS, WINDOWED, true>(a);                                                   \
    }

ATTENTION_SHAPES(BLOCKED, attention_blocked, false, bf16, bf16)
ATTENTION_SHAPES(BLOCKED, attention_blocked_windowed, true, bf16, bf16)

#define GRADIENTS(T, t, D, BM)                                                                     \
    extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS)                                  \
        attention_dots_##t##_##D(AttentionDots<T> a) {                                             \
        attention_dots<D>(a);                                                                      \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, 2)                          \
        attention_grad_##t##_##D(AttentionGrad<T> a) {                                             \
        attention_grad<D, BM, false>(a);                                                           \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, 2)                          \
        attention_grad_windowed_##t##_##D(AttentionGrad<T> a) {                                    \
        attention_grad<D, BM, true>(a);                                                            \
    }

ATTENTION_GRAD_SHAPES(GRADIENTS, bf16, bf16)

#ifdef HAS_WARPGROUPS
#define WIDE(NAME, WINDOWED, BLOCKED, T, t, D, GROUPS)                                             \
    extern "C" __global__ void __launch_bounds__(GROUPS * 128, GROUPS == 2 ? 2 : 1)                \
        NAME##_##t##_##D(Attention<T> a) {                                                         \
        attention_wide<D, GROUPS, WINDOWED, BLOCKED>(a);                                           \
    }

ATTENTION_WIDE_SHAPES(WIDE, attention_wide, false, false, bf16, bf16)
ATTENTION_WIDE_SHAPES(WIDE, attention_wide_windowed, true, false, bf16, bf16)
ATTENTION_WIDE_SHAPES(WIDE, attention_wide_blocked, false, true, bf16, bf16)
ATTENTION_WIDE_SHAPES(WIDE, attention_wide_blocked_windowed, true, true, bf16, bf16)

#define WIDE_GRADIENTS(NAME, WINDOWED, T, t, D, GROUPS)                                            \
    extern "C" __global__ void __launch_bounds__(128, D == 64 ? 3 : 2) NAME##_##t##_##D(           \
        AttentionGrad<T> a) {                                                                      \
        attention_grad_wide<D, WINDOWED>(a);                                                       \
    }

ATTENTION_WIDE_SHAPES(WIDE_GRADIENTS, attention_grad_wide, false, bf16, bf16)
ATTENTION_WIDE_SHAPES(WIDE_GRADIENTS, attention_grad_wide_windowed, true, bf16, bf16)
#endif
