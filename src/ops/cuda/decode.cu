// One token of each sequence through a layer, in five launches: norm and q, k, v with bias; RoPE,
// cache and attention; o and residual; norm, gate and up with SiLU and product; down and residual.
// Those with products are in products.cu; here are attention and the embedding.
//
// The number of tokens held is read from memory, so that one recorded graph serves every step: that
// of the longest sequence, and how many fewer each of them holds.
#include "attend_tile.cuh"

// out (batch, width) = rows `ids` of the table, times `scale` where it is given
template <typename T> __device__ void embed(const Embed<T> &a) {
    wait_for_inputs();
    let_next_start();
    const T *row = a.table + (u64)a.ids[blockIdx.y] * a.width;
    u32 i = blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    if (i >= a.width) return;
    T x = row[i];
    a.out[(u64)blockIdx.y * a.width + i] = a.scale ? narrow<T>(widen(x) * widen(a.scale[0])) : x;
}

// Query heads `first` and on, `g_count` of them, and the new key of head `head`, of sequence b: normed
// where there are norms, turned by position `past`, the queries scaled.
template <typename T, int D, int MOST, bool NORMED, int THREADS>
__device__ __forceinline__ void turn(const Attend<T> &a, u32 b, u32 first, u32 g_count, u32 head,
                                     u32 past, float (&query)[MOST][D], float (&new_key)[D]) {
    auto vector = [&](u32 g) {
        return g < g_count ? a.q + (u64)b * a.q_stride + (first + g) * D
                           : a.k + (u64)b * a.kv_stride + head * D;
    };
    auto norm_of = [&](u32 g) -> const Normed<T> & { return g < g_count ? a.q_norm : a.k_norm; };
    __shared__ float inverse[NORMED ? MOST + 1 : 1]; // 1 / root of the mean square
    if constexpr (NORMED) {
        for (u32 g = threadIdx.x / 32; g <= g_count; g += THREADS / 32) {
            const T *from = vector(g);
            float sum = 0.0f;
            for (int j = threadIdx.x % 32; j < D; j += 32) sum += widen(from[j]) * widen(from[j]);
            sum = reduce<Sum, 32>(sum);
            if (threadIdx.x % 32 == 0) inverse[g] = 1.0f / sqrtf(sum / D + norm_of(g).eps);
        }
        __syncthreads();
    }
    const T *co = a.cos + (u64)past * (D / 2), *si = a.sin + (u64)past * (D / 2);
    for (u32 i = threadIdx.x; i < (g_count + 1) * (D / 2); i += THREADS) {
        u32 g = i / (D / 2), j = i % (D / 2);
        const T *from = vector(g);
        float first = widen(from[j]), second = widen(from[j + D / 2]);
        if constexpr (NORMED) {
            const Normed<T> &norm = norm_of(g);
            float r = inverse[g];
            first = rounded<T>(first * r * (norm.shift + widen(norm.gain[j])));
            second = rounded<T>(second * r * (norm.shift + widen(norm.gain[j + D / 2])));
        }
        float c = widen(co[j]), s = widen(si[j]);
        float x = rounded<T>(first * c - second * s), y = rounded<T>(first * s + second * c);
        if (g < g_count) {
            float f = widen(a.scale[0]);
            query[g][j] = rounded<T>(x * f), query[g][j + D / 2] = rounded<T>(y * f);
        } else {
            new_key[j] = x, new_key[j + D / 2] = y;
        }
    }
    __syncthreads();
}

