// What all kernels share: element types with f32 arithmetic, eight elements at a time, and sums
// over the threads of a warp or a block.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char e4m3; // its bits

// What the host goes by too: how work is cut, and what each kernel is given.
#include "shared.cuh"

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
template <typename T> __device__ __forceinline__ T narrow(float v);
template <> __device__ __forceinline__ float narrow<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float v) { return __float2bfloat16(v); }

// The value after a round trip through T: what a tensor of T would hold between two ops.
template <typename T> __device__ __forceinline__ float rounded(float v) {
    return widen(narrow<T>(v));
}

// N consecutive elements, N being 1 or 8; of 8, the first lies at a multiple of 16 bytes.
template <int N> __device__ __forceinline__ void load(const bf16 *p, float (&out)[N]) {
    if constexpr (N == 8) {
        uint4 raw = *reinterpret_cast<const uint4 *>(p);
        const __nv_bfloat162 *pairs = reinterpret_cast<const __nv_bfloat162 *>(&raw);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = __bfloat1622float2(pairs[i]);
            out[2 * i] = pair.x;
            out[2 * i + 1] = pair.y;
        }
    } else {
        out[0] = widen(p[0]);
    }
}

template <int N> __device__ __forceinline__ void load(const float *p, float (&out)[N]) {
    if constexpr (N == 8) {
        float4 a = reinterpret_cast<const float4 *>(p)[0];
        float4 b = reinterpret_cast<const float4 *>(p)[1];
        out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
        out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    } else {
        out[0] = p[0];
    }
}

template <int N> __device__ __forceinline__ void store(bf16 *p, const float (&in)[N]) {
    if constexpr (N == 8) {
        uint4 raw;
        __nv_bfloat162 *pairs = reinterpret_cast<__nv_bfloat162 *>(&raw);
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
        *reinterpret_cast<uint4 *>(p) = raw;
    } else {
        p[0] = narrow<bf16>(in[0]);
    }
}

template <int N> __device__ __forceinline__ void store(float *p, const float (&in)[N]) {
    if constexpr (N == 8) {
        reinterpret_cast<float4 *>(p)[0] = make_float4(in[0], in[1], in[2], in[3]);
        reinterpret_cast<float4 *>(p)[1] = make_float4(in[4], in[5], in[6], in[7]);
    } else {
        p[0] = in[0];
    }
}

// Two numbers in e4m3, the first in the lower byte: the nearest, of two the even one, and at most 448.
// Before 8.9 there is no such instruction, and the host starts nothing that asks for it.
__device__ __forceinline__ unsigned short narrowed(float first, float second) {
    unsigned short pair = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
#endif
    return pair;
}

// N of them, N being 1 or 8; of 8, the first lies at a multiple of 8 bytes.
template <int N> __device__ __forceinline__ void store(e4m3 *p, const float (&in)[N]) {
    if constexpr (N == 8) {
        ushort4 pairs = make_ushort4(narrowed(in[0], in[1]), narrowed(in[2], in[3]),
                                     narrowed(in[4], in[5]), narrowed(in[6], in[7]));
        *reinterpret_cast<ushort4 *>(p) = pairs;
    } else {
        p[0] = (e4m3)(narrowed(in[0], 0.0f) & 255);
    }
}

// Eight elements as they lie in memory, so that those on their way take few registers.
template <typename T> struct Raw;
template <> struct Raw<bf16> {
    uint4 v;
    __device__ void fetch(const bf16 *p) { v = __ldcs(reinterpret_cast<const uint4 *>(p)); }
    __device__ void widen_to(float (&out)[8]) const {
        const __nv_bfloat162 *pairs = reinterpret_cast<const __nv_bfloat162 *>(&v);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = __bfloat1622float2(pairs[i]);
            out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
        }
    }
};
template <> struct Raw<float> {
    float4 a, b;
    __device__ void fetch(const float *p) {
        a = __ldcs(reinterpret_cast<const float4 *>(p));
        b = __ldcs(reinterpret_cast<const float4 *>(p) + 1);
    }
    __device__ void widen_to(float (&out)[8]) const {
        out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
        out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    }
};

struct Sum {
    static __device__ __forceinline__ float identity() { return 0.0f; }
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
// A NaN is passed over; whoever subtracts the maximum from it will see it.
struct Max {
    static __device__ __forceinline__ float identity() { return -INFINITY; }
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// Over THREADS threads, 32 or the whole block; every one of them gets the result.
template <typename Op, int THREADS> __device__ __forceinline__ float reduce(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = Op::of(v, __shfl_xor_sync(~0u, v, mask));
    if constexpr (THREADS > 32) {
        __shared__ float parts[THREADS / 32];
        __syncthreads(); // an earlier call's parts have been read
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
        __syncthreads();
        v = parts[0];
#pragma unroll
        for (int i = 1; i < THREADS / 32; i++) v = Op::of(v, parts[i]);
    }
    return v;
}

// x / (1 + exp(−x)), and dy · s · (1 + x · (1 − s)), s = 1 / (1 + exp(−x))
struct Silu {
    static __device__ __forceinline__ float of(float x) {
        return __fdividef(x, 1.0f + __expf(-x));
    }
    static __device__ __forceinline__ float grad(float x, float dy) {
        float s = __fdividef(1.0f, 1.0f + __expf(-x));
        return dy * s * (1.0f + x * (1.0f - s));
    }
};
// GELU by its tanh, x · (1 + tanh(√(2/π) · (x + 0.044715·x³))) / 2: x / (1 + exp(x · (A + B·x²))).
struct Gelu {
    static constexpr float A = -1.5957691216057308f, B = 0.044715f * A;

    static __device__ __forceinline__ float sigmoid(float x) {
        return __fdividef(1.0f, 1.0f + __expf(x * (A + B * x * x)));
    }
    static __device__ __forceinline__ float of(float x) { return x * sigmoid(x); }
    static __device__ __forceinline__ float grad(float x, float dy) {
        float s = sigmoid(x);
        return dy * s * (1.0f + x * (1.0f - s) * (-A - 3.0f * B * x * x));
    }
};

// A gate's activation, GELU or SiLU, told apart without a branch.
__device__ __forceinline__ float activated(float x, bool gelu) {
    float a = gelu ? Gelu::A : -1.0f, b = gelu ? Gelu::B : 0.0f;
    return __fdividef(x, 1.0f + __expf(x * (a + b * x * x)));
}

// Below any score, yet a number: a share without keys weighs exp(NONE − max) = 0.
constexpr float NONE = -1e30f;

// The tokens that a query sees: of `all`, its own and those before it, the last that a window shows.
struct Seen {
    u32 first, count;

    __device__ __forceinline__ Seen(u32 all, u32 window)
        : first(all > window ? all - window : 0), count(min(all, window)) {}
    // Below the first, the difference is a large number.
    __device__ __forceinline__ bool has(u32 token) const { return token - first < count; }
};

// Before what a kernel before this one wrote is read: no more than a fence unless the launch asked
// to overlap with that kernel's end.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start to fetch what does not depend on this one.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
