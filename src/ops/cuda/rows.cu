// Row-wise and element-wise ops of prefill and training, one launch each, in the tensors' own type
// with f32 arithmetic. Each is the twin of a CPU kernel in src/ops.
#include "common.cuh"

// ---- element by element: a, b and out of n elements, in packs of N ------------------------------

struct Add { static __device__ float of(float a, float b) { return a + b; } };
struct Mul { static __device__ float of(float a, float b) { return a * b; } };
// x / (1 + exp(−x))
struct Silu { static __device__ float of(float x, float) { return __fdividef(x, 1.0f + __expf(-x)); } };
// dy · s · (1 + x · (1 − s)), s = 1 / (1 + exp(−x))
struct SiluGrad {
    static __device__ float of(float x, float dy) {
        float s = __fdividef(1.0f, 1.0f + __expf(-x));
        return dy * s * (1.0f + x * (1.0f - s));
    }
};

// b again and again where it has fewer elements: `period` of them.
template <typename Op, typename T, int N>
__device__ void map(T *out, const T *a, const T *b, u64 n, u64 period) {
    u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= n) return;
    float x[N], y[N];
    load<N>(a + i, x);
    if (period == 1) {
        float one = widen(b[0]);
#pragma unroll
        for (int j = 0; j < N; j++) y[j] = one;
    } else {
        load<N>(b + (period == n ? i : i % period), y);
    }
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = Op::of(x[j], y[j]);
    store<N>(out + i, x);
}

// act = silu(gate), out = act · up
template <typename T, int N>
__device__ void gated(T *act, T *out, const T *gate, const T *up, u64 n) {
    u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= n) return;
    float g[N], u[N];
    load<N>(gate + i, g);
    load<N>(up + i, u);
#pragma unroll
    for (int j = 0; j < N; j++) {
        g[j] = rounded<T>(Silu::of(g[j], 0.0f));
        u[j] *= g[j];
    }
    if (act) store<N>(act + i, g);
    store<N>(out + i, u);
}

// x += bias (n), rows of x being `width` apart
template <typename T>
__device__ void add_bias(T *x, const T *bias, u32 rows, u32 width, u32 n) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * n) return;
    T *to = x + (u64)(i / n) * width + i % n;
    *to = narrow<T>(widen(*to) + widen(bias[i % n]));
}

// From dy, the gradient of `out` there: dgate = silu'(gate) · dy · up and dup = dy · act.
template <typename T, int N>
__device__ void gated_grad(T *dgate, T *dup, const T *dy, const T *gate, const T *up, const T *act,
                           u64 n) {
    u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= n) return;
    float d[N], g[N], u[N], a[N];
    load<N>(dy + i, d);
    load<N>(gate + i, g);
    load<N>(up + i, u);
    load<N>(act + i, a);
#pragma unroll
    for (int j = 0; j < N; j++) {
        g[j] = SiluGrad::of(g[j], rounded<T>(d[j] * u[j]));
        a[j] *= d[j];
    }
    store<N>(dgate + i, g);
    store<N>(dup + i, a);
}

