// One token for each row of logits, the largest or one drawn by chance, so that nothing but tokens
// goes to the host. The token becomes the row's next input and entry `*held - first` of `chosen`
// (steps, rows); then *held counts the token that was fed.
#include "common.cuh"

#define CHOOSERS 256
#define DRAWERS 1024

// A value and where it stands as one number that compares as the values do: NaN above all, so that
// it is seen, and of equal values the first above the rest.
__device__ __forceinline__ u64 ranked(float v, u32 index) {
    u32 bits = __float_as_uint(v);
    bits = isnan(v) ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | (u32)~index;
}
__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// Factors on the logits of seen tokens; none is seen where `seen` is null.
struct Penalty {
    unsigned char *seen; // (rows, width), 1 where seen
    float less, more;    // for positive logits, for others

    __device__ float of(float v, u64 i) const {
        return seen && seen[i] ? v * (v > 0.0f ? less : more) : v;
    }
};

// Where choices go. `done` is 0 before and after.
struct Choices {
    u32 *ids, *held, *done;
    u64 *chosen;
    u32 first, rows, width;

    // `choice` is a number that is finite if the row was, ranked with the token.
    __device__ void put(u32 row, u64 choice, const Penalty &penalty) const {
        u32 token = ~(u32)choice;
        ids[row] = token;
        chosen[(u64)(*held - first) * rows + row] = choice;
        if (penalty.seen) penalty.seen[(u64)row * width + token] = 1;
    }
    // Whether this block is the last to come here; said to all of its threads.
    __device__ bool is_last() const {
        u32 blocks = gridDim.x * gridDim.y;
        __shared__ bool last;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicInc(done, blocks - 1) == blocks - 1;
        __syncthreads();
        return last;
    }
};

