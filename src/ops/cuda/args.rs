//! What each kernel is given: one struct by value. They stand here alone; `build.rs` writes the
//! same structs into the header that every kernel includes, where they are templates over the
//! element type.

use super::{Bf16, E4m3, Element, Read, Write};

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

    struct Quantize {
        codes: Write<E4m3>,
        /// One a row.
        scales: Write<f32>,
        x: Read<Element>,
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
        /// Null where the gradient is not wanted.
        weights: Read<f32>,
        losses: Write<f32>,
        width: u32,
    }

    // attention.cu:

    struct Attention {
        out: Write<Element>,
        q: Read<Element>,
        keys: Read<Element>,
        values: Read<Element>,
        /// Each row's maximum and sum, where they are kept.
        highest: Write<f32>,
        sums: Write<f32>,
        /// From one key head to the next.
        stride: u64,
        seq: u32,
        held: u32,
        heads: u32,
        kv_heads: u32,
        window: u32,
    }

    struct AttentionDots {
        dots: Write<f32>,
        out: Read<Element>,
        dy: Read<Element>,
        rows: u64,
        seq: u32,
        heads: u32,
    }

    /// Gradients that are not wanted are null; dots too, where neither dq nor dk is.
    struct AttentionGrad {
        dq: Write<f32>,
        dk: Write<f32>,
        dv: Write<f32>,
        dy: Read<Element>,
        q: Read<Element>,
        keys: Read<Element>,
        values: Read<Element>,
        highest: Read<f32>,
        sums: Read<f32>,
        dots: Read<f32>,
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
        behind: Read<u32>,
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

    // step.cu:

    /// A layer. Weights and biases are those of q, k, v, o, gate, up and down.
    struct StepLayer {
        weights: [Read<Element>; 7],
        biases: [Read<Element>; 7],
        before_attention: Normed,
        before_mlp: Normed,
        q_norm: Normed,
        k_norm: Normed,
        keys: Write<Element>,
        values: Write<Element>,
        cos: Read<Element>,
        sin: Read<Element>,
        scale: Read<Element>,
        window: u32,
        unused: u32,
    }

    struct Step {
        logits: Write<Element>,
        /// As many [`StepLayer`]s as there are layers.
        layers: Read<u8>,
        /// What blocks tell one another, and what comes to it of shares of the keys.
        mail: Write<u32>,
        shares: Write<u64>,
        /// Steps that were made.
        epoch: Write<u32>,
        table: Read<Element>,
        ids: Read<u32>,
        factor: Read<Element>,
        head: Read<Element>,
        norm: Normed,
        held: Read<u32>,
        depth: u32,
        hidden: u32,
        inner: u32,
        vocab: u32,
        heads: u32,
        kv_heads: u32,
        capacity: u32,
        /// Shares of the keys.
        splits: u32,
        /// Blocks that attend, some query heads over one share each; the others multiply.
        attending: u32,
        /// Bytes of the ring.
        ring: u32,
        /// 1 where the activation is GELU.
        gelu: u32,
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

    // optimizer.cu:

    /// A tensor of several.
    struct Squared {
        x: Read<Element>,
        n: u64,
        /// The first of its blocks.
        first: u32,
        /// 1 where it is read in packs.
        packed: u32,
    }

    struct SumSquares {
        tensors: [Squared; 64],
        /// One a block.
        parts: Write<f64>,
        /// One a tensor: the blocks that are done, 0 before.
        done: Write<u32>,
        sums: Write<f64>,
    }

    /// A parameter of several, with its moments.
    struct Updated {
        /// (3, n), or (2, n) where both moments are one word.
        state: Write<f32>,
        gradient: Read<Element>,
        /// Where the parameter goes too, if anywhere.
        narrow: Write<Bf16>,
        n: u64,
        /// The first of its blocks.
        first: u32,
        /// 1 where it is taken in packs.
        packed: u32,
        /// What the rounding of its moments is drawn from.
        draws: [u32; 2],
    }

    /// One step of AdamW: p ← decay·p − rate · m / (√v / correction + eps), with
    /// m ← b1·m + rest1·g and v ← b2·v + rest2·g², g being clip times the gradient.
    struct AdamWFactors {
        clip: f32,
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
        tensors: [Updated; 64],
        by: AdamWFactors,
    }

    struct AddToSum {
        out: Write<f32>,
        sum: Read<f32>,
        x: Read<Element>,
        n: u64,
    }

    // sums.cu:

    struct EmbedGrad {
        table: Write<Element>,
        ids: Read<u32>,
        dy: Read<Element>,
        rows: u32,
        width: u32,
    }

    struct SumRows {
        /// One row a block.
        parts: Write<f32>,
        /// What was normed, for the gradient of its gain.
        x: Read<Element>,
        dy: Read<Element>,
        rows: u64,
        width: u32,
        eps: f32,
    }

    struct SumParts {
        out: Write<Element>,
        parts: Read<f32>,
        rows: u32,
        width: u32,
    }
}
