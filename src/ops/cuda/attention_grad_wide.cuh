// Gradients of blocked attention by warpgroups' products, on Hopper: the twin of `attention_grad` in
// attention.cu, whose comment has the formulas.
#pragma once
#include "attention_wide.cuh"

#ifdef HAS_WARPGROUPS

// As `attention_grad`, by one warpgroup: a block of keys over one block of queries after another.
template <int D, bool WINDOWED> __device__ void attention_grad_wide(const AttentionGrad<bf16> &a) {
    constexpr int THREADS = 128, BLOCK = ATTENTION_BLOCK, CHUNKS = D / 8;
    constexpr u32 TILE = BLOCK * D * 2; // bytes
    static_assert(BLOCK == 64, "a warpgroup's keys are a block");
    extern __shared__ __align__(1024) char panels[];
    __shared__ float kept[2][3][BLOCK]; // of each query: max, 1 / sum, dots
    u32 keys = (u32)__cvta_generic_to_shared(panels), values = keys + TILE;
    u32 tiles = values + TILE; // two times queries and dy
    u32 slopes = tiles + 4 * TILE; // dSᵀ, a row a key
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 head = blockIdx.y, b = blockIdx.z, from = blockIdx.x * BLOCK;
    u32 seq = a.seq, held = a.held, heads = a.heads;
    u64 of_keys = (u64)b * a.kv_heads + head / (heads / a.kv_heads), of_queries = (u64)b * heads + head;

    auto fetch = [&](u32 to, const bf16 *rows, u64 stride, u32 first, u32 all) {
#pragma unroll
        for (int i = threadIdx.x; i < BLOCK * CHUNKS; i += THREADS) {
            u32 row = i / CHUNKS, chunk = i % CHUNKS;
            bool there = first + row < all;
            copy_async(to + chunk_at(BLOCK, row, chunk),
                       rows + (there ? first + row : 0) * stride + chunk * 8, there);
        }
    };
    auto fetch_queries = [&](u32 buffer, u32 first) {
        u32 to = tiles + buffer * 2 * TILE;
        fetch(to, a.q + of_queries * seq * D, D, first, seq);
        fetch(to + TILE, a.dy + ((u64)b * seq * heads + head) * D, (u64)heads * D, first, seq);
        asm volatile("cp.async.commit_group;");
        if (threadIdx.x < BLOCK) {
            u32 i = threadIdx.x;
            bool there = first + i < seq;
            u64 at = of_queries * seq + first + i;
            kept[buffer][0][i] = there ? a.highest[at] * LOG2_E : INFINITY; // a weight of 0
            kept[buffer][1][i] = there ? 1.0f / a.sums[at] : 0.0f;
            kept[buffer][2][i] = there && a.dots ? a.dots[at] : 0.0f;
        }
    };

    // The queries that reach these keys are whole blocks, but for the last.
    u32 begin = 0, end = seq;
    while (begin < seq && !Reach(begin, seq, held, a.window).has(from)) begin += BLOCK;
    if (WINDOWED)
        while (end > begin && !Reach(end - 1, seq, held, a.window).has(from))
            end = (end - 1) / BLOCK * BLOCK;
    if (begin >= end) return;
    fetch(keys, a.keys + of_keys * a.stride, D, from, held);
    fetch(values, a.values + of_keys * a.stride, D, from, held);
    fetch_queries(0, begin);
    float dk[D / 2] = {}, dv[D / 2] = {};

    for (u32 first = begin, buffer = 0; first < end; first += BLOCK, buffer ^= 1) {
        asm volatile("cp.async.wait_group 0;");
        make_visible();
        __syncthreads();
        if (first + BLOCK < end) fetch_queries(buffer ^ 1, first + BLOCK);
        u32 q = tiles + buffer * 2 * TILE, dy = q + TILE;
        const float(&top)[BLOCK] = kept[buffer][0], (&inverse)[BLOCK] = kept[buffer][1];
        const float(&dots)[BLOCK] = kept[buffer][2];

        float scores[32], ds[32]; // (64 keys, 64 queries)
        begin_products();
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            u32 at = s / 4 * (BLOCK * 128) + s % 4 * 32;
            if (s == 0)
                multiply(scores, tile_at(keys + at), tile_at(q + at));
            else
                add_product(scores, tile_at(keys + at), tile_at(q + at));
        }
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            u32 at = s / 4 * (BLOCK * 128) + s % 4 * 32;
            if (s == 0)
                multiply(ds, tile_at(values + at), tile_at(dy + at));
            else
                add_product(ds, tile_at(values + at), tile_at(dy + at));
        }
        end_products(scores), hold(ds);

        bool masked = Reach(first, seq, held, a.window).masks(from);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            u32 column = i / 4 * 8 + 2 * t + i % 2, token = from + warp * 16 + g + i % 4 / 2 * 8;
            float &x = scores[i];
            if (masked) {
                u32 own = min(held - seq + first + column + 1, held);
                Seen seen(own, a.window);
                x += (WINDOWED ? seen.has(token) : token < own) ? 0.0f : -INFINITY;
            }
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x * LOG2_E - top[column]));
            x *= inverse[column];
            ds[i] = x * (ds[i] - dots[column]);
        }
        u32 weights[4][4], steep[4][4];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            weights[i / 4][i % 4] = packed(scores[2 * i], scores[2 * i + 1]);
            steep[i / 4][i % 4] = packed(ds[2 * i], ds[2 * i + 1]);
            u32 row = warp * 16 + g + i % 2 * 8;
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(slopes + chunk_at(BLOCK, row, i / 2) + t * 4),
                         "r"(steep[i / 4][i % 4])
                         : "memory");
        }
        make_visible();
        __syncthreads();

        float dq[D / 2]; // (64 queries, D)
        hold(dk), hold(dv);
        begin_products();
#pragma unroll
        for (int s = 0; s < 4; s++)
            add_product(dv, weights[s], tile_at(dy + s * 16 * 128, BLOCK * 128));
#pragma unroll
        for (int s = 0; s < 4; s++)
            add_product(dk, steep[s], tile_at(q + s * 16 * 128, BLOCK * 128));
#pragma unroll
        for (int s = 0; s < 4; s++) {
            u64 left = tile_at(slopes + s * 16 * 128), right = tile_at(keys + s * 16 * 128, BLOCK * 128);
            if (s == 0)
                multiply_transposed(dq, left, right);
            else
                add_transposed(dq, left, right);
        }
        end_products(dq);
        hold(dk), hold(dv), hold(weights), hold(steep);
        if (!a.dq) continue;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 row = first + warp * 16 + half * 8 + g;
            if (row >= seq) continue;
            float *p = a.dq + (of_queries * seq + row) * D + 2 * t;
#pragma unroll
            for (int d = 0; d < D / 8; d++)
                add_two(p + d * 8, dq[d * 4 + half * 2], dq[d * 4 + half * 2 + 1]);
        }
    }
    auto add_keys = [&](float *to, const float(&sum)[D / 2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 key = from + warp * 16 + half * 8 + g;
            if (key >= held) continue;
            float *p = to + (of_keys * held + key) * D + 2 * t;
#pragma unroll
            for (int d = 0; d < D / 8; d++) add_two(p + d * 8, sum[d * 4 + half * 2], sum[d * 4 + half * 2 + 1]);
        }
    };
    if (a.dk) add_keys(a.dk, dk);
    if (a.dv) add_keys(a.dv, dv);
}

#endif
