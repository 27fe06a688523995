// One token of one sequence through the whole model, in one launch, with a block for each
// multiprocessor. Some blocks attend, to one key head or a share of its keys; the others have each its
// share of every weight's rows. One thread of such a block fetches them, layer after layer, into a ring in shared
// memory, as far ahead as there is room; the others multiply, wait for what other blocks computed, and
// go on. So the stream of weights stops at no dependency.
//
// What a block computes, other blocks read: values travel as mail, a word each, of which the lower half
// is the value in bf16 and the upper half the number of the step. Whoever waits for a value reads its
// word until the number is right; there is nothing else to wait for, and nothing to reset.
//
//     mail: stream │ of each layer: q, k, v │ mixed values │ stream │ inner │ stream
//
// Products are by the tensor cores: the weight's rows are the rows of a tile, the token its first
// column. A warp issues an instruction in about five cycles at best, and a layer's chain of dependent
// products has the time of some ten thousand: so what can be computed once is, and divisions are.
#include "attend_tile.cuh"

#if __CUDA_ARCH__ >= 900

namespace {

constexpr u32 WARPS = STEP_WARPS, THREADS = WARPS * 32;  // that multiply, or attend
constexpr u32 TILES = STEP_TILES;
constexpr u32 CHUNKS = 16;   // of weights that a block has under way, or there, at once
constexpr u32 PIECE = 16384; // bytes that it fetches at once,
constexpr u32 IN_FLIGHT = 2; // and how often before the first of them have come

__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint4 shared_pack(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from));
    return v;
}

