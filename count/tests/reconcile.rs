//! Every structure is the reference plus its causes, and every way from one to another sums.

mod random;

use flopaudit_count::{
    analytic::{Cause, Structure, count, reference, terms},
    config::{LoraConfig, ModelConfig, Projection},
    ledger::Dtype,
    prices::{Cost, Prices},
    reconcile::{End, Side, reconcile},
    workload::{Logits, Rows, Task, Workload},
};
use proptest::prelude::*;
use random::{LARGE, workloads};

prop_compose! {
    fn price_lists()(
        [add, mul, div, exp, log, sqrt, trig, cmp, neg] in any::<[u8; 9]>(),
        mac in proptest::option::of(0u64..9),
    ) -> Prices {
        let text = format!(
            "add = {add}\nmul = {mul}\ndiv = {div}\nexp = {exp}\nlog = {log}\nsqrt = {sqrt}\n\
             trig = {trig}\ncmp = {cmp}\nneg = {neg}\n"
        );
        Prices { mac, ..toml::from_str(&text).unwrap() }
    }
}

/// macs, outputs and each primitive.
fn parts(cost: &Cost) -> [u128; 11] {
    let other = cost.other.named().map(|(_, n)| n);
    std::array::from_fn(|i| match i {
        0 => cost.macs,
        1 => cost.outputs,
        i => other[i - 2],
    })
}

/// The structures that have a count of `workload`.
fn covering(workload: &Workload) -> impl Iterator<Item = Structure> {
    Structure::ALL.into_iter().filter(|structure| structure.covers(&workload.task).is_ok())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn every_structure_is_the_reference_and_its_terms(workload in workloads(LARGE)) {
        let hub = parts(&reference(&workload).unwrap());
        for structure in covering(&workload) {
            let total = parts(&count(structure, &workload).unwrap().sum(|_, _| true).unwrap());
            let terms = terms(structure, &workload).unwrap();
            for i in 0..hub.len() {
                let counted: u128 = terms.iter().map(|t| parts(&t.counts)[i]).sum();
                let instead: u128 = terms.iter().map(|t| parts(&t.instead_of)[i]).sum();
                prop_assert_eq!(hub[i] + counted, total[i] + instead, "{} part {}", structure, i);
            }
        }
    }

    #[test]
    fn every_way_sums(
        workload in workloads(LARGE), from in price_lists(), to in price_lists(),
        [a, b] in [0..Structure::ALL.len(), 0..Structure::ALL.len()],
    ) {
        let covered: Vec<_> = covering(&workload).collect();
        let ends = [(a, from), (b, to)].map(|(which, prices)| {
            End { structure: covered[which % covered.len()], prices }
        });
        let [start, end] = ends.each_ref().map(|end| {
            let cost = count(end.structure, &workload).unwrap().sum(|_, _| true).unwrap();
            end.prices.flops(&cost).unwrap() as i128
        });
        let [from, to] = &ends;
        let way = reconcile("", std::slice::from_ref(&workload), from, to).unwrap();
        let sum: i128 = way.steps.iter().map(|s| s.flops).sum();
        prop_assert_eq!(start + sum, end, "{} to {}", from.structure, to.structure);
        for step in &way.steps {
            let name = step.cause.name();
            prop_assert!(!["other", "rest", "remainder"].iter().any(|w| name.contains(w)));
        }
    }
}

fn named(way: &flopaudit_count::reconcile::Reconciliation) -> Vec<(Cause, Side, i128)> {
    way.steps.iter().map(|s| (s.cause, s.of, s.flops)).collect()
}

