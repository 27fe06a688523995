// One token for each row of logits, the largest or one drawn by chance, so that nothing but tokens
// goes to the host. The token becomes the row's next input and entry `*held - first` of `chosen`
// (steps, rows); then *held counts the token that was fed.
#include "common.cuh"
#include <cooperative_groups.h>

// A value and where it stands as one number that compares as the values do: NaN above all, so that
// it is seen, and of equal values the first above the rest.
__device__ __forceinline__ u64 ranked(float v, u32 index) {
    u32 bits = __float_as_uint(v);
    bits = isnan(v) ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | (u32)~index;
}
__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// The logit v of token i, as the penalty of seen ones leaves it.
template <typename T>
__device__ __forceinline__ float penalized(const Penalty<T> &penalty, float v, u64 i) {
    bool seen = penalty.seen && penalty.seen[i];
    return seen ? v * (v > 0.0f ? penalty.less : penalty.more) : v;
}

// `choice` is a number that is finite if the row was, ranked with the token.
template <typename T>
__device__ void put(const Choices<T> &to, const Penalty<T> &penalty, u32 row, u64 choice) {
    u32 token = ~(u32)choice;
    to.ids[row] = token;
    to.chosen[(u64)(*to.held - to.first) * to.rows + row] = choice;
    if (penalty.seen) penalty.seen[(u64)row * to.width + token] = 1;
}

// Whether this block is the last of so many to come here; said to all of its threads.
__device__ bool is_last(u32 *done, u32 blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(done, blocks - 1) == blocks - 1;
    __syncthreads();
    return last;
}