__device__ __forceinline__ void start_barrier(u32 barrier) { // of which each phase is one arrival
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_for_phase(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void wait_for_warps() { // all but the one that fetches
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// ---- the ring ----------------------------------------------------------------------------------

// Weights come in chunks, each of which lies in the ring behind the one before it. CHUNKS of them at
// most are there at once; each has a barrier that says that it has come, and one that it has been read.
// A chunk is fetched in pieces, of which few are on their way at once: just enough for the stream not to
// stop. More would only queue up, and mail would wait behind them.
struct Ring {
    u32 bytes, size, come, read, flight;
    __device__ u32 after(u32 place, u32 n) const { return min(place + n, place + n - size); }
};

// The thread that fetches.
struct Fetching {
    const Ring &ring;
    u32 (&bytes)[CHUNKS]; // of the chunks that are there
    u64 policy;
    u32 next = 0, come = 0, oldest = 0;     // chunks: begun, known to have come, and not read yet
    u32 issued = 0, retired = 0, ended = 0; // pieces: issued, known to have come; a bit where a chunk ends
    u32 used = 0, place = 0, left = 0;

    __device__ Fetching(const Ring &ring, u32 (&bytes)[CHUNKS]) : ring(ring), bytes(bytes) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    }
    __device__ __forceinline__ void retire() {
        u32 slot = retired % IN_FLIGHT;
        wait_for_phase(ring.flight + slot * 8, retired / IN_FLIGHT & 1);
        if (ended >> slot & 1) arrive(ring.come + come++ % CHUNKS * 8);
        retired++;
    }
    __device__ __forceinline__ void retire_all() {
#pragma unroll 1
        while (retired != issued) retire();
    }
    __device__ __forceinline__ void free_oldest() {
        retire_all();
        wait_for_phase(ring.read + oldest % CHUNKS * 8, oldest / CHUNKS & 1);
        used -= bytes[oldest++ % CHUNKS];
    }
    // A chunk of so many bytes.
    __device__ __forceinline__ void begin(u32 n) {
        if (next - oldest == CHUNKS) free_oldest();
        bytes[next++ % CHUNKS] = left = n;
    }
    // Bytes of it that lie together.
    __device__ __forceinline__ void put(const bf16 *weights, u32 n) {
        u64 from = reinterpret_cast<u64>(weights);
#pragma unroll 1
        while (n) {
            u32 piece = min(min(n, PIECE), ring.size - place), slot = issued % IN_FLIGHT;
#pragma unroll 1
            while (used + piece > ring.size) free_oldest();
            if (issued - retired == IN_FLIGHT) retire();
            u32 barrier = ring.flight + slot * 8;
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(piece)
                         : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                         ".L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(ring.bytes + place),
                         "l"(from), "r"(piece), "r"(barrier), "l"(policy)
                         : "memory");
            from += piece, n -= piece, used += piece, left -= piece, issued++;
            place = ring.after(place, piece);
            ended = left ? ended & ~(1u << slot) : ended | 1u << slot;
        }
    }
};

// Those that multiply: the chunk that they are at.
struct Reading {
    const Ring &ring;
    u32 chunk = 0, place = 0;

    __device__ explicit Reading(const Ring &ring) : ring(ring) {}
    __device__ void wait(u32 ahead) const { // for a chunk so many after that
        u32 i = chunk + ahead;
        wait_for_phase(ring.come + i % CHUNKS * 8, i / CHUNKS & 1);
    }
    // So many chunks, which nobody reads any more.
    __device__ void pass(u32 chunks, u32 bytes) {
        if (threadIdx.x < chunks) arrive(ring.read + (chunk + threadIdx.x) % CHUNKS * 8);
        chunk += chunks, place = ring.after(place, bytes);
    }
};

// ---- mail --------------------------------------------------------------------------------------

__device__ __forceinline__ void send(u32 *to, float value, u32 step) {
    u32 word = step << 16 | (u32)__bfloat16_as_ushort(narrow<bf16>(value));
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
__device__ __forceinline__ uint4 look(const u32 *from) { // at four words
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ bool arrived(const uint4 &v, u32 step) {
    u32 number = step << 16;
    return ((v.x ^ number) | (v.y ^ number) | (v.z ^ number) | (v.w ^ number)) < 0x10000;
}
// Both values of a pair in bf16.
__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000); }

// What comes of a share of the keys: a number in f32, and that of the step.
__device__ __forceinline__ void send_share(u64 *to, float value, u32 step) {
    u64 word = (u64)step << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}
__device__ __forceinline__ float receive_share(const u64 *from, u32 step) {
    u64 word;
    do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    while ((u32)(word >> 32) != step);
    return __uint_as_float((u32)word);
}

// Layer `l` to `described`, two of which are kept: a word by each thread.
__device__ __forceinline__ void describe(const Step<bf16> &a, StepLayer<bf16> (&described)[2], u32 l) {
    constexpr u32 WORDS = sizeof(StepLayer<bf16>) / 4;
    static_assert(WORDS <= THREADS, "a word of a layer for each thread");
    if (l < a.depth && threadIdx.x < WORDS)
        reinterpret_cast<u32 *>(&described[l & 1])[threadIdx.x] =
            reinterpret_cast<const u32 *>(a.layers)[l * WORDS + threadIdx.x];
}

// ---- products ----------------------------------------------------------------------------------

// What each row of a product is for.
enum Kind {
    PROJECTED, // q, k or v
    ATTENDED,  // added to the stream
    GATED,     // with the same row of another matrix, the MLP's inner value
    DOWN,      // added to the stream
    HEAD,      // a logit
    KINDS,
};
template <int KIND> constexpr bool NORMED = KIND == PROJECTED || KIND == GATED || KIND == HEAD;
// Tiles whose sums are added up together.
template <int KIND> constexpr u32 TOGETHER = KIND == GATED ? TILES : KIND == HEAD ? TILES / 2 : 1;

// The rows of a matrix (n, k) that a block has, and how its warps share them. A tile is 16 rows, or 8 of a
// gate and the same 8 of what it is for: a chunk of the ring, of which those that are added up together
// take no more than there is room for; so where rows are long, tiles have fewer.
struct Rows {
    u32 k, first, count;
    u32 log, together;         // rows of a tile, as a power of 2, and those that are added up together
    u32 tiles, splits, nearly; // of what is added up together; and 2^16 / tiles, rounded up

    Rows() = default;
    template <int KIND> __device__ static Rows of(const Step<bf16> &a, u32 n, u32 k) {
        u32 block = blockIdx.x - a.attending, blocks = gridDim.x - a.attending;
        Rows own;
        own.k = k, own.first = n * block / blocks, own.count = n * (block + 1) / blocks - own.first;
        u32 room = a.ring / TOGETHER<KIND> / (k * (KIND == GATED ? 4 : 2));
        own.log = KIND == GATED ? 3 : 4;
        while (own.log > 0 && 1u << own.log > room) own.log--;
        own.together = TOGETHER<KIND> << own.log;
        own.tiles = max(1u, min(TOGETHER<KIND>, (own.count + (1u << own.log) - 1) >> own.log));
        own.splits = WARPS / own.tiles, own.nearly = 65535 / own.tiles + 1;
        return own;
    }
};
__device__ __forceinline__ void share_rows(const Step<bf16> &a, u32 q, u32 kv, Rows (&rows)[KINDS]) {
    rows[PROJECTED] = Rows::of<PROJECTED>(a, q + 2 * kv, a.hidden);
    rows[ATTENDED] = Rows::of<ATTENDED>(a, a.hidden, q);
    rows[GATED] = Rows::of<GATED>(a, a.inner, a.hidden);
    rows[DOWN] = Rows::of<DOWN>(a, a.hidden, a.inner);
    rows[HEAD] = Rows::of<HEAD>(a, a.vocab, a.hidden);
}

// The stream of weights, by one thread.
__device__ void fetch_all(const Step<bf16> &a, const Ring &ring, u32 q, u32 kv, const Rows (&rows)[KINDS],
                          u32 (&chunks)[CHUNKS]) {
    Fetching to(ring, chunks);
    auto each = [&](const Rows own, u32 matrices, auto put) { // tile
#pragma unroll 1
        for (u32 begin = 0; begin < own.count; begin += 1 << own.log) {
            u32 count = min(own.count - begin, 1u << own.log);
            to.begin(count * own.k * 2 * matrices);
            put(own.first + begin, count);
        }
    };
    auto of = [&](const Rows own, const bf16 *weight) {
        each(own, 1, [&](u32 row, u32 count) { to.put(weight + (u64)row * own.k, count * own.k * 2); });
    };
    const StepLayer<bf16> *layer = reinterpret_cast<const StepLayer<bf16> *>(a.layers);
    const bf16 *next[7]; // of the layer after
#pragma unroll
    for (int i = 0; i < 7; i++) next[i] = layer->weights[i];
#pragma unroll 1
    for (u32 l = 0; l < a.depth; l++, layer++) {
        const bf16 *weights[7];
#pragma unroll
        for (int i = 0; i < 7; i++) weights[i] = next[i];
        if (l + 1 < a.depth) {
#pragma unroll
            for (int i = 0; i < 7; i++) next[i] = layer[1].weights[i];
        }
        each(rows[PROJECTED], 1, [&](u32 row, u32 count) {
            u32 begin = 0, ends[3] = {q, q + kv, q + 2 * kv};
#pragma unroll
            for (int m = 0; m < 3; m++) {
                u32 first = max(row, begin), end = min(row + count, ends[m]);
                if (first < end)
                    to.put(weights[m] + (u64)(first - begin) * a.hidden, (end - first) * a.hidden * 2);
                begin = ends[m];
            }
        });
        of(rows[ATTENDED], weights[3]);
        each(rows[GATED], 2, [&](u32 row, u32 count) {
            to.put(weights[4] + (u64)row * a.hidden, count * a.hidden * 2);
            to.put(weights[5] + (u64)row * a.hidden, count * a.hidden * 2);
        });
        of(rows[DOWN], weights[6]);
    }
    of(rows[HEAD], a.head);
    to.retire_all();
}

// What the threads that multiply share, beside the ring and x.
struct Multiplying {
    float parts[2][WARPS * 16]; // of sums, in turns
    float squares[STEP_HIDDEN / 128];
    float stream[STEP_ROWS]; // this block's part of it
    StepLayer<bf16> described[2];
    Normed<bf16> last_norm;
};

// x (k) from mail, times the gain where there is one, to shared memory in bf16. A warp takes 128 elements
// at once, and AT_ONCE times that, and notes the sum of the squares of each 128.
template <bool NORMED, int AT_ONCE>
__device__ __forceinline__ void receive(u32 to, float *squares, const u32 *mail, u32 k, u32 step,
                                        const Normed<bf16> *norm) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (u32 start = warp * 128; start < k; start += AT_ONCE * THREADS * 4) {
        uint4 words[AT_ONCE];
        uint2 gains[AT_ONCE];
        u32 missing = 0;
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            u32 at = start + j * THREADS * 4 + lane * 4;
            if (at >= k) continue;
            missing |= 1 << j;
            if (NORMED) gains[j] = *reinterpret_cast<const uint2 *>(norm->gain + at);
        }
        u32 there = missing;
        while (missing) {
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (missing >> j & 1) words[j] = look(mail + start + j * THREADS * 4 + lane * 4);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if ((missing >> j & 1) && arrived(words[j], step)) missing &= ~(1 << j);
        }
        float shift = NORMED ? norm->shift : 0.0f;
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            u32 at = start + j * THREADS * 4 + lane * 4, low, high;
            const uint4 &w = words[j];
            if (NORMED) {
                float v[4] = {};
                if (there >> j & 1) v[0] = low_of(w.x), v[1] = low_of(w.y), v[2] = low_of(w.z), v[3] = low_of(w.w);
                float square = v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
                square = reduce<Sum, 32>(square);
                if (lane == 0 && at < k) squares[at / 128] = square;
                low = packed(v[0] * (low_of(gains[j].x) + shift), v[1] * (high_of(gains[j].x) + shift));
                high = packed(v[2] * (low_of(gains[j].y) + shift), v[3] * (high_of(gains[j].y) + shift));
            } else {
                low = __byte_perm(w.x, w.y, 0x5410), high = __byte_perm(w.z, w.w, 0x5410);
            }
            if (there >> j & 1)
                asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(to + at * 2), "r"(low), "r"(high)
                             : "memory");
        }
    }
}

