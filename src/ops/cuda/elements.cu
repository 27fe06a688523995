// Element-wise ops, and layouts by heads, of prefill and training: one launch each, in the tensors'
// own type with f32 arithmetic. Each is the twin of a CPU kernel in src/ops.
#include "common.cuh"

// ---- element by element: n of them, in packs of N -----------------------------------------------

struct Add { static __device__ float of(float a, float b) { return a + b; } };
struct Mul { static __device__ float of(float a, float b) { return a * b; } };
template <typename Act> struct Of {
    static __device__ float of(float x, float) { return Act::of(x); }
};
template <typename Act> struct Grad {
    static __device__ float of(float x, float dy) { return Act::grad(x, dy); }
};

// The first element of this thread's pack.
template <int N> __device__ __forceinline__ u64 first_of_thread() {
    return ((u64)blockIdx.x * ELEMENT_THREADS + threadIdx.x) * N;
}

// out = op(a, b), b again and again where it has fewer elements: `period` of them.
template <typename Op, typename T, int N> __device__ void map(const Map<T> &a) {
    u64 i = first_of_thread<N>();
    if (i >= a.n) return;
    float x[N], y[N];
    load<N>(a.a + i, x);
    if (a.period == 1) {
        float one = widen(a.b[0]);
#pragma unroll
        for (int j = 0; j < N; j++) y[j] = one;
    } else {
        load<N>(a.b + (a.period == a.n ? i : i % a.period), y);
    }
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = Op::of(x[j], y[j]);
    store<N>(a.out + i, x);
}

// act = the gate's activation, out = act · up
template <typename Act, typename T, int N> __device__ void gated(const Gated<T> &a) {
    u64 i = first_of_thread<N>();
    if (i >= a.n) return;
    float g[N], u[N];
    load<N>(a.gate + i, g);
    load<N>(a.up + i, u);
#pragma unroll
    for (int j = 0; j < N; j++) {
        g[j] = rounded<T>(Act::of(g[j]));
        u[j] *= g[j];
    }
    if (a.act) store<N>(a.act + i, g);
    store<N>(a.out + i, u);
}

// From dy, the gradient of `out` there: towards the gate its derivative · dy · up, towards up
// dy · act.
template <typename Act, typename T, int N> __device__ void gated_grad(const GatedGrad<T> &a) {
    u64 i = first_of_thread<N>();
    if (i >= a.n) return;
    float d[N], g[N], u[N], act[N];
    load<N>(a.dy + i, d);
    load<N>(a.gate + i, g);
    load<N>(a.up + i, u);
    load<N>(a.act + i, act);
#pragma unroll
    for (int j = 0; j < N; j++) {
        g[j] = Act::grad(g[j], rounded<T>(d[j] * u[j]));
        act[j] *= d[j];
    }
    store<N>(a.to_gate + i, g);
    store<N>(a.to_up + i, act);
}

// Each row of `out` += bias (n); rows are `stride` apart.
template <typename T> __device__ void add_bias(const AddBias<T> &a) {
    u32 i = (u32)first_of_thread<1>();
    if (i >= a.rows * a.n) return;
    T *to = a.out + (u64)(i / a.n) * a.stride + i % a.n;
    *to = narrow<T>(widen(*to) + widen(a.bias[i % a.n]));
}

// ---- layouts, and positions ---------------------------------------------------------------------

// (A, B, C, d) → (A, C, B, d), N elements of d at a time. With `cos`, each vector of d is rotated
// by its position, element i paired with element i + d/2, times `sign` (1 or −1) the angle: the
// position is `past` plus the index along B (if `inner` is 0) or along C. With `factor`, times it.
template <typename T, int N> __device__ void heads(const Heads<T> &a) {
    u64 index = first_of_thread<1>();
    if (index >= a.pairs) return;
    u32 half = a.d / 2, per_vector = half / N;
    u32 i = (u32)(index % per_vector) * N;
    u64 vector = index / per_vector; // of the input
    u32 k = (u32)(vector % a.c), j = (u32)(vector / a.c % a.b);
    u64 outer = vector / ((u64)a.b * a.c);
    float x[N], y[N];
    load<N>(a.x + vector * a.d + i, x);
    load<N>(a.x + vector * a.d + half + i, y);
    if (a.cos) {
        u64 row = (u64)(a.past + (a.inner ? k : j)) * half + i;
        float co[N], si[N];
        load<N>(a.cos + row, co);
        load<N>(a.sin + row, si);
#pragma unroll
        for (int n = 0; n < N; n++) {
            float s = a.sign * si[n], first = x[n];
            x[n] = first * co[n] - y[n] * s;
            y[n] = first * s + y[n] * co[n];
        }
    }
    if (a.factor) {
        float f = widen(a.factor[0]);
#pragma unroll
        for (int n = 0; n < N; n++) x[n] *= f, y[n] *= f;
    }
    T *to = a.out + ((outer * a.c + k) * a.b + j) * a.d;
    store<N>(to + i, x);
    store<N>(to + half + i, y);
}

// ---- what the host calls: NAME_TYPE, or NAME_TYPE_N ---------------------------------------------

#define MAP(T, t, N, NAME, ...)                                                                    \
    extern "C" __global__ void NAME##_##t##_##N(Map<T> a) { map<__VA_ARGS__, T, N>(a); }

#define GATED(T, t, N, NAME, ACT)                                                                  \
    extern "C" __global__ void gated_##NAME##_##t##_##N(Gated<T> a) { gated<ACT, T, N>(a); }       \
    extern "C" __global__ void gated_##NAME##_grad_##t##_##N(GatedGrad<T> a) {                     \
        gated_grad<ACT, T, N>(a);                                                                  \
    }

#define PACKED(T, t, N)                                                                            \
    MAP(T, t, N, add, Add)                                                                         \
    MAP(T, t, N, mul, Mul)                                                                         \
    MAP(T, t, N, silu, Of<Silu>)                                                                   \
    MAP(T, t, N, silu_grad, Grad<Silu>)                                                            \
    MAP(T, t, N, gelu, Of<Gelu>)                                                                   \
    MAP(T, t, N, gelu_grad, Grad<Gelu>)                                                            \
    GATED(T, t, N, silu, Silu)                                                                     \
    GATED(T, t, N, gelu, Gelu)                                                                     \
    extern "C" __global__ void heads_##t##_##N(Heads<T> a) { heads<T, N>(a); }

#define ALL(T, t)                                                                                  \
    PACKS(PACKED, T, t)                                                                            \
    extern "C" __global__ void add_bias_##t(AddBias<T> a) { add_bias<T>(a); }

ALL(float, f32)
ALL(bf16, bf16)
