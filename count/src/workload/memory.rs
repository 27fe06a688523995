//! Bytes that a workload needs on a device.

use super::{ATTENTION_BLOCK, AttentionMode, LOSS_ROWS, Logits, Ragged, Task, Workload};
use crate::{config::Projection, ledger::Dtype};

impl Workload {
    /// Bytes that it needs at least on a device: parameters, cache, activations and, of a training,
    /// gradients and moments.
    pub fn bytes(&self) -> u128 {
        self.weights_bytes()
            + self.kv_cache_bytes()
            + self.activations_bytes()
            + self.training_bytes()
    }

    /// Bytes of all parameters, adapters included. Of projections in 8 bits, a byte an element and a
    /// scale in f32 a row; a training holds them in bf16 too, which gradients read.
    pub fn weights_bytes(&self) -> u128 {
        let parameters = self.model.parameters() + self.lora.parameters(&self.model);
        let base = u128::from(self.dtype.base().bytes());
        if !self.dtype.is_8_bit() {
            return parameters * base;
        }
        let widths = Projection::ALL.map(|projection| projection.widths(&self.model));
        let of_layers = |of: &dyn Fn((usize, usize)) -> usize| {
            (self.model.num_hidden_layers * widths.into_iter().map(of).sum::<usize>()) as u128
        };
        let (narrow, scales) = (of_layers(&|(k, n)| k * n), of_layers(&|(_, n)| n));
        let wide = match self.task {
            Task::Train { .. } => parameters,
            Task::Forward { .. }
            | Task::Generate { .. }
            | Task::Verify { .. }
            | Task::Evaluate { .. } => parameters - narrow,
        };
        let bytes = u128::from(self.dtype.bytes());
        wide * base + narrow * bytes + scales * u128::from(Dtype::F32.bytes())
    }

    /// Bytes of the preallocated cache: keys and values, K·d wide, of every layer and token.
    /// Training, evaluation, packed sequences and a generation without a cache keep none.
    pub fn kv_cache_bytes(&self) -> u128 {
        let batch = match self.task {
            Task::Forward { sequences: Some(Ragged::Packed(_)), .. }
            | Task::Generate { kv_cache: false, .. }
            | Task::Train { .. }
            | Task::Evaluate { .. } => return 0,
            Task::Forward { batch, .. } | Task::Generate { batch, .. } => batch,
            Task::Verify { batch, .. } => batch,
        };
        let tokens = self.positions();
        let width = 2 * self.model.num_hidden_layers * self.model.kv_width();
        u128::from(batch)
            * u128::from(tokens)
            * width as u128
            * u128::from(self.dtype.base().bytes())
    }

    /// Bytes of the token ids, targets and weights that a training step holds on the host.
    pub fn tokens_bytes(&self) -> u128 {
        let Task::Train { batch, seq, accumulate, .. } = self.task else { return 0 };
        12 * [batch, seq, accumulate].map(u128::from).iter().product::<u128>()
    }

    /// Bytes that a training holds beside weights and activations: gradients, in bf16 where the
    /// model is and no micro-steps are summed, else in f32; both moments; and where the weights are
    /// narrower, their f32 masters.
    pub fn training_bytes(&self) -> u128 {
        let Task::Train { full, accumulate, moments, .. } = self.task else { return 0 };
        let base = if full { self.model.parameters() } else { 0 };
        let trained = base + self.lora.parameters(&self.model);
        let gradient = match self.dtype.base() {
            Dtype::BF16 if accumulate == 1 => 2,
            Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::Fp8 => 4,
        };
        let masters = if self.dtype == Dtype::F32 { 0 } else { 4 };
        trained * (gradient + 2 * u128::from(moments.bytes()) + masters)
    }