#[test]
fn a_small_way_by_hand() {
    // tiny: D 32, F 48, L 3, H 4, K 2, d 8, V 320, tied. One token, nothing before it.
    let model = ModelConfig::preset("tiny").unwrap();
    let task = Task::Forward { batch: 1, seq: 1, past: 0, logits: Logits::All, sequences: None };
    let workload = Workload {
        model,
        lora: LoraConfig::none(),
        dtype: Dtype::F32,
        attention: Default::default(),
        task,
    };
    let end = |structure| End { structure, prices: Prices::matmul() };
    let way = |from, to| {
        reconcile("tiny", std::slice::from_ref(&workload), &end(from), &end(to)).unwrap()
    };
    // 6ND has no attention (2 products of 32 in each of 3 layers, 2 FLOPs a mac), and takes
    // 32 + 2·16 biases and 2·32 gains of each layer, and 32 at the end, for matrices.
    let six = way(Structure::SixNd, Structure::Exact);
    assert_eq!(six.from.total_flops, 2 * 33_696);
    assert_eq!(
        named(&six),
        [
            (Cause::Vectors, Side::From, -2 * (3 * 128 + 32)),
            (Cause::Scores, Side::From, 2 * 3 * 2 * 32),
        ]
    );
    assert_eq!(six.to.total_flops, 2 * 33_696 - 832 + 384);
    // Megatron and torch count the same products where nothing is adapted.
    assert!(way(Structure::Megatron, Structure::Torch).steps.is_empty());
    // The notebook: k and v 32 wide for 16, and two dense rotations of 32 × 32, in 3 layers.
    assert_eq!(
        named(&way(Structure::Exact, Structure::Notebook)),
        [
            (Cause::DenseRope, Side::To, 2 * 3 * 2 * 32 * 32),
            (Cause::MultiHead, Side::To, 2 * 3 * 2 * 32 * 16),
        ]
    );
}

#[test]
fn training_the_adapters_takes_no_gradient_of_frozen_weights() {
    let model = ModelConfig::preset("tiny").unwrap();
    let lora = LoraConfig::new(&model, 2, 4.0, &[Projection::OProj]).unwrap();
    let task = Task::Train {
        batch: 1,
        seq: 4,
        accumulate: 2,
        steps: 5,
        full: false,
        recompute: false,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    let workload = Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task };
    let end = |structure| End { structure, prices: Prices::matmul() };
    let way = reconcile("tiny", &[workload], &end(Structure::Megatron), &end(Structure::Torch));
    // 10 micro-steps of 4 tokens, 2 FLOPs a mac. o's adapter: 2·(32 + 32) in 3 layers, three
    // times. Frozen: q and o 32·32, k and v 32·16, MLP 3·32·48 in 3 layers; the head 32·320.
    // Below the first adapter: towards the inputs of q, k, v, o and of o's A, and attention's
    // four gradients of 4 scores a token.
    assert_eq!(
        named(&way.unwrap()),
        [
            (Cause::FrozenWeights, Side::To, -80 * (3 * (2 * 1024 + 2 * 512 + 3 * 1536) + 10_240)),
            (Cause::BelowAdapters, Side::To, -80 * (2 * 1024 + 2 * 512 + 64 + 4 * 4 * 32)),
            (Cause::LoraProducts, Side::From, 80 * 3 * 3 * 128),
        ]
    );
}

#[test]
fn a_layer_below_the_first_adapter_gets_no_gradient() {
    let model = ModelConfig::preset("tiny").unwrap();
    let mut lora = LoraConfig::new(&model, 2, 4.0, &[Projection::OProj]).unwrap();
    lora.layers = Some("1-2".parse().unwrap());
    lora.rank_pattern = [("layers.2.self_attn.o_proj".parse().unwrap(), 3)].into();
    let lora = lora.checked(&model).unwrap();
    let (accumulate, steps, full, recompute, clip) = (2, 5, false, false, true);
    let task = Task::Train {
        batch: 1,
        seq: 4,
        accumulate,
        steps,
        full,
        recompute,
        clip,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    let workload = Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task };
    let end = |structure| End { structure, prices: Prices::matmul() };
    let way = reconcile("tiny", &[workload], &end(Structure::Megatron), &end(Structure::Torch));
    let named = named(&way.unwrap());
    let size = |cause| named.iter().find(|(c, ..)| *c == cause).map(|(.., flops)| *flops);
    // As with an adapter in every layer, and the seven products and four gradients of layer 0.
    let first = 2 * 1024 + 2 * 512 + 64 + 4 * 4 * 32;
    let below = 2 * 1024 + 2 * 512 + 3 * 1536 + 4 * 4 * 32;
    assert_eq!(size(Cause::BelowAdapters), Some(-80 * (first + below)));
    // 2·(32 + 32) in layer 1, 3·(32 + 32) in layer 2, three times.
    assert_eq!(size(Cause::LoraProducts), Some(80 * 3 * (128 + 192)));
}

