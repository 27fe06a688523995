//! What profilers that patch PyTorch's functions report of a model in transformers: matmuls, and a
//! FLOP an element of some of what else runs.
//!
//! Sources: deepspeed/profiling/flops_profiler/profiler.py of DeepSpeed 0.19.8;
//! calflops/pytorch_ops.py of calflops 0.3.2; ptflops/pytorch_ops.py of ptflops 0.7.5, whose default
//! engine this is. They count `F.linear` (adapters among it), `matmul`, softmax and SiLU, an
//! element's softmax or SiLU as one operation, which is an `exp` here. They see no arithmetic that is
//! written as an operator (norms, rotation, residuals, the gate's product), and not GELU's tanh form,
//! which transformers keeps hold of from before the patch.
//!
//! The first two take training as three forward passes, whatever is frozen; ptflops has no training,
//! and states multiply-accumulates: its own figure is this under prices with `mac = 1`.

use super::{
    formulas::passes_and_gradients,
    moments::Moments,
    pieces::{macs, only, zero},
};
use crate::{
    config::{Activation, Projection},
    error::Result,
    prices::{Cost, Primitives},
    tally::{Component, Tally},
    workload::Workload,
};

/// Which of them, and how the profiled model computes attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Profiler {
    /// DeepSpeed or calflops; attention product by product.
    DeepSpeed,
    /// DeepSpeed; fused attention, for which it has a formula without softmax.
    DeepSpeedSdpa,
    /// calflops; fused attention, for which it has none.
    CalflopsSdpa,
    /// ptflops; attention product by product. It adds biases.
    Ptflops,
}

impl Profiler {
    /// Whether it counts attention's products, softmax, and biases.
    pub(super) const fn sees(self) -> [bool; 3] {
        match self {
            Self::DeepSpeed => [true, true, false],
            Self::DeepSpeedSdpa => [true, false, false],
            Self::CalflopsSdpa => [false, false, false],
            Self::Ptflops => [true, true, true],
        }
    }
}

/// What `profiler` reports for `workload`.
pub(super) fn count(workload: &Workload, profiler: Profiler) -> Result<Tally> {
    passes_and_gradients(workload, |_| 2, |m| pass(workload, profiler, m))
}

fn pass(workload: &Workload, profiler: Profiler, m: &Moments) -> Vec<(Component, Cost)> {
    let Workload { model, lora, .. } = workload;
    let [products, softmax, biases] = profiler.sees();
    let layers = model.num_hidden_layers;
    let scores = m.scores(model, 0..layers).all;
    let exps = |exp: u128| Primitives { exp, ..zero() };
    let of_head = |counted: bool, width: usize| if counted { scores * width as u128 } else { 0 };
    let attention = Cost {
        macs: 2 * of_head(products, model.q_width()),
        other: exps(of_head(softmax, model.num_attention_heads)),
        ..Cost::default()
    };
    let activated = match model.activation {
        Activation::Silu => m.rows * (layers * model.intermediate_size) as u128,
        Activation::GeluTanh => 0,
    };
    let mut parts = vec![
        (Component::Attention, attention),
        (Component::Glu, only(exps(activated))),
        (Component::LmHead, macs(m.head_rows * (model.hidden_size * model.vocab_size) as u128)),
    ];
    for projection in Projection::ALL {
        let (k, n) = projection.widths(model);
        let rows = m.rows * layers as u128;
        let biased = biases && model.has_bias(projection);
        let add = if biased { rows * n as u128 } else { 0 };
        let other = Primitives { add, ..zero() };
        parts.push((Component::Proj(projection), Cost { other, ..macs(rows * (k * n) as u128) }));
        let ranks = lora.adapted(projection, 0..layers).ranks;
        parts.push((Component::Lora(projection), macs(ranks * (k + n) as u128 * m.rows)));
    }
    parts.retain(|(_, cost)| *cost != Cost::default());
    parts
}