// The largest logit of each row. Blocks (share of a row, row); `best` (rows) is 0 before and after.
template <typename T> __device__ void choose(const Choose<T> &a) {
    const Choices<T> &to = a.to;
    wait_for_inputs();
    u64 start = (u64)blockIdx.y * to.width, mine = 0;
    u32 last = to.width - 1;
    u32 step = gridDim.x * CHOOSERS * 8;
    for (u32 i = (blockIdx.x * CHOOSERS + threadIdx.x) * 8; i <= last; i += step) {
        float v[8];
        if (to.width % 8 == 0) {
            load<8>(a.logits + start + i, v);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = widen(a.logits[start + min(i + j, last)]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 token = min(i + j, last);
            mine = larger(mine, ranked(penalized(a.penalty, v[j], start + token), token));
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1)
        mine = larger(mine, __shfl_xor_sync(~0u, mine, mask));
    if (threadIdx.x % 32 == 0) atomicMax(a.best + blockIdx.y, mine);
    if (!is_last(to.done, gridDim.x * gridDim.y)) return;
    for (u32 row = threadIdx.x; row < to.rows; row += CHOOSERS)
        put(to, a.penalty, row, atomicExch(a.best + row, 0ull));
    __syncthreads();
    if (threadIdx.x == 0) *to.held += 1;
}

// ---- by chance ----------------------------------------------------------------------------------

// The blocks of a row, which have a stretch of it each: a cluster, where the GPU has them; else the
// first has it all, and the others end at once.
#if __CUDA_ARCH__ >= 900
#define CLUSTER __cluster_dims__(PEERS, 1, 1)
struct Peers {
    static constexpr u32 count = PEERS;
    static __device__ void sync() { cooperative_groups::this_cluster().sync(); }
    template <typename T> static __device__ T *shared(T &mine, u32 peer) {
        return cooperative_groups::this_cluster().map_shared_rank(&mine, peer);
    }
};
#else
#define CLUSTER
struct Peers {
    static constexpr u32 count = 1;
    static __device__ void sync() { __syncthreads(); }
    template <typename T> static __device__ T *shared(T &mine, u32) { return &mine; }
};
#endif

// Over all threads of all peers.
template <typename Op> __device__ float over_peers(float v) {
    __shared__ float own;
    v = reduce<Op, DRAWERS>(v);
    if (threadIdx.x == 0) own = v;
    Peers::sync();
    v = Op::identity();
    for (u32 peer = 0; peer < Peers::count; peer++) v = Op::of(v, *Peers::shared(own, peer));
    Peers::sync();
    return v;
}

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

// How elements are spread: bins in the order of size, by ten bits of their floats; a thread each.
#define BINS DRAWERS
struct Bins {
    u32 counts[BINS], sums[BINS];

    __device__ void clear() {
        __syncthreads(); // all have read
        counts[threadIdx.x] = sums[threadIdx.x] = 0;
        __syncthreads();
    }
    __device__ void add(u32 bin, float probability) {
        atomicAdd(counts + bin, 1);
        atomicAdd(sums + bin, units(probability));
    }
    // Every peer's become the sums of all peers'.
    __device__ void merge() {
        u32 bin = threadIdx.x, count = 0, sum = 0;
        Peers::sync();
        for (u32 peer = 0; peer < Peers::count; peer++) {
            const Bins *bins = Peers::shared(*this, peer);
            count += bins->counts[bin], sum += bins->sums[bin];
        }
        Peers::sync();
        counts[bin] = count, sums[bin] = sum;
        __syncthreads();
    }
};

// A stretch of a row of probabilities.
struct Stretch {
    float *row;
    u32 from, to;

    // f(i) for all i, of which `load(i)` gives what it takes, eight of a thread's under way at
    // once.
    template <typename L, typename F> __device__ __forceinline__ void each(L load, F f) const {
        for (u32 start = from + threadIdx.x; start < to; start += 8 * DRAWERS) {
            float v[8];
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = load(min(start + j * DRAWERS, to - 1));
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (start + j * DRAWERS < to) f(start + j * DRAWERS, v[j]);
        }
    }
    template <typename F> __device__ __forceinline__ void each(F f) const {
        each([&](u32 i) { return row[i]; }, f);
    }
};

// An element or a bin, and a mass: of what is before the bin, or up to the element and with it.
struct Place {
    Mass sum;
    u32 at;
};

// The bin, largest first, with which the sum from `before` on passes `mark`.
__device__ Place first_past(const Bins &bins, bool by_count, u32 mark, Mass before) {
    __shared__ Place found;
    u32 bin = BINS - 1 - threadIdx.x;
    Mass own = mass(bins.counts[bin], bins.sums[bin]), start = before + before_this(own);
    if (part(start, by_count) <= mark && part(start + own, by_count) > mark) found = {start, bin};
    __syncthreads();
    return found;
}

// The element, of those whose floats' bits from `shift` on are `prefix`, in the order of the row,
// with which the running count or sum from `before` on passes `mark`.
__device__ Place in_order(Stretch all, u32 shift, u32 prefix, bool by_count, u32 mark,
                          Mass before) {
    __shared__ Place found;
    __shared__ Mass own;
    // A stretch of the stretch for each warp.
    u32 each = (all.to - all.from + DRAWERS - 1) / DRAWERS * 32, lane = threadIdx.x % 32;
    u32 from = min(all.from + threadIdx.x / 32 * each, all.to), to = min(from + each, all.to);
    auto mass_at = [&](u32 i) -> Mass {
        if (i >= to) return 0;
        float p = all.row[i];
        return __float_as_uint(p) >> shift == prefix ? mass(1, units(p)) : 0;
    };
    Mass mine = 0;
#pragma unroll 8
    for (u32 i = from + lane; i < to; i += 32) mine += mass_at(i);
    Mass sum = before_this(mine);
    if (threadIdx.x == DRAWERS - 1) own = sum + mine;
    Peers::sync();
    for (u32 peer = 0; peer < blockIdx.x; peer++) before += *Peers::shared(own, peer);
    Mass end = before + __shfl_sync(~0u, sum + mine, 31);
    sum = before + __shfl_sync(~0u, sum, 0);
    if (part(sum, by_count) <= mark && part(end, by_count) > mark) {
        for (u32 i = from;; i += 32) {
            Mass with = sum + running(mass_at(i + lane));
            u32 past = __ballot_sync(~0u, part(with, by_count) > mark);
            if (past) {
                Place place = {with, i + lane};
                if (lane == __ffs(past) - 1)
                    for (u32 peer = 0; peer < Peers::count; peer++)
                        *Peers::shared(found, peer) = place;
                break;
            }
            sum = __shfl_sync(~0u, with, 31);
        }
    }
    Peers::sync();
    return found;
}

// The same of all, larger before smaller and of equals the first before the rest. `coarse` holds
// the upper bits of all; what is in the bin that is wanted is spread again by the next ten.
__device__ Place by_size(Stretch all, const Bins &coarse, bool by_count, u32 mark) {
    __shared__ Bins fine;
    Place bin = first_past(coarse, by_count, mark, 0);
    u32 shift = 20, prefix = bin.at, left = coarse.counts[bin.at];
    for (; shift > 0 && left > 1; shift -= 10) {
        fine.clear();
        all.each([&](u32, float p) {
            u32 bits = __float_as_uint(p);
            if (bits >> shift == prefix) fine.add(bits >> (shift - 10) & (BINS - 1), p);
        });
        fine.merge();
        bin = first_past(fine, by_count, mark, bin.sum);
        prefix = prefix << 10 | bin.at, left = fine.counts[bin.at];
    }
    return in_order(all, shift, prefix, by_count, mark, bin.sum);
}

// One token a row by the entry of `uniforms` (steps, rows) for this step: among all, as they lie;
// or, the likeliest first, among the k likeliest (0: all) and of these among the fewest that hold
// `top_p` (0: all). `probabilities` (rows, width) are scratch.
template <typename T> __device__ void draw(const Draw<T> &a) {
    const Choices<T> &to = a.to;
    if (blockIdx.x >= Peers::count) return;
    wait_for_inputs();
    u32 row = blockIdx.y, width = to.width, each = (width + Peers::count - 1) / Peers::count;
    u64 start = (u64)row * width;
    u32 from = min(blockIdx.x * each, width);
    Stretch all = {a.probabilities + start, from, min(from + each, width)};
    float *p = all.row;

    // The softmax of the scaled logits. What rounds to no unit is never drawn, and not counted.
    float top = Max::identity(), sum = 0.0f;
    auto logit = [&](u32 i) {
        return penalized(a.penalty, widen(a.logits[start + i]), start + i);
    };
    float factor = a.inverse_temperature;
    all.each(logit, [&](u32 i, float v) { top = fmaxf(top, p[i] = v * factor); });
    top = over_peers<Max>(top);
    all.each([&](u32 i, float x) { sum += p[i] = expf(x - top); });
    sum = over_peers<Sum>(sum);
    bool finite = isfinite(sum);
    __shared__ Bins coarse;
    coarse.clear();
    all.each([&](u32 i, float e) {
        float v = finite ? e / sum : 0.0f;
        p[i] = v = units(v) ? v : 0.0f;
        if (v > 0.0f) coarse.add(__float_as_uint(v) >> 20, v);
    });
    coarse.merge();

    u32 token = 0;
    if (finite) {
        __shared__ Mass counted;
        Mass bin = mass(coarse.counts[threadIdx.x], coarse.sums[threadIdx.x]);
        Mass before = before_this(bin);
        if (threadIdx.x == DRAWERS - 1) counted = before + bin;
        __syncthreads();
        u32 left = part(counted, false);
        if (a.top_k && a.top_k < part(counted, true))
            left = part(by_size(all, coarse, true, a.top_k - 1).sum, false);
        if (a.top_p > 0.0f) {
            u32 enough = __double2uint_ru((double)a.top_p * left);
            left = part(by_size(all, coarse, false, enough - 1).sum, false);
        }
        float uniform = a.uniforms[(u64)(*to.held - to.first) * to.rows + row];
        u32 mark = __double2uint_rd((double)uniform * left);
        bool sorted = a.top_k || a.top_p > 0.0f;
        token = sorted ? by_size(all, coarse, false, mark).at
                       : in_order(all, 31, 0, false, mark, 0).at;
    }
    if (blockIdx.x) return;
    if (threadIdx.x == 0) put(to, a.penalty, row, ranked(sum, token));
    if (is_last(to.done, to.rows) && threadIdx.x == 0) *to.held += 1;
}

// ---- what the host calls ------------------------------------------------------------------------

#define ALL(T, t)                                                                                  \
    extern "C" __global__ void __launch_bounds__(CHOOSERS) choose_##t(Choose<T> a) {               \
        choose<T>(a);                                                                              \
    }                                                                                              \
    extern "C" __global__ void CLUSTER __launch_bounds__(DRAWERS) draw_##t(Draw<T> a) {            \
        draw<T>(a);                                                                                \
    }

ALL(float, f32)
ALL(bf16, bf16)