// A tile of `rows` rows in the ring (of both matrices, if they are pairs) with x, in units of 64 elements.
// Of each half of a unit a lane has 8 elements that lie together. The order in which they are summed is
// of no account, so these serve as what the instruction calls elements 2t, 2t + 1, 2t + 8 and 2t + 9 of
// two tiles.
//
// Odd rows take the halves the other way round: so they lie in other banks. What lies beyond the last
// row is of no account, and whatever comes of it too; so is what the other seven columns hold.
struct Tile {
    const Ring &ring;
    u32 upper, lower, x, units;
    bool odd, both, whole;

    __device__ __forceinline__ Tile(const Ring &ring, u32 place, u32 x, u32 k, u32 rows, bool pairs)
        : ring(ring), units(k / 64) {
        u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, pitch = k * 2;
        odd = g % 2, both = pairs || rows > 8;
        u32 of_lane = g * pitch + t * 16 + odd * 64, between = (pairs ? rows : 8) * pitch;
        // Whether all that is read lies together.
        whole = place + between + 8 * pitch <= ring.size;
        upper = whole ? place + of_lane : ring.after(place, of_lane);
        lower = whole ? upper + between : ring.after(upper, between);
        this->x = x + t * 16;
    }
    // Units `first`, `first` + `step` and so on.
    __device__ __forceinline__ void multiply(u32 first, u32 step, float (&sums)[4], float (&others)[4]) {
        if (whole && both) sum_up<true, true>(first, step, sums, others);
        else if (whole) sum_up<true, false>(first, step, sums, others);
        else sum_up<false, true>(first, step, sums, others);
    }
    template <bool WHOLE, bool BOTH>
    __device__ __forceinline__ void sum_up(u32 first, u32 step, float (&sums)[4], float (&others)[4]) {
        auto pack = [&](u32 place, u32 n, int i) {
            return shared_pack(ring.bytes + ((WHOLE ? place + n : ring.after(place, n)) ^ i * 64));
        };
#pragma unroll(WHOLE ? 2 : 1)
        for (u32 unit = first; unit < units; unit += step) {
            uint4 v[2], a[2], c[2] = {};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                v[i] = shared_pack(x + unit * 128 + i * 64);
                a[i] = pack(upper, unit * 128, i);
                if (BOTH) c[i] = pack(lower, unit * 128, i);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint4 r = odd ? a[i ^ 1] : a[i], l = odd ? c[i ^ 1] : c[i];
                const u32 one[4] = {r.x, l.x, r.y, l.y}, two[4] = {r.z, l.z, r.w, l.w};
                mma(sums, one, v[i].x, v[i].y);
                mma(others, two, v[i].z, v[i].w);
            }
        }
    }
};