// The parts of a block's share of the keys become one, (max, sum, D values) for each query head;
// and whichever block is last of these heads adds up the shares of all.
template <typename T, int D, int MOST, int THREADS, int PARTS>
__device__ __forceinline__ void add_up(const Attend<T> &a, u32 b, u32 first, u32 g_count,
                                       const float (&maxes)[PARTS][MOST],
                                       const float (&sums)[PARTS][MOST],
                                       const float (&part)[PARTS][MOST][D]) {
    u32 split = blockIdx.x, splits = gridDim.x;
    __syncthreads();
    u64 row = (u64)b * a.heads + first;
    for (u32 i = threadIdx.x; i < g_count * D; i += THREADS) {
        u32 g = i / D, j = i % D;
        float top = NONE, total = 0.0f, v = 0.0f;
#pragma unroll
        for (int w = 0; w < PARTS; w++) top = fmaxf(top, maxes[w][g]);
#pragma unroll
        for (int w = 0; w < PARTS; w++) {
            float weight = __expf(maxes[w][g] - top);
            total += weight * sums[w][g];
            v += weight * part[w][g][j];
        }
        if (splits == 1) {
            a.out[(row + g) * D + j] = narrow<T>(v / total);
        } else {
            float *share = a.shares + ((row + g) * splits + split) * (D + 2);
            share[2 + j] = v;
            if (j == 0) share[0] = top, share[1] = total;
        }
    }
    if (splits == 1) return;

    // Whoever is last of this head adds the shares up.
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    u32 *done = a.done + b * gridDim.y + blockIdx.y;
    if (threadIdx.x == 0) last = atomicInc(done, splits - 1) == splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    __shared__ float tops[MOST][MOST_SPLITS], totals[MOST][MOST_SPLITS];
    for (u32 i = threadIdx.x; i < g_count * splits; i += THREADS) {
        const float *share = a.shares + (row * splits + i) * (D + 2);
        tops[i / splits][i % splits] = __ldcg(share);
        totals[i / splits][i % splits] = __ldcg(share + 1);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < g_count * D; i += THREADS) {
        u32 g = i / D, j = i % D;
        const float *share = a.shares + (row + g) * splits * (D + 2) + 2 + j;
        float top = NONE, total = 0.0f, v = 0.0f;
        for (u32 s = 0; s < splits; s++) top = fmaxf(top, tops[g][s]);
#pragma unroll 8
        for (u32 s = 0; s < splits; s++) {
            float weight = __expf(tops[g][s] - top);
            total += weight * totals[g][s];
            v += weight * __ldcg(share + s * (D + 2));
        }
        a.out[(row + g) * D + j] = narrow<T>(v / total);
    }
}

// Attention of one query token over the tokens held before it, `*held` less `behind`, and itself, as far as its window
// reaches: block (split, heads, sequence) takes query heads of one key head, MOST at most, and one
// share of the keys of as many as the grid is wide. q, k, v are the new token's, before their norms
// and RoPE; k after these and v go into the caches (batch, K, capacity, D). The block that finishes
// last of its heads' adds the shares up.
//
// A key's D elements lie in D / 8 lanes, so a warp looks at 256 / D keys at once, and each of these
// groups of lanes keeps a running maximum, sum and weighted value of its own for every query head.
#define KEYS 2 // that a group looks at together
template <typename T, int D, int MOST, bool NORMED>
__device__ void attend(const Attend<T> &a) {
    constexpr int LANES = D / 8, GROUPS = LOOKERS / LANES, WARPS = LOOKERS / 32;
    u32 split = blockIdx.x, splits = gridDim.x, b = blockIdx.z, heads = a.heads;
    u32 g_count = heads / gridDim.y, first = blockIdx.y * g_count; // of query heads
    u32 each = heads / a.kv_heads, head = first / each;
    int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    let_next_start();
    // What was held before this step is there: whoever wrote it has ended.
    u32 past = *a.held - (a.behind ? a.behind[b] : 0);
    T *keys = a.keys + ((u64)b * a.kv_heads + head) * a.capacity * D + lane * 8;
    T *values = a.values + (keys - a.keys);
    u32 hidden = Seen(past + 1, a.window).first, seen = past - hidden;
    u32 start = hidden + seen * split / splits, end = hidden + seen * (split + 1) / splits;
    Raw<T> next_key[KEYS], next_value[KEYS];
    auto fetch = [&](u32 from) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            u32 t = from + i * GROUPS + group;
            if (t >= end) continue;
            next_key[i].fetch(keys + (u64)t * D);
            next_value[i].fetch(values + (u64)t * D);
        }
    };
    fetch(start);
    wait_for_inputs();

    __shared__ float query[MOST][D], new_key[D];
    turn<T, D, MOST, NORMED, LOOKERS>(a, b, first, g_count, head, past, query, new_key);
    float qs[MOST][8], max[MOST], sum[MOST], mixed[MOST][8];
