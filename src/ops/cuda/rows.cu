// Row-wise ops of prefill and training, one launch each, in the tensors' own type with f32
// arithmetic. Each is the twin of a CPU kernel in src/ops.
#include "common.cuh"
#include <float.h>

// A row that THREADS threads hold in registers: K packs of N elements each, at most.
template <typename T, int N, int K, int THREADS> struct Row {
    float v[K][N];
    int lane;
    u32 width;

    __device__ Row(u32 width) : lane(threadIdx.x % THREADS), width(width) {}
    __device__ u32 at(int k) const { return (k * THREADS + lane) * N; }
    __device__ void fill(const T *p) {
#pragma unroll
        for (int k = 0; k < K; k++)
            if (at(k) < width) load<N>(p + at(k), v[k]);
    }
    template <typename U> __device__ void put(U *p) const {
#pragma unroll
        for (int k = 0; k < K; k++)
            if (at(k) < width) store<N>(p + at(k), v[k]);
    }
    // f(element, its index in the row, its pack, its place in the pack)
    template <typename F> __device__ void each(F f) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (at(k) < width) {
#pragma unroll
                for (int j = 0; j < N; j++) f(v[k][j], at(k) + j, k, j);
            }
        }
    }
};

template <int THREADS> __device__ __forceinline__ u64 row_of_thread() {
    return (u64)blockIdx.x * (blockDim.x / THREADS) + threadIdx.x / THREADS;
}

// In place: x + mask, then exp(x − max) / sum. With seq > 0 the mask is causal: row r is the query
// r % seq, whose own key is as much after `own`, and −∞ is added to what it does not see.
template <typename T, int N, int K, int THREADS> __device__ void softmax(const Softmax<T> &a) {
    u64 row = row_of_thread<THREADS>();
    if (row >= a.rows) return;
    T *p = a.x + row * a.width;
    Row<T, N, K, THREADS> r(a.width);
    r.fill(p);
    if (a.seq) {
        Seen seen(a.own + 1 + (u32)(row % a.seq), a.window);
        r.each([&](float &v, u32 i, int, int) { v += seen.has(i) ? 0.0f : -INFINITY; });
    }
    float max = Max::identity();
    r.each([&](float &v, u32, int, int) { max = Max::of(max, v); });
    max = reduce<Max, THREADS>(max);
    float sum = 0.0f;
    r.each([&](float &v, u32, int, int) { sum += v = __expf(v - max); });
    float inverse = 1.0f / reduce<Sum, THREADS>(sum);
    r.each([&](float &v, u32, int, int) { v *= inverse; });
    r.put(p);
}

// y · (dy − Σ y·dy)
template <typename T, int N, int K, int THREADS>
__device__ void softmax_grad(const SoftmaxGrad<T> &args) {
    u64 row = row_of_thread<THREADS>();
    if (row >= args.rows) return;
    u64 start = row * args.width;
    Row<T, N, K, THREADS> a(args.width), b(args.width);
    a.fill(args.y + start);
    b.fill(args.dy + start);
    float sum = 0.0f;
    a.each([&](float &v, u32, int k, int j) { sum += v * b.v[k][j]; });
    sum = reduce<Sum, THREADS>(sum);
    a.each([&](float &v, u32, int k, int j) { v *= b.v[k][j] - sum; });
    a.put(args.dx + start);
}

// x / sqrt(mean(x²) + eps) · (shift + gain)
template <typename T, int N, int K, int THREADS> __device__ void rms_norm(const RmsNorm<T> &a) {
    u64 row = row_of_thread<THREADS>();
    if (row >= a.rows) return;
    Row<T, N, K, THREADS> r(a.width), g(a.width);
    r.fill(a.x + row * a.width);
    g.fill(a.norm.gain);
    float sum = 0.0f;
    r.each([&](float &v, u32, int, int) { sum += v * v; });
    float inverse = 1.0f / sqrtf(reduce<Sum, THREADS>(sum) / a.width + a.norm.eps);
    r.each([&](float &v, u32, int k, int j) { v = v * inverse * (a.norm.shift + g.v[k][j]); });
    r.put(a.y + row * a.width);
}

// Codes of x / scale, where scale is the row's largest magnitude / 448. A NaN is passed over there, and
// has its code. As on the CPU, x is multiplied by 1 / scale, so that both give the same codes.
template <typename T, int N, int K, int THREADS> __device__ void quantize(const Quantize<T> &a) {
    u64 row = row_of_thread<THREADS>();
    if (row >= a.rows) return;
    Row<T, N, K, THREADS> r(a.width);
    r.fill(a.x + row * a.width);
    float most = 0x1p-100f; // of a row of zeros
    r.each([&](float &v, u32, int, int) { most = Max::of(most, fabsf(v)); });
    float scale = __fdiv_rn(reduce<Max, THREADS>(most), 448.0f), inverse = __frcp_rn(scale);
    r.each([&](float &v, u32, int, int) { v *= inverse; });
    r.put(a.codes + row * a.width);
    if (r.lane == 0) a.scales[row] = scale;
}