// What this block's rows of a matrix (of two, if gated) come to with x (k), which is mail: `finish` is
// called for each row with its sum (and the other one), by one thread each, and with what `prepare`
// fetched for the row meanwhile. The warps share the tiles that are added up together, and each tile's
// summed dimension.
template <int KIND, int AT_ONCE, typename Prepare, typename Finish>
__device__ __forceinline__ void multiply(Multiplying &shared, u32 &turn, Reading &from, u32 x, const u32 *mail,
                                         const Rows &own, u32 step, const Normed<bf16> *norm, Prepare prepare,
                                         Finish finish) {
    constexpr bool PAIRS = KIND == GATED;
    static_assert(TOGETHER<KIND> * 16 <= THREADS, "a thread finishes one sum at most");
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = threadIdx.x;
    u32 k = own.k, pitch = k * 2, log = own.log, count = own.count, together = own.together;
    u32 tiles = own.tiles, splits = own.splits, split = warp * own.nearly >> 16, tile = warp - split * tiles;
    auto kept = prepare(own.first + min(row, count - 1));
    receive<NORMED<KIND>, AT_ONCE>(x, shared.squares, mail, k, step, norm);
    wait_for_warps();
    float inverse = 1.0f;
#pragma unroll 1
    for (u32 begin = 0; begin < count; begin += together, turn++) {
        u32 rows = min(count - begin, together), done = tile << log;
        if (begin > 0) kept = prepare(own.first + min(begin + row, count - 1));
        float *parts = shared.parts[turn & 1];
        if (split < splits && done < rows) {
            from.wait(tile);
            Tile its(from.ring, from.ring.after(from.place, done * pitch * (PAIRS ? 2 : 1)), x, k,
                     min(rows - done, 1u << log), PAIRS);
            float sums[4] = {}, others[4] = {};
            its.multiply(split, splits, sums, others);
            float *to = parts + (split * tiles + tile) * 16 + lane / 4;
            if (lane % 4 == 0) to[0] = sums[0] + others[0], to[8] = sums[2] + others[2];
        }
        wait_for_warps();
        from.pass(((rows - 1) >> log) + 1, rows * pitch * (PAIRS ? 2 : 1));
        if (row >= rows) continue;
        u32 at = row >> log;
        const float *part = parts + at * 16 + row - (at << log);
        float sum = 0.0f, other = 0.0f;
#pragma unroll 7
        for (u32 i = 0; i < splits; i++, part += tiles * 16) {
            sum += part[0];
            if (PAIRS) other += part[8];
        }
        if (NORMED<KIND> && begin == 0) {
            float square = 0.0f;
#pragma unroll 7
            for (u32 i = 0; i < (k + 127) / 128; i++) square += shared.squares[i];
            inverse = rsqrtf(__fdividef(square, k) + norm->eps);
        }
        finish(own.first + begin + row, sum * inverse, other * inverse, kept);
    }
}