// The largest logit of each row. Blocks (share of a row, row); `best` (rows) is 0 before and after.
template <typename T>
__device__ void choose(Choices to, u64 *best, const T *logits, Penalty penalty) {
    wait_for_inputs();
    u64 start = (u64)blockIdx.y * to.width, mine = 0;
    u32 last = to.width - 1;
    for (u32 i = (blockIdx.x * CHOOSERS + threadIdx.x) * 8; i <= last; i += gridDim.x * CHOOSERS * 8) {
        float v[8];
        if (to.width % 8 == 0) {
            load<8>(logits + start + i, v);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = widen(logits[start + min(i + j, last)]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 token = min(i + j, last);
            mine = larger(mine, ranked(penalty.of(v[j], start + token), token));
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1)
        mine = larger(mine, __shfl_xor_sync(~0u, mine, mask));
    if (threadIdx.x % 32 == 0) atomicMax(best + blockIdx.y, mine);
    if (!to.is_last()) return;
    for (u32 row = threadIdx.x; row < to.rows; row += CHOOSERS)
        to.put(row, atomicExch(best + row, 0ull), penalty);
    __syncthreads();
    if (threadIdx.x == 0) *to.held += 1;
}

// ---- by chance ----------------------------------------------------------------------------------

// A probability in units of 2⁻³¹: sums of whole numbers come out the same in any order. A row's
// sum fits in 32 bits, since its probabilities sum to 1.
__device__ __forceinline__ u32 units(float probability) {
    return __float2uint_rn(probability * 2147483648.0f);
}

// How many elements, in the upper half, and the units of them all, in the lower.
typedef u64 Mass;
__device__ __forceinline__ Mass mass(u32 count, u32 sum) { return (u64)count << 32 | sum; }
__device__ __forceinline__ u32 part(Mass m, bool by_count) { return by_count ? m >> 32 : m; }

__device__ __forceinline__ Mass running(Mass m) { // over the lanes up to this one
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        Mass other = __shfl_up_sync(~0u, m, step);
        if (threadIdx.x % 32 >= step) m += other;
    }
    return m;
}

// Over the threads of the block before this one.
__device__ Mass before_this(Mass m) {
    __shared__ Mass warps[DRAWERS / 32];
    u32 warp = threadIdx.x / 32;
    Mass sum = running(m);
    __syncthreads(); // an earlier call's sums have been read
    if (threadIdx.x % 32 == 31) warps[warp] = sum;
    __syncthreads();
    for (u32 w = 0; w < warp; w++) sum += warps[w];
    return sum - m;
}

// How the elements of a row are spread: bins in the order of size, by ten bits of their floats.
#define BINS 1024
struct Bins {
    u32 counts[BINS], sums[BINS];

    __device__ void clear() {
        __syncthreads();
        counts[threadIdx.x] = sums[threadIdx.x] = 0;
        __syncthreads();
    }
    __device__ void add(u32 bin, float probability) {
        atomicAdd(counts + bin, 1);
        atomicAdd(sums + bin, units(probability));
    }
    __device__ Mass of(u32 bin) const { return mass(counts[bin], sums[bin]); }
};

// f(i, p[i]) for all i below `width`, with eight loads of a thread under way.
template <typename F> __device__ __forceinline__ void each(const float *p, u32 width, F f) {
    for (u32 start = threadIdx.x; start < width; start += 8 * DRAWERS) {
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = p[min(start + j * DRAWERS, width - 1)];
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (start + j * DRAWERS < width) f(start + j * DRAWERS, v[j]);
    }
}

// An element, and the mass before it: after `first_past`, before its bin; after `find`, with it.
struct Place {
    Mass sum;
    u32 at;
};

// The bin, largest first, with which the sum from `before` on passes `mark`.
__device__ Place first_past(const Bins &bins, bool by_count, u32 mark, Mass before) {
    __shared__ Place found;
    u32 bin = BINS - 1 - threadIdx.x;
    Mass own = bins.of(bin), start = before + before_this(own);
    if (part(start, by_count) <= mark && part(start + own, by_count) > mark) found = {start, bin};
    __syncthreads();
    return found;
}

// The element with which the running count, or sum of units, passes `mark`: `sorted`, larger
// before smaller and of equals the first before the rest; else as they lie. `coarse` holds the
// upper bits of all; what is in the bin that is wanted is spread again by the next ten.
__device__ Place find(const float *row, u32 width, const Bins &coarse, bool sorted, bool by_count,
                      u32 mark) {
    __shared__ Bins fine;
    __shared__ Place found;
    u32 shift = 31, prefix = 0; // of the elements that are left: all are positive
    Mass before = 0;
    if (sorted) {
        Place bin = first_past(coarse, by_count, mark, 0);
        shift = 20, prefix = bin.at, before = bin.sum;
        for (u32 left = coarse.counts[bin.at]; shift > 0 && left > 1; shift -= 10) {
            fine.clear();
            each(row, width, [&](u32, float p) {
                u32 bits = __float_as_uint(p);
                if (bits >> shift == prefix) fine.add(bits >> (shift - 10) & (BINS - 1), p);
            });
            __syncthreads();
            bin = first_past(fine, by_count, mark, before);
            prefix = prefix << 10 | bin.at, before = bin.sum, left = fine.counts[bin.at];
        }
    }
    // Of those, in the order of the row, each warp has a stretch.
    u32 stretch = (width + DRAWERS - 1) / DRAWERS * 32, lane = threadIdx.x % 32;
    u32 from = threadIdx.x / 32 * stretch, to = min(from + stretch, width);
    auto mass_at = [&](u32 i) -> Mass {
        if (i >= to) return 0;
        float p = row[i];
        return __float_as_uint(p) >> shift == prefix ? mass(1, units(p)) : 0;
    };
    Mass mine = 0;
#pragma unroll 8
    for (u32 i = from + lane; i < to; i += 32) mine += mass_at(i);
    Mass sum = before + before_this(mine);
    Mass end = __shfl_sync(~0u, sum + mine, 31);
    sum = __shfl_sync(~0u, sum, 0);
    if (part(sum, by_count) <= mark && part(end, by_count) > mark) {
        for (u32 i = from;; i += 32) {
            Mass with = sum + running(mass_at(i + lane));
            u32 past = __ballot_sync(~0u, part(with, by_count) > mark);
            if (past) {
                if (lane == __ffs(past) - 1) found = {with, i + lane};
                break;
            }
            sum = __shfl_sync(~0u, with, 31);
        }
    }
    __syncthreads();
    return found;
}

// One token a row, a block each, by the entry of `uniforms` (steps, rows) for this step: among all,
// as they lie; or, the likeliest first, among the k likeliest (0: all) and of these among the
// fewest that hold `top_p` (0: all). `probabilities` (rows, width) are scratch.
template <typename T>
__device__ void draw(Choices to, float *probabilities, const float *uniforms, const T *logits,
                     Penalty penalty, float inverse_temperature, u32 top_k, float top_p) {
    wait_for_inputs();
    u32 row = blockIdx.y, width = to.width;
    u64 start = (u64)row * width;
    float *p = probabilities + start;
    auto scaled = [&](u32 i) {
        return penalty.of(widen(logits[start + i]), start + i) * inverse_temperature;
    };
    float top = Max::identity();
#pragma unroll 8
    for (u32 i = threadIdx.x; i < width; i += DRAWERS) top = fmaxf(top, scaled(i));
    top = reduce<Max, DRAWERS>(top);
    float sum = 0.0f;
#pragma unroll 8
    for (u32 i = threadIdx.x; i < width; i += DRAWERS) sum += p[i] = expf(scaled(i) - top);
    sum = reduce<Sum, DRAWERS>(sum);

    // What rounds to no unit is never drawn, and stays out of all counts.
    __shared__ Bins coarse;
    coarse.clear();
    bool finite = isfinite(sum);
    Mass mine = 0;
    each(p, width, [&](u32 i, float e) {
        float v = finite ? e / sum : 0.0f;
        u32 n = units(v);
        p[i] = v = n ? v : 0.0f;
        if (!n) return;
        coarse.add(__float_as_uint(v) >> 20, v);
        mine += mass(1, n);
    });
    __shared__ Mass all;
    Mass before = before_this(mine);
    if (threadIdx.x == DRAWERS - 1) all = before + mine;
    __syncthreads();

    u32 token = 0;
    if (finite) {
        u32 left = part(all, false);
        if (top_k && top_k < part(all, true))
            left = part(find(p, width, coarse, true, true, top_k - 1).sum, false);
        if (top_p > 0.0f) {
            u32 enough = __double2uint_ru((double)top_p * left);
            left = part(find(p, width, coarse, true, false, enough - 1).sum, false);
        }
        u32 mark = __double2uint_rd((double)uniforms[(u64)(*to.held - to.first) * to.rows + row] * left);
        token = find(p, width, coarse, top_k || top_p > 0.0f, false, mark).at;
    }
    if (threadIdx.x == 0) to.put(row, ranked(sum, token), penalty);
    if (to.is_last() && threadIdx.x == 0) *to.held += 1;
}

// ---- what the host calls ------------------------------------------------------------------------

#define ALL(T, t)                                                                                  \
    extern "C" __global__ void __launch_bounds__(CHOOSERS) choose_##t(                             \
        u32 *ids, u32 *held, u32 *done, u64 *chosen, u32 first, u32 rows, u32 width,               \
        unsigned char *seen, float less, float more, const T *logits, u64 *best) {                 \
        choose<T>({ids, held, done, chosen, first, rows, width}, best, logits, {seen, less, more});\
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(DRAWERS) draw_##t(                                \
        u32 *ids, u32 *held, u32 *done, u64 *chosen, u32 first, u32 rows, u32 width,               \
        unsigned char *seen, float less, float more, const T *logits, float *probabilities,        \
        const float *uniforms, float inverse_temperature, u32 top_k, float top_p) {                \
        draw<T>({ids, held, done, chosen, first, rows, width}, probabilities, uniforms, logits,    \
                {seen, less, more}, inverse_temperature, top_k, top_p);                            \
    }

ALL(float, f32)
ALL(bf16, bf16)