// ---- row by row ---------------------------------------------------------------------------------

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
    __device__ void put(T *p) const {
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
// r % seq, behind `past` earlier tokens, and −∞ is added after its own position.
template <typename T, int N, int K, int THREADS>
__device__ void softmax(T *x, u64 rows, u32 width, u32 seq, u32 past) {
    u64 row = row_of_thread<THREADS>();
    if (row >= rows) return;
    T *p = x + row * width;
    Row<T, N, K, THREADS> r(width);
    r.fill(p);
    if (seq) {
        u32 seen = past + 1 + (u32)(row % seq);
        r.each([&](float &v, u32 i, int, int) { v += i < seen ? 0.0f : -INFINITY; });
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
__device__ void softmax_grad(T *dx, const T *y, const T *dy, u64 rows, u32 width) {
    u64 row = row_of_thread<THREADS>();
    if (row >= rows) return;
    Row<T, N, K, THREADS> a(width), b(width);
    a.fill(y + row * width);
    b.fill(dy + row * width);
    float sum = 0.0f;
    a.each([&](float &v, u32, int k, int j) { sum += v * b.v[k][j]; });
    sum = reduce<Sum, THREADS>(sum);
    a.each([&](float &v, u32, int k, int j) { v *= b.v[k][j] - sum; });
    a.put(dx + row * width);
}

// x / sqrt(mean(x²) + eps) · gain
template <typename T, int N, int K, int THREADS>
__device__ void rms_norm(T *y, const T *x, const T *gain, u64 rows, u32 width, float eps) {
    u64 row = row_of_thread<THREADS>();
    if (row >= rows) return;
    Row<T, N, K, THREADS> r(width), g(width);
    r.fill(x + row * width);
    g.fill(gain);
    float sum = 0.0f;
    r.each([&](float &v, u32, int, int) { sum += v * v; });
    float inverse = 1.0f / sqrtf(reduce<Sum, THREADS>(sum) / width + eps);
    r.each([&](float &v, u32, int k, int j) { v = v * inverse * g.v[k][j]; });
    r.put(y + row * width);
}

// i · (h − x · i² · Σ(h·x) / width), h = gain · dy, i = 1 / sqrt(mean(x²) + eps)
template <typename T, int N, int K, int THREADS>
__device__ void rms_norm_grad(T *dx, const T *x, const T *gain, const T *dy, u64 rows, u32 width,
                              float eps) {
    u64 row = row_of_thread<THREADS>();
    if (row >= rows) return;
    Row<T, N, K, THREADS> a(width), h(width);
    a.fill(x + row * width);
    h.fill(dy + row * width);
    float squares = 0.0f, product = 0.0f;
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (a.at(k) < width) {
            float g[N];
            load<N>(gain + a.at(k), g);
#pragma unroll
            for (int j = 0; j < N; j++) {
                h.v[k][j] *= g[j];
                squares += a.v[k][j] * a.v[k][j];
                product += h.v[k][j] * a.v[k][j];
            }
        }
    }
    float i = 1.0f / sqrtf(reduce<Sum, THREADS>(squares) / width + eps);
    float c = i * i * reduce<Sum, THREADS>(product) / width;
    h.each([&](float &v, u32, int k, int j) { v = i * (v - c * a.v[k][j]); });
    h.put(dx + row * width);
}

// Logits become exp(logit − max), in place; the loss of each row's target and its sum beside them.
template <typename T, int N>
__device__ void cross_entropy(T *x, const u32 *targets, float *losses, float *sums, u32 width) {
    T *p = x + (u64)blockIdx.x * width;
    u32 target = targets[blockIdx.x];
    float logit = widen(p[target]);
    float v[N], max = Max::identity(), sum = 0.0f;
    for (u32 i = threadIdx.x * N; i < width; i += 1024 * N) {
        load<N>(p + i, v);
#pragma unroll
        for (int j = 0; j < N; j++) max = Max::of(max, v[j]);
    }
    max = reduce<Max, 1024>(max);
    for (u32 i = threadIdx.x * N; i < width; i += 1024 * N) {
        load<N>(p + i, v);
#pragma unroll
        for (int j = 0; j < N; j++) sum += v[j] = __expf(v[j] - max);
        store<N>(p + i, v);
    }
    sum = reduce<Sum, 1024>(sum);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(sum) - (logit - max);
        sums[blockIdx.x] = sum;
    }
}

// Exponentials become weight · (exponential / sum − 1 at the target), in place.
template <typename T, int N>
__device__ void cross_entropy_grad(T *x, const u32 *targets, const float *weights,
                                   const float *sums, u32 width) {
    u64 row = blockIdx.y;
    u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= width) return;
    float v[N], weight = weights[row], factor = weight / sums[row];
    u32 target = targets[row];
    load<N>(x + row * width + i, v);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = v[j] * factor - (i + j == target ? weight : 0.0f);
    store<N>(x + row * width + i, v);
}