// All products of this block's rows.
__device__ void multiply_all(const Step<bf16> &a, const Ring &ring, u32 q, u32 kv, const Rows (&rows)[KINDS],
                             u32 x, Multiplying &shared) {
    if (threadIdx.x == 0) shared.last_norm = a.norm;
    describe(a, shared.described, 0);
    wait_for_warps();
    wait_for_inputs();
    u32 step = (*a.epoch + 1) & 0xffff, hidden = a.hidden, width = q + 2 * kv, first = rows[DOWN].first;
    Reading from(ring);
    u32 turn = 0, *mail = a.mail;
    // The stream begins with the token's row of the table.
    for (u32 row = threadIdx.x; row < rows[DOWN].count; row += THREADS) {
        float v = widen(a.table[(u64)a.ids[0] * hidden + first + row]);
        if (a.factor) v = rounded<bf16>(v * widen(a.factor[0]));
        shared.stream[row] = v;
        send(mail + first + row, v, step);
    }
#pragma unroll 1
    for (u32 l = 0; l < a.depth; l++) {
        const StepLayer<bf16> &layer = shared.described[l & 1];
        u32 *qkv = mail + hidden, *mixed = qkv + width, *mid = mixed + q, *inner = mid + hidden;
        u32 *out = inner + a.inner;
        auto bias = [&](u32 m, u32 r) { return layer.biases[m] ? layer.biases[m][r] : narrow<bf16>(0.0f); };
        auto add = [&](u32 *to) {
            return [&shared, to, first, step](u32 r, float sum, float, bf16 bias) {
                float y = shared.stream[r - first] + rounded<bf16>(rounded<bf16>(sum) + widen(bias));
                shared.stream[r - first] = y = rounded<bf16>(y);
                send(to + r, y, step);
            };
        };
        multiply<PROJECTED, 1>(
            shared, turn, from, x, mail, rows[PROJECTED], step, &layer.before_attention,
            [&](u32 r) { return r < q ? bias(0, r) : r < q + kv ? bias(1, r - q) : bias(2, r - q - kv); },
            [&](u32 r, float sum, float, bf16 bias) {
                send(qkv + r, rounded<bf16>(sum) + widen(bias), step);
            });
        describe(a, shared.described, l + 1); // nobody is at the layer before any more
        multiply<ATTENDED, 1>(shared, turn, from, x, mixed, rows[ATTENDED], step, nullptr,
                              [&](u32 r) { return bias(3, r); }, add(mid));
        struct Both {
            bf16 gate, up;
        };
        multiply<GATED, 1>(
            shared, turn, from, x, mid, rows[GATED], step, &layer.before_mlp,
            [&](u32 r) { return Both{bias(4, r), bias(5, r)}; },
            [&](u32 r, float gate, float up, Both bias) {
                gate = rounded<bf16>(rounded<bf16>(gate) + widen(bias.gate));
                up = rounded<bf16>(rounded<bf16>(up) + widen(bias.up));
                send(inner + r, rounded<bf16>(activated(gate, a.gelu)) * up, step);
            });
        multiply<DOWN, 3>(shared, turn, from, x, inner, rows[DOWN], step, nullptr,
                          [&](u32 r) { return bias(6, r); }, add(out));
        mail = out;
    }
    multiply<HEAD, 1>(shared, turn, from, x, mail, rows[HEAD], step, &shared.last_norm,
                      [](u32) { return 0; },
                      [&](u32 r, float sum, float, int) { a.logits[r] = narrow<bf16>(sum); });
    // All blocks have read it by now: what they sent has come.
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) *a.epoch += 1;
}

// ---- attention ---------------------------------------------------------------------------------