#[test]
fn what_training_executes_is_named() {
    let model = ModelConfig::preset("tiny").unwrap();
    let lora = LoraConfig::new(&model, 2, 4.0, &[Projection::QProj]).unwrap();
    let task = Task::Train {
        batch: 1,
        seq: 4,
        accumulate: 2,
        steps: 5,
        full: false,
        recompute: true,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    let workload = Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task };
    let end = |structure| End { structure, prices: Prices::unit() };
    let way = reconcile("tiny", &[workload], &end(Structure::Torch), &end(Structure::Exact));
    let named = named(&way.unwrap());
    let size = |cause| named.iter().find(|(c, ..)| *c == cause).map(|(.., flops)| *flops);
    // 10 micro-steps of 4 rows of 320 logits: 2·320 + 1 adds, 320 exps, a log and a mul; then a
    // div, 320 muls and an add.
    assert_eq!(size(Cause::Loss), Some(40 * (641 + 320 + 2 + 322)));
    // 5 steps over 3 pairs of 2·32: norm (2n − 1), clipping n, AdamW 14n; 6 + 2 for the factor.
    assert_eq!(size(Cause::Optimizer), Some(5 * (6 * (2 * 64 - 1 + 64 + 14 * 64) + 8)));
    // Each second micro-step's 6 gradients of 64.
    assert_eq!(size(Cause::Accumulation), Some(5 * 6 * 64));
    assert!(size(Cause::Recompute).unwrap() > 0);
}

#[test]
fn an_evaluation_is_its_passes_and_their_loss() {
    let model = ModelConfig::preset("tiny").unwrap();
    let task = Task::Evaluate { batch: 1, seq: 4, passes: 3, rows: Rows::Whole };
    let workload = Workload {
        model,
        lora: LoraConfig::none(),
        dtype: Dtype::F32,
        attention: Default::default(),
        task,
    };
    let end = |structure| End { structure, prices: Prices::matmul() };
    let way = reconcile("tiny", &[workload], &end(Structure::Torch), &end(Structure::Exact));
    assert_eq!(named(&way.unwrap()), []);
}

#[test]
fn what_further_families_have_is_named() {
    let way = |preset, from, to, task, prices: Prices| {
        let model = ModelConfig::preset(preset).unwrap();
        let workload = Workload {
            model,
            lora: LoraConfig::none(),
            dtype: Dtype::F32,
            attention: Default::default(),
            task,
        };
        let end = |structure| End { structure, prices: prices.clone() };
        named(&reconcile(preset, &[workload], &end(from), &end(to)).unwrap())
    };
    // A token on top of 30. Of 7 layers of 4 heads of width 8, six see 8 keys and not 31.
    let decode = Task::Forward { batch: 1, seq: 1, past: 30, logits: Logits::All, sequences: None };
    let to_megatron =
        way("tiny-gemma3", Structure::Exact, Structure::Megatron, decode, Prices::matmul());
    assert_eq!(to_megatron, [(Cause::Windows, Side::To, 2 * 2 * 6 * 4 * 8 * (31 - 8))]);

    // Four rows of 24 wide streams and 56 wide gates, 4 heads on 1 of width 8, seven times.
    let pass = Task::Forward { batch: 1, seq: 4, past: 0, logits: Logits::All, sequences: None };
    let to_notebook =
        way("tiny-gemma3", Structure::Exact, Structure::Notebook, pass.clone(), Prices::unit());
    let size = |cause| to_notebook.iter().find(|(c, ..)| *c == cause).map(|(.., flops)| *flops);
    // A norm of a row of w: 2w muls, w adds, w + 1 divs, a root.
    let norm = |rows: i128, width: i128| rows * (4 * width + 2);
    assert_eq!(size(Cause::OuterNorms), Some(-7 * 2 * norm(4, 24)));
    assert_eq!(size(Cause::HeadNorms), Some(-7 * norm(4 * 5, 8)));
    assert_eq!(size(Cause::GainOffset), Some(-(7 * (4 * 24 + 2 * 8) + 24)));
    assert_eq!(size(Cause::EmbeddingScale), Some(-4 * 24));
    // exp, add and div in place of 3 muls, 2 adds, exp and div.
    assert_eq!(size(Cause::Gelu), Some(7 * 4 * 56 * (3 - 7)));
    assert_eq!(size(Cause::AssumedBiases), Some(7 * 3 * 4 * 24));
    assert_eq!(size(Cause::SiluSign), None);

    // Of Qwen3, N has the gains of q and k: 2·8 beside 2·24 in each of 3 layers, and 24.
    let to_exact = way("tiny-qwen3", Structure::SixNd, Structure::Torch, pass, Prices::matmul());
    let vectors = to_exact.iter().find(|(cause, ..)| *cause == Cause::Vectors).unwrap();
    assert_eq!(vectors.2, -2 * 4 * (3 * (2 * 24 + 2 * 8) + 24));
}