    /// Bytes that the largest pass needs at once beside weights and cache, about: scores before
    /// and after the mask, the mask, the MLP's three tensors, four of the residual's width, and
    /// logits with their f32 copy, of what is scored [`LOSS_ROWS`] at a time. In training, layer upon layer, what gradients will read; and of
    /// blocked attention, the weights of one layer, which come back with their gradients.
    pub fn activations_bytes(&self) -> u128 {
        let [batch, seq, _, head_rows] = self.largest_pass();
        let model = &self.model;
        let (rows, layers) = (batch * seq, model.num_hidden_layers as u128);
        let [d, f, q, kv] =
            [model.hidden_size, model.intermediate_size, model.q_width(), model.kv_width()]
                .map(|n| n as u128);
        let wide = 3 * f + 4 * d;
        let [of_heads, masks] = self.scores();
        let once = 2 * of_heads + masks + rows * wide;
        let (heads, block) = (model.num_attention_heads as u128, ATTENTION_BLOCK as u128);
        // Softmax's output, or attention's with each row's maximum and sum; and about half of all
        // scores, twice.
        let (of_softmax, again) = match self.attention {
            AttentionMode::Dense => (of_heads, 0),
            AttentionMode::Blocked => (rows * (q + 2 * heads), rows * heads * (seq + block)),
        };
        // Queries, keys and values; gate, up and their product; both norms' inputs and outputs. Of
        // further norms, their inputs: what attention and the MLP give, and queries and keys as
        // projected.
        let outer = if model.sandwich_norms { 2 * d } else { 0 };
        let of_qk = if model.qk_norm { q + kv } else { 0 };
        let kept = of_softmax + rows * (wide + q + 2 * kv + outer + of_qk);
        let layered = match self.task {
            Task::Train { recompute: true, .. } => {
                kept + again + layers * rows * model.hidden_size as u128
            }
            Task::Train { .. } => layers * kept + again,
            Task::Forward { .. }
            | Task::Generate { .. }
            | Task::Verify { .. }
            | Task::Evaluate { .. } => 0,
        };
        let bytes = u128::from(self.dtype.base().bytes());
        let logits = head_rows * model.vocab_size as u128 * (bytes + 4);
        // A projection's input in 8 bits.
        let narrow = match self.dtype.is_8_bit() {
            true => rows * d.max(f).max(q) * u128::from(self.dtype.bytes()),
            false => 0,
        };
        (once + layered) * bytes + narrow + logits
    }

    /// Of which scores and their mask, which a kernel for all of attention never holds.
    pub fn scores_bytes(&self) -> u128 {
        let [of_heads, masks] = self.scores();
        (2 * of_heads + masks) * u128::from(self.dtype.base().bytes())
    }

    /// Elements of one layer's scores that the largest pass holds at once, of the layer that sees
    /// most, and of the masks: one for each kind of layer. Blocked attention holds the scores of one
    /// block of queries, and masks blocks at both ends of them.
    fn scores(&self) -> [u128; 2] {
        let [batch, seq, held, _] = self.largest_pass();
        let model = &self.model;
        let windowed = model.windowed_layers();
        let width = model.window.as_ref().map_or(held, |window| window.width as u128);
        let seen = seq + (held - seq).min(width - 1);
        let kinds = [(windowed < model.num_hidden_layers, held), (windowed > 0, seen)];
        let keys = kinds.into_iter().filter(|(any, _)| *any).map(|(_, keys)| keys);
        let most = keys.clone().max().unwrap_or(held);
        let heads = batch * model.num_attention_heads as u128;
        match self.attention {
            AttentionMode::Dense => [heads * seq * most, seq * keys.sum::<u128>()],
            AttentionMode::Blocked => {
                let block = ATTENTION_BLOCK as u128;
                let rows = seq.min(block);
                [heads * rows * most, rows * most.min(4 * block)]
            }
        }
    }

    /// (sequences, tokens fed, tokens held after it, rows of logits at once) of the largest pass. Of
    /// sequences of different lengths, it is as if each were as long as the longest.
    fn largest_pass(&self) -> [u128; 4] {
        let chunked = |prompt: u64, chunk: Option<u64>| chunk.map_or(prompt, |c| prompt.min(c));
        let (batch, seq, held, head_rows) = match &self.task {
            Task::Forward { batch, seq, past, logits, sequences } => {
                let head_rows = match logits {
                    Logits::All => batch * seq,
                    Logits::Last => {
                        sequences.as_ref().map_or(*batch, |s| s.lengths().count() as u64)
                    }
                    Logits::None => 0,
                };
                match sequences {
                    Some(Ragged::Packed(lengths)) => {
                        let (_, longest) = lengths.range().unwrap_or((1, *seq));
                        (seq.div_ceil(longest), longest, longest, head_rows)
                    }
                    Some(Ragged::Padded(_)) | None => (*batch, *seq, past + seq, head_rows),
                }
            }
            Task::Generate { batch, kv_cache: false, .. } => {
                (*batch, self.positions(), self.positions(), *batch)
            }
            Task::Generate { batch, past, prompt_tokens, then, prefill_chunk, .. } => {
                let prompts = then.iter().map(|turn| turn.prompt_tokens + 1);
                let longest = prompts.chain([*prompt_tokens]).max().unwrap_or(*prompt_tokens);
                let held = if then.is_empty() { past + prompt_tokens } else { self.positions() };
                (*batch, chunked(longest, *prefill_chunk), held, *batch)
            }
            Task::Verify { batch, drafted, .. } => {
                (*batch, drafted + 1, self.positions(), batch * (drafted + 1))
            }
            Task::Train { batch, seq, rows, .. } | Task::Evaluate { batch, seq, rows, .. } => {
                let (batch, seq) = rows.largest(*batch, *seq);
                (batch, seq, seq, (batch * seq).min(LOSS_ROWS as u64))
            }
        };
        [batch, seq, held, head_rows].map(u128::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{LoraConfig, ModelConfig},
        ledger::MomentDtype,
        workload::{Kind, Rows},
    };

    #[test]
    fn memory_goes_by_the_widest_pass() {
        let bytes = |task: Task| {
            let (model, lora) = (ModelConfig::preset("tiny").unwrap(), LoraConfig::none());
            Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }
                .activations_bytes()
        };
        let train = |seq, rows| Task::Train {
            batch: 2,
            seq,
            accumulate: 1,
            steps: 2,
            full: true,
            recompute: false,
            clip: true,
            moments: Default::default(),
            rows,
        };
        let (widths, lengths) = (vec![(7, 1), (9, 1)].into(), vec![(7, 2), (9, 1), (2, 1)].into());
        let padded = Rows::Padded { widths, lengths };
        assert_eq!(bytes(train(500, padded)), bytes(train(9, Rows::Whole)));
        // 19 tokens in sequences of at most 9 are as if 3 were so long.
        let (passes, documents) = (vec![(19, 2)].into(), vec![(9, 2), (1, 20)].into());
        let packed = bytes(train(500, Rows::Packed { passes, documents }));
        assert!(bytes(train(9, Rows::Whole)) < packed && packed < bytes(train(18, Rows::Whole)));
        let Task::Generate { sampling, .. } = Kind::Generate.task() else { panic!() };
        let without = Task::Generate {
            batch: 1,
            past: 0,
            prompt_tokens: 5,
            prompts: None,
            new_tokens: 3,
            max_new_tokens: 3,
            then: vec![],
            prefill_chunk: None,
            kv_cache: false,
            sampling,
        };
        let (model, lora) = (ModelConfig::preset("tiny").unwrap(), LoraConfig::none());
        let without = Workload {
            model,
            lora,
            dtype: Dtype::F32,
            attention: Default::default(),
            task: without,
        };
        assert_eq!(without.kv_cache_bytes(), 0);
    }