// Query heads that a block attends with at most, all of one key head: rows of a tile.
constexpr u32 MOST = STEP_HEADS;
// Tiles of 16 keys and values that a warp has under way.
template <int D> constexpr u32 STAGES = D == 64 ? 3 : 1;

// What the threads of a block that attends share, behind the warps' tiles. Each warp has a part of the
// keys; the new token is a part of its own.
template <int D> struct Attending {
    float query[MOST][D], key[D], value[D];
    float part[WARPS + 1][MOST][D];
    float maxes[WARPS + 1][MOST], weights[MOST][16], tops[MOST], totals[MOST];
    StepLayer<bf16> described[2];
};

// A vector of D from mail, by one warp.
template <int D> __device__ __forceinline__ void take(float (&out)[D], const u32 *mail, u32 step) {
    u32 lane = threadIdx.x % 32;
    if (lane < D / 4) {
        uint4 w;
        do w = look(mail + lane * 4);
        while (!arrived(w, step));
        reinterpret_cast<float4 *>(out)[lane] = make_float4(low_of(w.x), low_of(w.y), low_of(w.z), low_of(w.w));
    }
    __syncwarp();
}

// The same, normed, turned by the cosines and sines of its position, and times a factor.
template <int D>
__device__ __forceinline__ void take_turned(float (&out)[D], const u32 *mail, u32 step,
                                            const Normed<bf16> &norm, const bf16 *cos, const bf16 *sin,
                                            const bf16 *factor) {
    constexpr int EACH = D / 64;
    u32 lane = threadIdx.x % 32;
    bf16 c[EACH], s[EACH], f = factor ? *factor : narrow<bf16>(1.0f);
#pragma unroll
    for (int j = 0; j < EACH; j++) c[j] = cos[lane + j * 32], s[j] = sin[lane + j * 32];
    float x[EACH], y[EACH];
    take(out, mail, step);
#pragma unroll
    for (int j = 0; j < EACH; j++) x[j] = out[lane + j * 32], y[j] = out[lane + j * 32 + D / 2];
    if (norm.gain) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < EACH; j++) sum += x[j] * x[j] + y[j] * y[j];
        float r = 1.0f / sqrtf(reduce<Sum, 32>(sum) / D + norm.eps);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            u32 i = lane + j * 32;
            x[j] = rounded<bf16>(x[j] * r * (norm.shift + widen(norm.gain[i])));
            y[j] = rounded<bf16>(y[j] * r * (norm.shift + widen(norm.gain[i + D / 2])));
        }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        u32 i = lane + j * 32;
        float co = widen(c[j]), si = widen(s[j]), by = widen(f);
        out[i] = rounded<bf16>(rounded<bf16>(x[j] * co - y[j] * si) * by);
        out[i + D / 2] = rounded<bf16>(rounded<bf16>(x[j] * si + y[j] * co) * by);
    }
}

// Query heads of one key head over one share of the keys: those of this block.
struct Item {
    u32 split, first, count, kv, past;
    bool writes; // the new key and value, to the cache
    __device__ explicit Item(const Step<bf16> &a) : past(*a.held) {
        u32 groups = a.attending / a.splits, each = a.heads / a.kv_heads;
        count = a.heads / groups, split = blockIdx.x % a.splits, first = blockIdx.x / a.splits * count;
        kv = first / each, writes = split == 0 && first % each == 0;
    }
};

