// What attention of whole sequences shares: which keys a block of queries reaches, and sums that
// several blocks add to.
#pragma once
#include "common.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// What the queries of one block, ATTENTION_BLOCK of them at most, reach: keys from `begin` to before
// `end`, of which those from `open` to before `closed` all of them see.
struct Reach {
    u32 begin, open, closed, end;

    // Query `row` of `seq` and those of its block, of which the last has the last of `held` keys.
    __device__ Reach(u32 row, u32 seq, u32 held, u32 window) {
        constexpr u32 BLOCK = ATTENTION_BLOCK;
        u32 first = row / BLOCK * BLOCK;
        // How many keys the first and the last query of the block see, were there no window.
        u32 least = held - seq + first + 1, most = held - seq + min(first + BLOCK, seq);
        end = min(held, (most + BLOCK - 1) / BLOCK * BLOCK);
        // What a tile has beyond the last key is no key, and hidden like one that is masked.
        closed = least / BLOCK * BLOCK;
        begin = least > window ? (least - window) / BLOCK * BLOCK : 0;
        open = most > window ? (most - window + BLOCK - 1) / BLOCK * BLOCK : 0;
    }
    __device__ bool has(u32 token) const { return begin <= token && token < end; }
    // Whether some query of the block does not see all keys of the block that `token` is in.
    __device__ bool masks(u32 token) const { return token < open || token >= closed; }
};

// Two neighbours added to f32 sums that other blocks add to as well.
__device__ __forceinline__ void add_two(float *to, float a, float b) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b) : "memory");
#else
    atomicAdd(to, a);
    atomicAdd(to + 1, b);
#endif
}