#pragma unroll
    for (int g = 0; g < MOST; g++) {
        max[g] = NONE, sum[g] = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            qs[g][j] = g < g_count ? query[g][lane * 8 + j] : 0.0f;
            mixed[g][j] = 0.0f;
        }
    }
    // By whole warps, of whose groups some may have no key.
    auto look = [&](const float (&key)[KEYS][8], const float (&value)[KEYS][8],
                    const bool (&valid)[KEYS]) {
#pragma unroll
        for (int g = 0; g < MOST; g++) {
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
        load<8>(a.v + (u64)b * a.kv_stride + head * D + lane * 8, value[0]);
        if (group == 0 && first % each == 0) {
            store<8>(keys + (u64)past * D, key[0]);
            store<8>(values + (u64)past * D, value[0]);
        }
        look(key, value, valid);
    }

    // The groups' results into one share, (max, sum, D values) for each query head: first within a
    // warp, then over the warps.
    __shared__ float maxes[WARPS][MOST], sums[WARPS][MOST], part[WARPS][MOST][D];
#pragma unroll
    for (int g = 0; g < MOST; g++) {
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
    add_up<T, D, MOST, LOOKERS, WARPS>(a, b, first, g_count, maxes, sums, part);
}

// The same in bf16 by the tensor cores, for up to eight query heads of a key head, which are rows of
// the instruction's sixteen: every key is read once for all of them. A warp takes 16 keys at a time,
// and has STAGES tiles of keys and values under way to its own part of shared memory.
template <int D, bool NORMED> __device__ void attend_tiles(const Attend<bf16> &a) {
    constexpr int MOST = 8, WARPS = TILE_LOOKERS / 32, TILE = 16 * D;
    constexpr int STAGES = ATTEND_TILE_BYTES / (WARPS * 2 * TILE * 2);
    constexpr int CHUNKS = D / 8; // of 16 bytes in a row
    u32 split = blockIdx.x, splits = gridDim.x, b = blockIdx.z, heads = a.heads;
    u32 g_count = heads / gridDim.y, first = blockIdx.y * g_count; // of query heads
    u32 each = heads / a.kv_heads, head = first / each;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    let_next_start();
    // What was held before this step is there: whoever wrote it has ended.
    u32 past = *a.held - (a.behind ? a.behind[b] : 0);
    bf16 *keys = a.keys + ((u64)b * a.kv_heads + head) * a.capacity * D;
    bf16 *values = a.values + (keys - a.keys);
    u32 hidden = Seen(past + 1, a.window).first, seen = past - hidden;
    u32 start = hidden + seen * split / splits, end = hidden + seen * (split + 1) / splits;
    extern __shared__ __align__(128) bf16 rings[];
    bf16 *ring = rings + warp * STAGES * 2 * TILE;
    // This warp's tile number i, of its keys and its values.
    auto fetch = [&](u32 i) {
        u32 from = start + (i * WARPS + warp) * 16;
        bf16 *tile = ring + i % STAGES * 2 * TILE;
#pragma unroll
        for (int j = lane; j < 16 * CHUNKS; j += 32) {
            u32 row = j / CHUNKS, chunk = j % CHUNKS;
            bool there = from + row < end;
            u64 at = there ? (u64)(from + row) * D + chunk * 8 : 0;
            copy_async(chunk_of<D>(tile, row, chunk), keys + at, there);
            copy_async(chunk_of<D>(tile + TILE, row, chunk), values + at, there);
        }
    };
    u32 tiles = (end - start + 15) / 16, own = tiles > warp ? (tiles - warp + WARPS - 1) / WARPS : 0;
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; i++) {
        if (i < own) fetch(i);
        asm volatile("cp.async.commit_group;");
    }
    wait_for_inputs();

    __shared__ float query[MOST][D], new_key[D];
    turn<bf16, D, MOST, NORMED, TILE_LOOKERS>(a, b, first, g_count, head, past, query, new_key);
    TilePart<D> mine(query, g_count);
    for (u32 i = 0; i < own; i++) {
        if (i + STAGES - 1 < own) fetch(i + STAGES - 1);
        asm volatile("cp.async.commit_group;");
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
        __syncwarp();
        mine.look(ring + i % STAGES * 2 * TILE, start + (i * WARPS + warp) * 16, end);
        __syncwarp(); // before this tile is filled anew
    }
    float sum = mine.whole_sum();

    // Each warp's part, and after them the new token's, which is in the first share.
    __shared__ float maxes[WARPS + 1][MOST], sums[WARPS + 1][MOST], part[WARPS + 1][MOST][D];
    if (t == 0) maxes[warp][g] = mine.max, sums[warp][g] = sum;
#pragma unroll
    for (int d = 0; d < D / 8; d++) {
        part[warp][g][d * 8 + 2 * t] = mine.mixed[d][0];
        part[warp][g][d * 8 + 2 * t + 1] = mine.mixed[d][1];
    }
    const bf16 *value = a.v + (u64)b * a.kv_stride + head * D;
    for (u32 h = warp; h < g_count; h += WARPS) {
        float score = 0.0f;
        for (int j = lane; j < D; j += 32) {
            score += query[h][j] * new_key[j];
            part[WARPS][h][j] = split == 0 ? widen(value[j]) : 0.0f;
        }
        score = reduce<Sum, 32>(score);
        if (lane == 0) maxes[WARPS][h] = split == 0 ? score : NONE, sums[WARPS][h] = split == 0;
    }
    if (split == 0 && first % each == 0 && threadIdx.x < D) {
        keys[(u64)past * D + threadIdx.x] = narrow<bf16>(new_key[threadIdx.x]);
        values[(u64)past * D + threadIdx.x] = value[threadIdx.x];
    }
    add_up<bf16, D, MOST, TILE_LOOKERS, WARPS + 1>(a, b, first, g_count, maxes, sums, part);
}