// A warp's tiles of keys and values, every WARPS-th of 16 tokens, on their way while something else is
// done.
template <int D> struct Keys {
    static constexpr u32 CHUNKS_OF_ROW = D / 8, TILE = 16 * D; // of 16 bytes; elements
    bf16 *ring;
    const bf16 *keys, *values;
    u32 begin, end, own; // tokens that the block attends to; tiles of this warp

    __device__ const bf16 *tile(u32 i) const { return ring + i % STAGES<D> * 2 * TILE; }
    __device__ u32 first_of(u32 i) const { return begin + (i * WARPS + threadIdx.x / 32) * 16; }
    // Tile i, if there is one; where there is no token there are zeros.
    __device__ void fetch(u32 i) {
        if (i < own) {
#pragma unroll
            for (u32 j = threadIdx.x % 32; j < 16 * CHUNKS_OF_ROW; j += 32) {
                u32 row = j / CHUNKS_OF_ROW, chunk = j % CHUNKS_OF_ROW, token = first_of(i) + row;
                bool there = token < end;
                u64 at = there ? (u64)token * D + chunk * 8 : 0;
                copy_async(chunk_of<D>(tile(i), row, chunk), keys + at, there);
                copy_async(chunk_of<D>(tile(i) + TILE, row, chunk), values + at, there);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ void start(const Step<bf16> &a, const StepLayer<bf16> &layer, const Item &item) {
        Seen all(item.past + 1, layer.window);
        begin = all.first, end = item.past;
        if (a.splits > 1) {
            u32 seen = end - begin;
            end = begin + seen * (item.split + 1) / a.splits, begin += seen * item.split / a.splits;
        }
        u32 tiles = (end - begin + 15) / 16, warp = threadIdx.x / 32;
        own = tiles > warp ? (tiles - warp + WARPS - 1) / WARPS : 0;
        keys = layer.keys + (u64)item.kv * a.capacity * D, values = layer.values + (u64)item.kv * a.capacity * D;
#pragma unroll
        for (u32 i = 0; i < STAGES<D>; i++) fetch(i);
    }
};

// This warp's part of the keys: scores are products of all queries, in a tile's rows, with 16 keys.
template <int D>
__device__ __forceinline__ void attend_part(Attending<D> &shared, Keys<D> &keys, u32 heads) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    TilePart<D> mine(shared.query, heads);
#pragma unroll 1
    for (u32 i = 0; i < keys.own; i++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES<D> - 1) : "memory");
        __syncwarp();
        mine.look(keys.tile(i), keys.first_of(i), keys.end);
        __syncwarp(); // before this tile is filled anew
        keys.fetch(i + STAGES<D>);
    }
    float sum = mine.whole_sum();
    if (t == 0) shared.maxes[warp][g] = mine.max, shared.weights[g][warp] = sum;
#pragma unroll
    for (int d = 0; d < D / 8; d++)
        *reinterpret_cast<float2 *>(&shared.part[warp][g][d * 8 + 2 * t]) = make_float2(mine.mixed[d][0], mine.mixed[d][1]);
}

// Attention of an item, whose first keys are on their way; the first share adds up those of all.
template <int D>
__device__ __forceinline__ void attend(Attending<D> &shared, const Step<bf16> &a, const StepLayer<bf16> &layer,
                                       const Item &item, Keys<D> &keys, const u32 *qkv, u32 *mixed,
                                       u64 *shares, u32 step) {
    static_assert(MOST + 2 <= WARPS && MOST * 16 <= THREADS && WARPS < 16, "a warp each, a lane each");
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 *key_mail = qkv + (a.heads + item.kv) * D;
    if (warp <= item.count) { // the queries, then the key
        bool is_key = warp == item.count;
        u64 at = (u64)item.past * (D / 2);
        take_turned<D>(is_key ? shared.key : shared.query[warp], is_key ? key_mail : qkv + (item.first + warp) * D,
                       step, is_key ? layer.k_norm : layer.q_norm, layer.cos + at, layer.sin + at,
                       is_key ? nullptr : layer.scale);
    }
    if (warp == WARPS - 1) take<D>(shared.value, key_mail + a.kv_heads * D, step);
    wait_for_warps();
    attend_part<D>(shared, keys, item.count);
    // The new token itself, in the first share.
    if (warp < item.count) {
        float score = 0.0f;
#pragma unroll
        for (u32 j = lane; j < D; j += 32) {
            score += shared.query[warp][j] * shared.key[j];
            shared.part[WARPS][warp][j] = shared.value[j];
        }
        score = reduce<Sum, 32>(score);
        if (lane == 0) {
            shared.maxes[WARPS][warp] = item.split == 0 ? score : NONE;
            shared.weights[warp][WARPS] = item.split == 0 ? 1.0f : 0.0f;
        }
    }
    if (warp == WARPS - 1 && item.writes) {
        u64 at = ((u64)item.kv * a.capacity + item.past) * D;
#pragma unroll
        for (u32 j = lane; j < D; j += 32) {
            layer.keys[at + j] = narrow<bf16>(shared.key[j]);
            layer.values[at + j] = narrow<bf16>(shared.value[j]);
        }
    }
    wait_for_warps();
    // Each part's weight in all, 16 lanes a head.
    if (threadIdx.x < MOST * 16) {
        u32 head = threadIdx.x / 16, p = threadIdx.x % 16;
        bool there = p <= WARPS && head < item.count;
        float own = there ? shared.maxes[p][head] : NONE, top = own;
#pragma unroll
        for (int mask = 8; mask > 0; mask >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
        float weight = __expf(own - top), total = there ? weight * shared.weights[head][p] : 0.0f;
#pragma unroll
        for (int mask = 8; mask > 0; mask >>= 1) total += __shfl_xor_sync(~0u, total, mask);
        __syncwarp();
        shared.weights[head][p] = weight;
        if (p == 0) shared.tops[head] = top, shared.totals[head] = total;
    }
    wait_for_warps();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < item.count * D; i += THREADS) {
        u32 head = i / D, j = i % D;
        float v = 0.0f, top = shared.tops[head], total = shared.totals[head];
#pragma unroll
        for (int w = 0; w <= WARPS; w++) v += shared.weights[head][w] * shared.part[w][head][j];
        u64 *all = shares + (u64)(item.first + head) * a.splits * (D + 2);
        if (item.split > 0) {
            u64 *to = all + item.split * (D + 2);
            send_share(to + 2 + j, v, step);
            if (j == 0) send_share(to, top, step), send_share(to + 1, total, step);
            continue;
        }
#pragma unroll 1
        for (u32 s = 1; s < a.splits; s++) {
            const u64 *from = all + s * (D + 2);
            float its_v = receive_share(from + 2 + j, step);
            float its_top = receive_share(from, step), its_total = receive_share(from + 1, step);
            float now = fmaxf(top, its_top), mine = __expf(top - now), its = __expf(its_top - now);
            total = total * mine + its_total * its, v = v * mine + its_v * its, top = now;
        }
        send(mixed + (item.first + head) * D + j, __fdividef(v, total), step);
    }
}

