//! What each kernel is given: one struct by value. They stand here alone; `build.rs` writes the
//! same structs into the header that every kernel includes, where they are templates over the
//! element type.

use super::{Element, Read, Write};

arguments! {
    // Parts of several.

    /// RMSNorm: x / sqrt(mean(x²) + eps) · (shift + gain); none where `gain` is null.
    struct Normed {
        gain: Read<Element>,
        eps: f32,
        shift: f32,
    }

    /// Up to three weights (n, k) one after another as the rows of one, each with its bias or none.
    struct Weights {
        weights: [Read<Element>; 3],
        biases: [Read<Element>; 3],
        /// Rows of the first, of the first two, of all.
        ends: [u32; 3],
    }

    // elements.cu:

    struct Map {
        out: Write<Element>,
        a: Read<Element>,
        b: Read<Element>,
        n: u64,
        period: u64,
    }

    struct Gated {
        act: Write<Element>,
        out: Write<Element>,
        gate: Read<Element>,
        up: Read<Element>,
        n: u64,
    }

    struct GatedGrad {
        to_gate: Write<Element>,
        to_up: Write<Element>,
        dy: Read<Element>,
        gate: Read<Element>,
        up: Read<Element>,
        act: Read<Element>,
        n: u64,
    }

    struct AddBias {
        out: Write<Element>,
        bias: Read<Element>,
        rows: u32,
        n: u32,
        stride: u32,
    }

    struct Heads {
        out: Write<Element>,
        x: Read<Element>,
        cos: Read<Element>,
        sin: Read<Element>,
        factor: Read<Element>,
        pairs: u64,
        b: u32,
        c: u32,
        d: u32,
        past: u32,
        /// 1 where tokens lie along C, not along B.
        inner: u32,
        sign: f32,
    }

    struct SumSquares {
        sum: Write<f64>,
        x: Read<Element>,
        n: u64,
    }

    /// One step of AdamW: p ← decay·p − rate · m / (√v / correction + eps), with
    /// m ← b1·m + rest1·g and v ← b2·v + rest2·g².
    struct AdamWFactors {
        decay: f32,
        rate: f32,
        correction: f32,
        eps: f32,
        b1: f32,
        b2: f32,
        rest1: f32,
        rest2: f32,
    }

    struct AdamW {
        state: Write<f32>,
        gradient: Read<f32>,
        n: u64,
        by: AdamWFactors,
    }

    // rows.cu:

    struct Softmax {
        x: Write<Element>,
        rows: u64,
        width: u32,
        /// Queries that follow one another; 0 where all see all keys.
        seq: u32,
        /// Where the first query's own key is.
        own: u32,
        window: u32,
    }

    struct SoftmaxGrad {
        dx: Write<Element>,
        y: Read<Element>,
        dy: Read<Element>,
        rows: u64,
        width: u32,
    }

    struct RmsNorm {
        y: Write<Element>,
        x: Read<Element>,
        norm: Normed,
        rows: u64,
        width: u32,
    }

    struct RmsNormGrad {
        dx: Write<Element>,
        x: Read<Element>,
        gain: Read<Element>,
        dy: Read<Element>,
        rows: u64,
        width: u32,
        eps: f32,
    }

    struct CrossEntropy {
        x: Write<Element>,
        targets: Read<u32>,
        losses: Write<f32>,
        sums: Write<f32>,
        width: u32,
    }

    struct CrossEntropyGrad {
        x: Write<Element>,
        targets: Read<u32>,
        weights: Read<f32>,
        sums: Read<f32>,
        width: u32,
    }

    // attention.cu:

    struct Attention {
        out: Write<Element>,
        q: Read<Element>,
        keys: Read<Element>,
        values: Read<Element>,
        /// From one key head to the next.
        stride: u64,
        seq: u32,
        held: u32,
        heads: u32,
        kv_heads: u32,
        window: u32,
    }

    // decode.cu:

    struct Embed {
        out: Write<Element>,
        table: Read<Element>,
        ids: Read<u32>,
        scale: Read<Element>,
        width: u32,
    }

    struct Attend {
        out: Write<Element>,
        q: Read<Element>,
        k: Read<Element>,
        v: Read<Element>,
        keys: Write<Element>,
        values: Write<Element>,
        cos: Read<Element>,
        sin: Read<Element>,
        scale: Read<Element>,
        q_norm: Normed,
        k_norm: Normed,
        held: Read<u32>,
        shares: Write<f32>,
        done: Write<u32>,
        heads: u32,
        kv_heads: u32,
        capacity: u32,
        q_stride: u32,
        kv_stride: u32,
        window: u32,
    }

    // products.cu:

    /// A weight that a later kernel reads, to be fetched into the cache meanwhile.
    struct Ahead {
        weight: Read<Element>,
        bytes: u64,
    }

    struct Project {
        out: Write<Element>,
        x: Read<Element>,
        norm: Normed,
        w: Weights,
        ahead: [Ahead; 2],
        batch: u32,
        k: u32,
        /// 1 where the activation is GELU.
        gelu: u32,
    }

    struct Adapt {
        outs: [Write<Element>; 3],
        strides: [u32; 3],
        w: Weights,
        low: Read<Element>,
        scaling: Read<Element>,
        columns: u32,
        rank: u32,
    }

    // choose.cu:

    /// Where choices go. `done` is 0 before and after.
    struct Choices {
        ids: Write<u32>,
        held: Write<u32>,
        done: Write<u32>,
        chosen: Write<u64>,
        first: u32,
        rows: u32,
        width: u32,
    }

    /// Factors on the logits of seen tokens; none is seen where `seen` is null.
    struct Penalty {
        seen: Write<u8>,
        /// For positive logits,
        less: f32,
        /// for others.
        more: f32,
    }

    struct Choose {
        to: Choices,
        penalty: Penalty,
        logits: Read<Element>,
        best: Write<u64>,
    }

    struct Draw {
        to: Choices,
        penalty: Penalty,
        logits: Read<Element>,
        probabilities: Write<f32>,
        uniforms: Read<f32>,
        inverse_temperature: f32,
        top_k: u32,
        top_p: f32,
    }
}