// ---- layouts, and positions ---------------------------------------------------------------------

// (A, B, C, d) → (A, C, B, d), N elements of d at a time. With `cos`, each vector of d is rotated
// by its position, element i paired with element i + d/2, times `turn` (1 or −1) the angle: the
// position is `past` plus the index along B (if `inner` is 0) or along C. With `factor`, times it.
template <typename T, int N>
__device__ void heads(T *out, const T *in, const T *cos, const T *sin, const T *factor, u32 b,
                      u32 c, u32 d, u32 past, u32 inner, float turn, u64 pairs) {
    u64 index = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= pairs) return;
    u32 half = d / 2, per_vector = half / N;
    u32 i = (u32)(index % per_vector) * N;
    u64 vector = index / per_vector; // of the input
    u32 k = (u32)(vector % c), j = (u32)(vector / c % b);
    u64 a = vector / ((u64)b * c);
    float x[N], y[N];
    load<N>(in + vector * d + i, x);
    load<N>(in + vector * d + half + i, y);
    if (cos) {
        u64 row = (u64)(past + (inner ? k : j)) * half + i;
        float co[N], si[N];
        load<N>(cos + row, co);
        load<N>(sin + row, si);
#pragma unroll
        for (int n = 0; n < N; n++) {
            float s = turn * si[n], first = x[n];
            x[n] = first * co[n] - y[n] * s;
            y[n] = first * s + y[n] * co[n];
        }
    }
    if (factor) {
        float f = widen(factor[0]);
#pragma unroll
        for (int n = 0; n < N; n++) x[n] *= f, y[n] *= f;
    }
    T *to = out + ((a * c + k) * b + j) * d;
    store<N>(to + i, x);
    store<N>(to + half + i, y);
}

// ---- whole tensors ------------------------------------------------------------------------------

// *sum += Σ x², in f64 between blocks.
template <typename T> __device__ void sum_squares(double *sum, const T *x, u64 n) {
    float mine = 0.0f;
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        float v = widen(x[i]);
        mine += v * v;
    }
    mine = reduce<Sum, 256>(mine);
    if (threadIdx.x == 0) atomicAdd(sum, (double)mine);
}

// p ← decay·p − rate · m / (√v / correction + eps) over a state (3, n) of p, m and v.
extern "C" __global__ void adamw(float *state, const float *gradient, u64 n, float decay,
                                 float rate, float correction, float eps, float b1, float b2,
                                 float rest1, float rest2) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float g = gradient[i];
    float m = b1 * state[n + i] + rest1 * g;
    float v = b2 * state[2 * n + i] + rest2 * g * g;
    float p = decay * state[i] - rate * m / (sqrtf(v) / correction + eps);
    state[i] = p;
    state[n + i] = m;
    state[2 * n + i] = v;
}

// ---- what the host calls: NAME_TYPE, with _N or _K_THREADS where there are several ----------------