    #[test]
    fn moments_in_bf16_take_half_the_bytes() {
        let model = ModelConfig::preset("tiny").unwrap();
        let bytes = |kept| {
            let mut task = Kind::Train.task();
            let Task::Train { full, moments, .. } = &mut task else { panic!() };
            (*full, *moments) = (true, kept);
            let (model, lora, dtype) = (model.clone(), LoraConfig::none(), Dtype::BF16);
            Workload { model, lora, dtype, attention: Default::default(), task }.training_bytes()
        };
        // A gradient in bf16 and a master in f32 beside them.
        assert_eq!(bytes(MomentDtype::F32), model.parameters() * (2 + 8 + 4));
        assert_eq!(bytes(MomentDtype::BF16), model.parameters() * (2 + 4 + 4));
    }

    #[test]
    fn blocked_attention_holds_a_block_of_scores() {
        let (model, lora) = (ModelConfig::preset("tiny").unwrap(), LoraConfig::none());
        let of = |attention, seq| {
            let mut task = Kind::Train.task();
            if let Task::Train { seq: length, .. } = &mut task {
                *length = seq;
            }
            Workload {
                model: model.clone(),
                lora: lora.clone(),
                dtype: Dtype::F32,
                attention,
                task,
            }
        };
        let heads = model.num_attention_heads as u128;
        let blocked = of(AttentionMode::Blocked, 1000);
        assert_eq!(blocked.scores(), [heads * 64 * 1000, 64 * 256]);
        assert_eq!(of(AttentionMode::Blocked, 9).scores(), [heads * 9 * 9, 9 * 9]);
        // Layers no longer hold a square of the length each.
        let dense = of(AttentionMode::Dense, 1000);
        assert!(2 * blocked.activations_bytes() < dense.activations_bytes());
    }

    #[test]
    fn a_window_bounds_what_is_held_of_scores() {
        // 6 heads; 1 token on top of 99: 8 keys in a window of 8, all 100 without one.
        let model = ModelConfig::preset("tiny-mistral").unwrap();
        let of = |model: &ModelConfig, seq, past| {
            let task = Task::Forward { batch: 1, seq, past, logits: Logits::Last, sequences: None };
            let (model, lora) = (model.clone(), LoraConfig::none());
            Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }
                .scores()
        };
        assert_eq!(of(&model, 1, 99), [6 * 8, 8]);
        assert_eq!(of(&model, 12, 0), [6 * 12 * 12, 12 * 12]);
        assert_eq!(of(&ModelConfig { window: None, ..model }, 1, 99), [6 * 100, 100]);
        // Layers of both kinds have a mask each.
        let both = ModelConfig::preset("tiny-gemma3").unwrap();
        assert_eq!(of(&both, 2, 99), [4 * 2 * 101, 2 * (101 + 9)]);
    }
}
