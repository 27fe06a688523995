// Products by a warpgroup, four warps together, in bf16 with f32 sums: Hopper's `wgmma`.
#pragma once
#include "tensor_cores.cuh"

// Tiles lie in shared memory as panels of 64 columns: rows of 128 bytes, whose eight chunks are
// permuted by the row, so that a column of chunks lies in all banks. A panel begins at a multiple of
// 1,024 bytes.

// Where chunk `chunk` of row `row` begins, of a tile of `rows` rows.
__device__ __forceinline__ u32 chunk_at(u32 rows, u32 row, u32 chunk) {
    return chunk / 8 * rows * 128 + row * 128 + ((chunk ^ row) & 7) * 16;
}

// Other GPUs have no such instruction; the host's pass compiles what all have.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define HAS_WARPGROUPS

// What the instruction is told of a tile at `address`: that groups of eight rows are 1,024 bytes
// apart, and panels `panels` bytes, where rows are what is summed.
__device__ __forceinline__ u64 tile_at(u32 address, u32 panels = 16) {
    constexpr u64 GROUPS = 1024 >> 4, PERMUTED_BY_128 = 1;
    return (address >> 4 & 0x3fff) | (u64)(panels >> 4) << 16 | GROUPS << 32 | PERMUTED_BY_128 << 62;
}

// What copies wrote to shared memory is there for the products.
__device__ __forceinline__ void make_visible() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The compiler keeps these registers for what products read or write, until here.
template <int N> __device__ __forceinline__ void hold(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(u32 (&packs)[N][4]) {
#pragma unroll
    for (int i = 0; i < N * 4; i++) asm volatile("" : "+r"(packs[i / 4][i % 4])::"memory");
}

// Before products: registers that they read and write are as they should be.
__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// After them: `sums` are there.
template <int N> __device__ __forceinline__ void end_products(float (&sums)[N]) {
    asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(sums);
}

#define OLD(s, i)                                                                                  \
    "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]),    \
        "+f"(s[i + 6]), "+f"(s[i + 7])
#define NEW(s, i)                                                                                  \
    "=f"(s[i]), "=f"(s[i + 1]), "=f"(s[i + 2]), "=f"(s[i + 3]), "=f"(s[i + 4]), "=f"(s[i + 5]),    \
        "=f"(s[i + 6]), "=f"(s[i + 7])
#define FOR_32(EACH, s) EACH(s, 0), EACH(s, 8), EACH(s, 16), EACH(s, 24)
#define FOR_64(EACH, s)                                                                            \
    FOR_32(EACH, s), EACH(s, 32), EACH(s, 40), EACH(s, 48), EACH(s, 56)
#define NAMED_32                                                                                   \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"   \
    "%25,%26,%27,%28,%29,%30,%31"
#define NAMED_64                                                                                   \
    NAMED_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"   \
             "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// For N sums of a thread, (64, 2 · N) of a warpgroup:
//   multiply(sums, a, b): sums = a (64, 16) · bᵀ, b (2 · N, 16)
//   add_product(sums, a, b): sums += the same; or += a · b, of a that the warps hold and b (16, 2 · N)
//   multiply_transposed(sums, a, b), add_transposed: the same of aᵀ · b, a (16, 64) and b (16, 2 · N)
#define PRODUCT(NAME, N, COLUMNS, SUMS, A, B, ADD, TRANSPOSED)                                     \
    __device__ __forceinline__ void NAME(float (&s)[N], u64 a, u64 b) {                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32.bf16.bf16 {" NAMED_##N   \
                     "}, " A ", " B ", " ADD ", 1, 1, " TRANSPOSED ", " TRANSPOSED ";"             \
                     : FOR_##N(SUMS, s)                                                            \
                     : "l"(a), "l"(b));                                                            \
    }
#define PRODUCTS(N, COLUMNS, R0, R1, R2, R3, R4)                                                   \
    PRODUCT(multiply, N, COLUMNS, NEW, R0, R1, "0", "0")                                           \
    PRODUCT(add_product, N, COLUMNS, OLD, R0, R1, "1", "0")                                        \
    PRODUCT(multiply_transposed, N, COLUMNS, NEW, R0, R1, "0", "1")                                \
    PRODUCT(add_transposed, N, COLUMNS, OLD, R0, R1, "1", "1")                                     \
    __device__ __forceinline__ void add_product(float (&s)[N], const u32 (&a)[4], u64 b) {         \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32.bf16.bf16 {" NAMED_##N   \
                     "}, {" R0 "," R1 "," R2 "," R3 "}, " R4 ", 1, 1, 1, 1;"                       \
                     : FOR_##N(OLD, s)                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }

// The first operand after the sums, and those that follow it.
PRODUCTS(32, "64", "%32", "%33", "%34", "%35", "%36")
PRODUCTS(64, "128", "%64", "%65", "%66", "%67", "%68")

#endif
