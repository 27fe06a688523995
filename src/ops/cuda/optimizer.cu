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

// p ← decay·p − rate · m / (√v / correction + eps) over N elements of a state (3, n) of p, m and v,
// from the gradient times the factor that clips it; p where the model reads it in bf16, too.
template <int N, typename T>
__device__ __forceinline__ void update(const Updated<T> &of, const AdamWFactors<T> &by, u64 i) {
    float g[N], p[N], m[N], v[N];
    load<N>(of.gradient + i, g);
    load<N>(of.state + i, p);
    load<N>(of.state + of.n + i, m);
    load<N>(of.state + 2 * of.n + i, v);
#pragma unroll
    for (int j = 0; j < N; j++) {
        g[j] *= by.clip;
        m[j] = by.b1 * m[j] + by.rest1 * g[j];
        v[j] = by.b2 * v[j] + by.rest2 * g[j] * g[j];
        p[j] = by.decay * p[j] - by.rate * m[j] / (sqrtf(v[j]) / by.correction + by.eps);
    }
    store<N>(of.state + i, p);
    store<N>(of.state + of.n + i, m);
    store<N>(of.state + 2 * of.n + i, v);
    if (of.narrow) store<N>(of.narrow + i, p);
}

template <typename T> __device__ void adamw(const AdamW<T> &a) {
    const Updated<T> &of = a.tensors[tensor_of_block(a.tensors)];
    u32 block = blockIdx.x - of.first;
    if (of.packed)
        each_pack<8, UPDATED>(block, of.n, [&](u64 i) { update<8>(of, a.by, i); });
    else
        each_pack<1, UPDATED>(block, of.n, [&](u64 i) { update<1>(of, a.by, i); });
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
        adamw<T>(a);                                                                               \
    }

ALL(float, f32)
ALL(bf16, bf16)
