// The optimizer's step over many tensors a launch, each by blocks of its own; gradients are read in
// the type that they have.
#include "common.cuh"

// Which of the tensors the block is one of: the last whose first block is not after it.
template <typename Tensor, int COUNT>
__device__ __forceinline__ int tensor_of_block(const Tensor (&all)[COUNT]) {
    int at = 0;
#pragma unroll
    for (int step = COUNT / 2; step > 0; step /= 2)
        if (all[at + step].first <= blockIdx.x) at += step;
    return at;
}

// f(index of a pack's first element) for those packs of N elements, of n, that are this thread's:
// its block, the `block`th of the tensor, has SHARE elements.
template <int N, int SHARE, typename F>
__device__ __forceinline__ void each_pack(u32 block, u64 n, F f) {
    u64 start = (u64)block * SHARE;
#pragma unroll 4
    for (int i = threadIdx.x * N; i < SHARE; i += ELEMENT_THREADS * N)
        if (start + i < n) f(start + i);
}

// Σ x² of each tensor: in f32 within a block, in f64 and always in the same order between blocks.
template <typename T> __device__ void sum_squares(const SumSquares<T> &a) {
    int index = tensor_of_block(a.tensors);
    const Squared<T> &of = a.tensors[index];
    float mine = 0.0f;
    auto add = [&](auto &v) {
#pragma unroll
        for (float x : v) mine += x * x;
    };
    if (of.packed) {
        each_pack<8, SQUARED>(blockIdx.x - of.first, of.n, [&](u64 i) {
            float v[8];
            load<8>(of.x + i, v);
            add(v);
        });
    } else {
        each_pack<1, SQUARED>(blockIdx.x - of.first, of.n, [&](u64 i) {
            float v[1];
            load<1>(of.x + i, v);
            add(v);
        });
    }
    mine = reduce<Sum, ELEMENT_THREADS>(mine);

    // The block that is done last sums the parts of all.
    __shared__ bool is_last;
    u32 blocks = (u32)((of.n + SQUARED - 1) / SQUARED);
    if (threadIdx.x == 0) {
        a.parts[blockIdx.x] = mine;
        __threadfence();
        is_last = atomicAdd(a.done + index, 1u) + 1 == blocks;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    __shared__ double sums[ELEMENT_THREADS];
    double sum = 0.0;
    // Past the first cache, which may hold a neighbour's parts from before.
    for (u32 i = threadIdx.x; i < blocks; i += ELEMENT_THREADS) sum += __ldcg(a.parts + of.first + i);
    sums[threadIdx.x] = sum;
    for (int half = ELEMENT_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) a.sums[index] = sums[0];
}

// The bits that two moments of element i are rounded by, as src/ops/rounding.rs has them.
__device__ __forceinline__ u32 scrambled(u32 n) {
    n = (n ^ n >> 16) * 0x7feb352du;
    n = (n ^ n >> 15) * 0x846ca68bu;
    return n ^ n >> 16;
}
__device__ __forceinline__ u32 drawn(const u32 (&draws)[2], u64 i) {
    return scrambled(scrambled((u32)i ^ draws[0]) ^ (u32)(i >> 32) ^ draws[1]);
}

// A word whose upper half is x in bf16, away from zero where the noise of 16 bits carries into it.
__device__ __forceinline__ u32 noisy(float x, u32 noise) {
    u32 bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + noise;
}

// Both moments of N elements: f32, or in one word, the first in the lower half. Words come and go as
// floats, which nothing is done with.
template <int N, bool NARROW>
__device__ __forceinline__ void load_moments(const float *p, u64 n, float (&m)[N], float (&v)[N]) {
    load<N>(p, m);
    if constexpr (NARROW) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            u32 word = __float_as_uint(m[j]);
            m[j] = __uint_as_float(word << 16);
            v[j] = __uint_as_float(word & 0xffff0000u);
        }
    } else {
        load<N>(p + n, v);
    }
}

template <int N, bool NARROW>
__device__ __forceinline__ void store_moments(float *p, u64 n, float (&m)[N], const float (&v)[N],
                                              const u32 (&draws)[2], u64 i) {
    if constexpr (NARROW) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            u32 bits = drawn(draws, i + j);
            m[j] = __uint_as_float(noisy(m[j], bits & 0xffffu) >> 16 |
                                   noisy(v[j], bits >> 16) & 0xffff0000u);
        }
    } else {
        store<N>(p + n, v);
    }
    store<N>(p, m);
}

// p ← decay·p − rate · m / (√v / correction + eps) over N elements of a state of p, m and v, from the
// gradient times the factor that clips it; p where the model reads it in bf16, too.
template <int N, bool NARROW, typename T>
__device__ __forceinline__ void update(const Updated<T> &of, const AdamWFactors<T> &by, u64 i) {
    float g[N], p[N], m[N], v[N];
    float *moments = of.state + of.n + i;
    load<N>(of.gradient + i, g);
    load<N>(of.state + i, p);
    load_moments<N, NARROW>(moments, of.n, m, v);
#pragma unroll
    for (int j = 0; j < N; j++) {
        g[j] *= by.clip;
        m[j] = by.b1 * m[j] + by.rest1 * g[j];
        v[j] = by.b2 * v[j] + by.rest2 * g[j] * g[j];
        p[j] = by.decay * p[j] - by.rate * m[j] / (sqrtf(v[j]) / by.correction + by.eps);
    }
    store<N>(of.state + i, p);
    store_moments<N, NARROW>(moments, of.n, m, v, of.draws, i);
    if (of.narrow) store<N>(of.narrow + i, p);
}

template <typename T, bool NARROW> __device__ void adamw(const AdamW<T> &a) {
    const Updated<T> &of = a.tensors[tensor_of_block(a.tensors)];
    u32 block = blockIdx.x - of.first;
    if (of.packed)
        each_pack<8, UPDATED>(block, of.n, [&](u64 i) { update<8, NARROW>(of, a.by, i); });
    else
        each_pack<1, UPDATED>(block, of.n, [&](u64 i) { update<1, NARROW>(of, a.by, i); });
}

// out = sum + x, in f32
template <typename T, int N> __device__ void add_to_sum(const AddToSum<T> &a) {
    u64 i = ((u64)blockIdx.x * ELEMENT_THREADS + threadIdx.x) * N;
    if (i >= a.n) return;
    float sum[N], x[N];
    load<N>(a.sum + i, sum);
    load<N>(a.x + i, x);
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] += x[j];
    store<N>(a.out + i, sum);
}

// ---- what the host calls: NAME_TYPE, or NAME_TYPE_N ---------------------------------------------

// What is given stays where it is: a copy of it that is indexed would go to memory.
#define PACKED(T, t, N)                                                                            \
    extern "C" __global__ void add_to_sum_##t##_##N(AddToSum<T> a) { add_to_sum<T, N>(a); }

#define ALL(T, t)                                                                                  \
    PACKS(PACKED, T, t)                                                                            \
    extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS)                                  \
        sum_squares_##t(const __grid_constant__ SumSquares<T> a) {                                 \
        sum_squares<T>(a);                                                                         \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS)                                  \
        adamw_##t(const __grid_constant__ AdamW<T> a) {                                            \
        adamw<T, false>(a);                                                                        \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS)                                  \
        adamw_narrow_##t(const __grid_constant__ AdamW<T> a) {                                     \
        adamw<T, true>(a);                                                                         \
    }

ALL(float, f32)
ALL(bf16, bf16)