// i · (h − x · i² · Σ(h·x) / width), h = gain · dy, i = 1 / sqrt(mean(x²) + eps)
template <typename T, int N, int K, int THREADS>
__device__ void rms_norm_grad(const RmsNormGrad<T> &args) {
    u64 row = row_of_thread<THREADS>();
    if (row >= args.rows) return;
    u64 start = row * args.width;
    Row<T, N, K, THREADS> a(args.width), h(args.width);
    a.fill(args.x + start);
    h.fill(args.dy + start);
    float squares = 0.0f, product = 0.0f;
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (a.at(k) < args.width) {
            float g[N];
            load<N>(args.gain + a.at(k), g);
#pragma unroll
            for (int j = 0; j < N; j++) {
                h.v[k][j] *= g[j];
                squares += a.v[k][j] * a.v[k][j];
                product += h.v[k][j] * a.v[k][j];
            }
        }
    }
    float i = 1.0f / sqrtf(reduce<Sum, THREADS>(squares) / args.width + args.eps);
    float c = i * i * reduce<Sum, THREADS>(product) / args.width;
    h.each([&](float &v, u32, int k, int j) { v = i * (v - c * a.v[k][j]); });
    h.put(args.dx + start);
}

// f(index of a pack's first element) for those packs of a row that are this thread's.
template <int N, typename F> __device__ __forceinline__ void each_of_logits(u32 width, F f) {
#pragma unroll 2
    for (u32 i = threadIdx.x * N; i < width; i += CROSS_ENTROPY_THREADS * N) f(i);
}

// A block a row: the loss at the row's target, log Σ exp(x − max) − (x − max). Maximum and sum come
// from one reading, the sum shrinking where a larger logit comes. With weights the row is read once
// more, which the L2 cache has by then, and becomes weight · (exp(x − max) / sum − 1 at the target).
template <typename T, int N> __device__ void cross_entropy(const CrossEntropy<T> &a) {
    constexpr int THREADS = CROSS_ENTROPY_THREADS;
    T *p = a.x + (u64)blockIdx.x * a.width;
    u32 target = a.targets[blockIdx.x];
    float logit = widen(p[target]);
    // A number, so that a thread without elements, or with none above −∞, adds 0 and no NaN.
    float mine = -FLT_MAX, sum = 0.0f;
    each_of_logits<N>(a.width, [&](u32 i) {
        float v[N], most = mine;
        load<N>(p + i, v);
#pragma unroll
        for (float x : v) most = Max::of(most, x);
        sum *= __expf(mine - most);
        mine = most;
#pragma unroll
        for (float x : v) sum += __expf(x - most);
    });
    float max = reduce<Max, THREADS>(mine);
    sum = reduce<Sum, THREADS>(sum * __expf(mine - max));
    if (threadIdx.x == 0) a.losses[blockIdx.x] = logf(sum) - (logit - max);
    if (!a.weights) return;
    float weight = a.weights[blockIdx.x], factor = weight / sum;
    each_of_logits<N>(a.width, [&](u32 i) {
        float v[N] = {};
        // What is not to be learnt is not read, and is 0 whatever it would be.
        if (weight != 0.0f) {
            load<N>(p + i, v);
#pragma unroll
            for (int j = 0; j < N; j++)
                v[j] = __expf(v[j] - max) * factor - (i + j == target ? weight : 0.0f);
        }
        store<N>(p + i, v);
    });
}

// ---- what the host calls: NAME_TYPE_N, or NAME_TYPE_N_K_THREADS ---------------------------------

#define ROW_KERNEL(T, t, N, K, THREADS, NAME, ARGS)                                                \
    extern "C" __global__ void __launch_bounds__(                                                  \
        THREADS > WARP_ROWS_THREADS ? THREADS : WARP_ROWS_THREADS)                                 \
        NAME##_##t##_##N##_##K##_##THREADS(ARGS<T> a) {                                            \
        NAME<T, N, K, THREADS>(a);                                                                 \
    }

#define ROWS(T, t, N, K, THREADS)                                                                  \
    ROW_KERNEL(T, t, N, K, THREADS, softmax, Softmax)                                              \
    ROW_KERNEL(T, t, N, K, THREADS, softmax_grad, SoftmaxGrad)                                     \
    ROW_KERNEL(T, t, N, K, THREADS, rms_norm, RmsNorm)                                             \
    ROW_KERNEL(T, t, N, K, THREADS, quantize, Quantize)                                            \
    ROW_KERNEL(T, t, N, K, THREADS, rms_norm_grad, RmsNormGrad)

#define LOGITS(T, t, N)                                                                            \
    extern "C" __global__ void __launch_bounds__(CROSS_ENTROPY_THREADS)                            \
        cross_entropy_##t##_##N(CrossEntropy<T> a) {                                               \
        cross_entropy<T, N>(a);                                                                    \
    }

#define ALL(T, t)                                                                                  \
    ROW_SHAPES(ROWS, T, t)                                                                         \
    PACKS(LOGITS, T, t)

ALL(float, f32)
ALL(bf16, bf16)