// This block's item, layer after layer.
template <int D> __device__ void attend_all(const Step<bf16> &a, char *bytes) {
    bf16 *tiles = reinterpret_cast<bf16 *>(bytes);
    Attending<D> &shared = *reinterpret_cast<Attending<D> *>(tiles + WARPS * STAGES<D> * 2 * Keys<D>::TILE);
    describe(a, shared.described, 0);
    wait_for_warps();
    wait_for_inputs();
    u32 step = (*a.epoch + 1) & 0xffff, q = a.heads * D, width = q + 2 * a.kv_heads * D;
    u32 *qkv = a.mail + a.hidden, in_layer = width + q + 2 * a.hidden + a.inner;
    u64 *shares = a.shares;
    Item item(a);
    Keys<D> keys;
    keys.ring = tiles + threadIdx.x / 32 * STAGES<D> * 2 * Keys<D>::TILE;
    keys.start(a, shared.described[0], item);
#pragma unroll 1
    for (u32 l = 0; l < a.depth; l++) {
        describe(a, shared.described, l + 1); // nobody is at the layer before any more
        attend<D>(shared, a, shared.described[l & 1], item, keys, qkv, qkv + width, shares, step);
        // The next layer's keys are on their way while this block waits for its queries.
        asm volatile("cp.async.wait_all;" ::: "memory");
        if (l + 1 < a.depth) keys.start(a, shared.described[(l + 1) & 1], item);
        qkv += in_layer, shares += a.heads * a.splits * (D + 2);
        wait_for_warps();
    }
}

// ---- the step ----------------------------------------------------------------------------------

// What a block that multiplies has beside the ring and x.
struct Own {
    u64 come[CHUNKS], read[CHUNKS], flight[IN_FLIGHT];
    u32 chunks[CHUNKS];
    Rows rows[KINDS];
    Multiplying shared;
};
static_assert(sizeof(Own) <= STEP_OWN, "its room");

template <int D> __device__ void run_step(const Step<bf16> &a) {
    extern __shared__ __align__(128) char bytes[];
    let_next_start();
    if (blockIdx.x < a.attending) {
        if (threadIdx.x < THREADS) attend_all<D>(a, bytes);
        return;
    }
    // Behind the ring and x.
    u32 q = a.heads * D, kv = a.kv_heads * D, widest = max(a.inner, max(a.hidden, q));
    Own &own = *reinterpret_cast<Own *>(bytes + a.ring + widest * 2);
    Ring ring{address(bytes), a.ring, address(own.come), address(own.read), address(own.flight)};
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < CHUNKS; i++) start_barrier(ring.come + i * 8), start_barrier(ring.read + i * 8);
        for (u32 i = 0; i < IN_FLIGHT; i++) start_barrier(ring.flight + i * 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        share_rows(a, q, kv, own.rows);
    }
    __syncthreads();
    if (threadIdx.x < THREADS) multiply_all(a, ring, q, kv, own.rows, ring.bytes + a.ring, own.shared);
    else if (threadIdx.x == THREADS) fetch_all(a, ring, q, kv, own.rows, own.chunks);
}

} // namespace

#else // no mbarriers: the host starts none of these

namespace {
template <int D> __device__ void run_step(const Step<bf16> &) { __trap(); }
} // namespace

#endif

#define STEP(D)                                                                                    \
    extern "C" __global__ void __launch_bounds__((STEP_WARPS + 1) * 32, 1) step_bf16_##D(Step<bf16> a) { \
        run_step<D>(a);                                                                            \
    }
#define STEPS(X, D) STEP(D)
STEP_WIDTHS(STEPS, X)