#define MAPS(T, t, N)                                                                              \
    extern "C" __global__ void add_##t##_##N(T *o, const T *a, const T *b, u64 n, u64 p) {         \
        map<Add, T, N>(o, a, b, n, p);                                                             \
    }                                                                                              \
    extern "C" __global__ void mul_##t##_##N(T *o, const T *a, const T *b, u64 n, u64 p) {         \
        map<Mul, T, N>(o, a, b, n, p);                                                             \
    }                                                                                              \
    extern "C" __global__ void silu_##t##_##N(T *o, const T *a, const T *b, u64 n, u64 p) {        \
        map<Silu, T, N>(o, a, b, n, p);                                                            \
    }                                                                                              \
    extern "C" __global__ void silu_grad_##t##_##N(T *o, const T *a, const T *b, u64 n, u64 p) {   \
        map<SiluGrad, T, N>(o, a, b, n, p);                                                        \
    }                                                                                              \
    extern "C" __global__ void gated_##t##_##N(T *s, T *o, const T *g, const T *u, u64 n) {        \
        gated<T, N>(s, o, g, u, n);                                                                \
    }                                                                                              \
    extern "C" __global__ void gated_grad_##t##_##N(T *dg, T *du, const T *d, const T *g,          \
                                                    const T *u, const T *a, u64 n) {               \
        gated_grad<T, N>(dg, du, d, g, u, a, n);                                                   \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024)                                             \
        cross_entropy_##t##_##N(T *x, const u32 *g, float *l, float *s, u32 w) {                   \
        cross_entropy<T, N>(x, g, l, s, w);                                                        \
    }                                                                                              \
    extern "C" __global__ void cross_entropy_grad_##t##_##N(T *x, const u32 *g, const float *w,    \
                                                            const float *s, u32 n) {               \
        cross_entropy_grad<T, N>(x, g, w, s, n);                                                   \
    }                                                                                              \
    extern "C" __global__ void heads_##t##_##N(T *o, const T *x, const T *cos, const T *sin,       \
                                               const T *f, u32 b, u32 c, u32 d, u32 past,          \
                                               u32 inner, float turn, u64 pairs) {                 \
        heads<T, N>(o, x, cos, sin, f, b, c, d, past, inner, turn, pairs);                         \
    }

// Rows of one warp each come four to a block.
#define BLOCK(THREADS) (THREADS == 32 ? 128 : THREADS)

#define ROWS(T, t, N, K, THREADS)                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK(THREADS))                                   \
        softmax_##t##_##N##_##K##_##THREADS(T *x, u64 r, u32 w, u32 s,      \
                                                                   u32 p) {                        \
        softmax<T, N, K, THREADS>(x, r, w, s, p);                                                  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK(THREADS)) softmax_grad_##t##_##N##_##K##_##THREADS(T *o, const T *y,          \
                                                                        const T *d, u64 r,         \
                                                                        u32 w) {                   \
        softmax_grad<T, N, K, THREADS>(o, y, d, r, w);                                             \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK(THREADS)) rms_norm_##t##_##N##_##K##_##THREADS(T *o, const T *x, const T *g,  \
                                                                    u64 r, u32 w, float e) {       \
        rms_norm<T, N, K, THREADS>(o, x, g, r, w, e);                                              \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK(THREADS)) rms_norm_grad_##t##_##N##_##K##_##THREADS(                          \
        T *o, const T *x, const T *g, const T *d, u64 r, u32 w, float e) {                         \
        rms_norm_grad<T, N, K, THREADS>(o, x, g, d, r, w, e);                                      \
    }

#define WHOLE(T, t)                                                                                \
    extern "C" __global__ void add_bias_##t(T *x, const T *b, u32 rows, u32 width, u32 n) {        \
        add_bias<T>(x, b, rows, width, n);                                                         \
    }                                                                                              \
    extern "C" __global__ void sum_squares_##t(double *s, const T *x, u64 n) {                     \
        sum_squares<T>(s, x, n);                                                                   \
    }

#define ALL(T, t)                                                                                  \
    MAPS(T, t, 1)                                                                                  \
    MAPS(T, t, 8)                                                                                  \
    ROWS(T, t, 1, 8, 32)                                                                           \
    ROWS(T, t, 1, 8, 256)                                                                          \
    ROWS(T, t, 8, 1, 32)                                                                           \
    ROWS(T, t, 8, 2, 32)                                                                           \
    ROWS(T, t, 8, 4, 32)                                                                           \
    ROWS(T, t, 8, 1, 256)                                                                          \
    ROWS(T, t, 8, 2, 256)                                                                          \
    ROWS(T, t, 8, 4, 256)                                                                          \
    ROWS(T, t, 8, 4, 1024)                                                                         \
    WHOLE(T, t)

ALL(float, f32)
ALL(bf16, bf16)