// ---- what the host calls ------------------------------------------------------------------------

// Left to itself, the compiler takes so many registers for one query head that a multiprocessor has
// room for two blocks, not three.
#define TOGETHER(T, MOST) (MOST == 1 && sizeof(T) == 2 ? 3 : 1)

#define ATTEND(NAME, NORMED, T, t, D, MOST)                                                        \
    extern "C" __global__ void __launch_bounds__(LOOKERS, TOGETHER(T, MOST))                       \
        NAME##_##t##_##D##_##MOST(Attend<T> a) {                                                   \
        attend<T, D, MOST, NORMED>(a);                                                             \
    }

#define ALL(T, t)                                                                                  \
    ATTEND_SHAPES(ATTEND, attend, false, T, t)                                                     \
    ATTEND_SHAPES(ATTEND, attend_normed, true, T, t)                                               \
    extern "C" __global__ void embed_##t(Embed<T> a) { embed<T>(a); }

#define ATTEND_TILES(NAME, NORMED, D)                                                              \
    extern "C" __global__ void __launch_bounds__(TILE_LOOKERS, 2) NAME##_bf16_##D(                 \
        Attend<bf16> a) {                                                                          \
        attend_tiles<D, NORMED>(a);                                                                \
    }

ALL(float, f32)
ALL(bf16, bf16)
ATTEND_TILE_WIDTHS(ATTEND_TILES, attend_tiles, false)
ATTEND_TILE_WIDTHS(ATTEND_TILES, attend_tiles_normed, true)
