// Attention of whole sequences by warpgroups' products, on Hopper: the twin of `attention` in
// attention.cu, with 64 queries a warpgroup.
#pragma once
#include "reach.cuh"
#include "warpgroups.cuh"

#ifdef HAS_WARPGROUPS

// A warpgroup's 64 queries of one head: weighted values so far, and each row's maximum and sum. A
// thread has rows `g` and `g + 8` of its warp's 16.
template <int D> struct Mixed {
    float values[D / 2] = {}, max[2] = {NONE, NONE}, sum[2] = {};

    // Scores become weights, and what there is so far shrinks to the new maximum.
    template <int N> __device__ __forceinline__ void weigh(float (&scores)[N]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = max[half];
#pragma unroll
            for (int n = 0; n < N / 4; n++)
                top = fmaxf(top, fmaxf(scores[n * 4 + half * 2], scores[n * 4 + half * 2 + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            float shrink = exp2f((max[half] - top) * LOG2_E), minus = -top * LOG2_E, part = 0.0f;
            max[half] = top;
#pragma unroll
            for (int n = 0; n < N / 4; n++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &x = scores[n * 4 + half * 2 + j];
                    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x * LOG2_E + minus));
                    part += x;
                }
            }
            sum[half] = sum[half] * shrink + part;
#pragma unroll
            for (int d = 0; d < D / 8; d++)
                values[d * 4 + half * 2] *= shrink, values[d * 4 + half * 2 + 1] *= shrink;
        }
    }
};

// How many blocks of keys are looked at together.
struct One {
    static constexpr int BLOCKS = 1;
};
struct Two {
    static constexpr int BLOCKS = 2;
};

// As `attention`. Keys and values come in tiles of two blocks, the next tile fetched while this one is
// worked on; of a tile of which a warpgroup reaches one block alone, it computes that one.
template <int D, int GROUPS, bool WINDOWED, bool BLOCKED>
__device__ void attention_wide(const Attention<bf16> &a) {
    constexpr int THREADS = GROUPS * 128, BLOCK = ATTENTION_BLOCK, BN = 2 * BLOCK, CHUNKS = D / 8;
    constexpr u32 TILE = BN * D * 2, QUERIES = BLOCK * D * 2; // bytes
    static_assert(BLOCK == 64, "a warpgroup's queries are a block");
    extern __shared__ __align__(1024) char panels[]; // queries; two times keys and values
    int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    int g = lane / 4, t = lane % 4;
    u32 base = (u32)__cvta_generic_to_shared(panels), ring = base + GROUPS * QUERIES;
    u32 queries = base + group * QUERIES;
    u32 head = blockIdx.y, b = blockIdx.z, seq = a.seq, held = a.held, heads = a.heads;
    // Of blocks, the longest come first.
    u32 start = (BLOCKED ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * GROUPS * BLOCK;
    u32 first = start + group * BLOCK;
    const bf16 *k = a.keys + ((u64)b * a.kv_heads + head / (heads / a.kv_heads)) * a.stride;
    const bf16 *v = a.values + (k - a.keys);

    // By `threads` threads, rows from `row` on to a tile of N rows; zeros where there are none.
    auto fetch_rows = [&](u32 to, auto n, const bf16 *rows, u32 row, u32 all, int threads) {
        constexpr int N = decltype(n)::BLOCKS * BLOCK;
#pragma unroll
        for (int i = threadIdx.x % threads; i < N * CHUNKS; i += threads) {
            u32 at = i / CHUNKS, chunk = i % CHUNKS;
            bool there = row + at < all;
            const bf16 *from = rows + (there ? (u64)(row + at) * D + chunk * 8 : 0);
            copy_async(to + chunk_at(N, at, chunk), from, there);
        }
    };
    // What this warpgroup reaches, and what any of this block of threads does.
    Reach reach(min(first, seq - 1), seq, held, a.window);
    u32 begin = 0, end = held;
    if constexpr (BLOCKED) {
        begin = Reach(start, seq, held, a.window).begin;
        end = Reach(min(start + GROUPS * BLOCK, seq) - 1, seq, held, a.window).end;
    }
    auto fetch = [&](u32 from) {
        u32 to = ring + (from - begin) / BN % 2 * 2 * TILE;
        if (from < end) {
            fetch_rows(to, Two(), k, from, held, THREADS);
            fetch_rows(to + TILE, Two(), v, from, held, THREADS);
        }
        asm volatile("cp.async.commit_group;");
    };
    fetch_rows(queries, One(), a.q + ((u64)b * heads + head) * seq * D, first, seq, 128);
    fetch(begin);

    Mixed<D> mixed;
    auto look = [&](auto count, u32 keys, u32 from) {
        constexpr int N = decltype(count)::BLOCKS * 32; // scores of a thread
        float scores[N];
        begin_products();
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            u64 query = tile_at(queries + s / 4 * (BLOCK * 128) + s % 4 * 32);
            u64 key = tile_at(keys + s / 4 * (BN * 128) + s % 4 * 32);
            if (s == 0)
                multiply(scores, query, key);
            else
                add_product(scores, query, key);
        }
        end_products(scores);
        // Of two blocks, the later one is masked by its causal end, the earlier one by its window.
        if (!BLOCKED || reach.masks(from) || (N == 64 && reach.masks(from + BLOCK))) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 row = first + warp * 16 + half * 8 + g;
                u32 own = min(held - seq + row + 1, held); // and what is before it
                Seen seen(own, a.window);
#pragma unroll
                for (int j = 0; j < N / 2; j++) {
                    u32 token = from + j / 2 * 8 + 2 * t + j % 2;
                    bool sees = WINDOWED ? seen.has(token) : token < own;
                    scores[j / 2 * 4 + half * 2 + j % 2] += sees ? 0.0f : -INFINITY;
                }
            }
        }
        mixed.weigh(scores);
        u32 weights[N / 8][4];
#pragma unroll
        for (int i = 0; i < N / 2; i++) weights[i / 4][i % 4] = packed(scores[2 * i], scores[2 * i + 1]);
        hold(mixed.values);
        begin_products();
#pragma unroll
        for (int s = 0; s < N / 8; s++)
            add_product(mixed.values, weights[s], tile_at(keys + TILE + s * 16 * 128, BN * 128));
        end_products(mixed.values);
        hold(weights);
    };
    for (u32 from = begin; from < end; from += BN) {
        asm volatile("cp.async.wait_group 0;");
        make_visible();
        __syncthreads();
        fetch(from + BN); // where the tile before lay, of which all products are done
        u32 keys = ring + (from - begin) / BN % 2 * 2 * TILE;
        bool one = !BLOCKED || reach.has(from);
        bool other = BLOCKED ? reach.has(from + BLOCK) : from + BLOCK < held;
        if (one && other) {
            look(Two(), keys, from);
        } else if (one || other) {
            u32 after = one ? 0 : BLOCK;
            look(One(), keys + after * 128, from + after);
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = mixed.sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        float inverse = 1.0f / total;
        u32 row = first + warp * 16 + half * 8 + g;
        if (row >= seq) continue;
        if (a.highest && t == 0) {
            u64 at = ((u64)b * heads + head) * seq + row;
            a.highest[at] = mixed.max[half];
            a.sums[at] = total;
        }
        bf16 *p = a.out + (((u64)b * seq + row) * heads + head) * D + 2 * t;
#pragma unroll
        for (int d = 0; d < D / 8; d++)
            *reinterpret_cast<u32 *>(p + d * 8) =
                packed(mixed.values[d * 4 + half * 2] * inverse,
                       mixed.values[d * 4 + half * 2 + 1] * inverse);
    }
}

#endif
