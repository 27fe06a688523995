//! Which activations of a layer need a gradient: those that a trained parameter lies behind.

use crate::config::{LoraConfig, Projection};

/// One answer a tensor of the layer, named as the model names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needs {
    /// The layer's input.
    pub input: bool,
    /// What the first norm gives.
    pub normed: bool,
    /// Queries.
    pub q: bool,
    /// Keys.
    pub k: bool,
    /// Values.
    pub v: bool,
    /// Scores and what softmax makes of them.
    pub scores: bool,
    /// Weighted values.
    pub mixed: bool,
    /// The stream after attention.
    pub middle: bool,
    /// What the second norm gives.
    pub normed_again: bool,
    /// The gate's projection.
    pub gate: bool,
    /// The other side of the gate.
    pub up: bool,
    /// What both give.
    pub inner: bool,
}

impl Needs {
    /// Of a layer whose input needs one or not. In a `full` training every weight is trained, its
    /// gains and biases too.
    pub fn of(lora: &LoraConfig, full: bool, input: bool) -> Self {
        use Projection::{GateProj, KProj, OProj, QProj, UpProj, VProj};
        let projected = |before: bool, projection| before || full || lora.adapts(projection);
        let normed = input || full;
        let [q, k, v] = [QProj, KProj, VProj].map(|p| projected(normed, p));
        let scores = q || k;
        let mixed = scores || v;
        let middle = input || projected(mixed, OProj);
        let normed_again = middle || full;
        let [gate, up] = [GateProj, UpProj].map(|p| projected(normed_again, p));
        let inner = gate || up;
        Self { input, normed, q, k, v, scores, mixed, middle, normed_again, gate, up, inner }
    }

    /// Whether what `projection` is fed does.
    pub fn fed(&self, projection: Projection) -> bool {
        match projection {
            Projection::QProj | Projection::KProj | Projection::VProj => self.normed,
            Projection::OProj => self.mixed,
            Projection::GateProj | Projection::UpProj => self.normed_again,
            Projection::DownProj => self.inner,
        }
    }
}
