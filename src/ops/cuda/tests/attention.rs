//! Attention, of whole sequences and with one token.

use candle_core::{DType, Device, Result, Tensor};

use super::{
    super::{Attend, Causal, Kernels, Norm, attend_space},
    TYPES, check, dot, gpu, normed, one, random, softmax, values_of,
};
use crate::ops::launch::Nodes;

/// One case of attention of whole sequences.
#[derive(Debug, Clone, Copy)]
struct Whole {
    heads: usize,
    kv_heads: usize,
    d: usize,
    seq: usize,
    past: usize,
    window: Option<usize>,
    /// Tokens of k and v, and those that there is room for.
    keys: (usize, usize),
}

/// Attention on the host: its output (B, T, H, d), and the gradients of q, k and v for one of it.
struct OnHost {
    out: Vec<f32>,
    gradients: [Vec<f32>; 3],
}

/// Of `batch` sequences, q (B, H, T, d), k and v (B, K, S, d) of which `room` tokens lie apart.
fn on_host(batch: usize, case: Whole, [qs, ks, vs]: [&[f32]; 3], dy: &[f32]) -> OnHost {
    let Whole { heads, kv_heads, d, seq, window, keys: (keys, room), .. } = case;
    let mut out = vec![0.0; batch * seq * heads * d];
    let mut dq = vec![0.0; qs.len()];
    let [mut dk, mut dv] = [0; 2].map(|_| vec![0.0; batch * kv_heads * keys * d]);
    for (b, h, t) in (0..batch * heads * seq).map(|i| (i / seq / heads, i / seq % heads, i % seq)) {
        let own = keys - seq + t;
        let first = window.map_or(0, |w: usize| (own + 1).saturating_sub(w));
        let head = b * kv_heads + h / (heads / kv_heads);
        let query = ((b * heads + h) * seq + t) * d;
        let row = ((b * seq + t) * heads + h) * d;
        let (q, dy) = (&qs[query..][..d], &dy[row..][..d]);
        let scores: Vec<f32> =
            (first..=own).map(|i| dot(q, &ks[(head * room + i) * d..][..d])).collect();
        let weights = softmax(&scores);
        for (weight, i) in weights.iter().zip(first..) {
            let v = &vs[(head * room + i) * d..][..d];
            out[row..][..d].iter_mut().zip(v).for_each(|(o, v)| *o += weight * v);
        }
        let mean = dot(&out[row..][..d], dy);
        for (weight, i) in weights.iter().zip(first..) {
            let (key, of) = ((head * room + i) * d, (head * keys + i) * d);
            let slope = weight * (dot(&vs[key..][..d], dy) - mean);
            for j in 0..d {
                dv[of + j] += weight * dy[j];
                dk[of + j] += slope * q[j];
                dq[query + j] += slope * ks[key + j];
            }
        }
    }
    OnHost { out, gradients: [dq, dk, dv] }
}

/// (q, k, v) and their values.
type Qkv = ([Tensor; 3], [Vec<f32>; 3]);

fn qkv(batch: usize, case: Whole, device: &Device) -> Result<Qkv> {
    let Whole { heads, kv_heads, d, seq, keys: (keys, room), .. } = case;
    let of = |shape: &[usize], seed| random(shape, DType::BF16, seed, device);
    let (q, qs) = of(&[batch, heads, seq, d], 1);
    let (k, ks) = of(&[batch, kv_heads, room, d], 2);
    let (v, vs) = of(&[batch, kv_heads, room, d], 3);
    Ok(([q, k.narrow(2, 0, keys)?, v.narrow(2, 0, keys)?], [qs, ks, vs]))
}

const PLAIN: Whole =
    Whole { heads: 4, kv_heads: 2, d: 64, seq: 150, past: 0, window: None, keys: (150, 150) };

#[test]
fn attention_of_whole_sequences() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, DType::BF16).unwrap();
    let long = Whole { d: 128, seq: 300, past: 100, keys: (400, 400), ..PLAIN };
    for case in [
        PLAIN,
        long,
        Whole { d: 64, ..long },
        Whole { window: Some(40), ..PLAIN },
        Whole { window: Some(128), keys: (400, 410), ..long },
        Whole { d: 64, window: Some(65), keys: (364, 410), ..long },
        Whole {
            heads: 2,
            kv_heads: 1,
            d: 128,
            seq: 70,
            past: 33,
            window: Some(9),
            keys: (103, 120),
        },
        Whole {
            heads: 3,
            kv_heads: 3,
            seq: 5,
            past: 200,
            window: Some(64),
            keys: (68, 90),
            ..PLAIN
        },
        Whole { heads: 2, kv_heads: 2, seq: 33, past: 7, keys: (40, 64), ..PLAIN },
        Whole { seq: 1, past: 130, keys: (131, 140), ..PLAIN },
        Whole { seq: 64, keys: (64, 64), ..PLAIN },
        Whole { seq: 129, past: 63, keys: (192, 192), ..PLAIN },
    ] {
        let ([q, k, v], [qs, ks, vs]) = qkv(2, case, &device)?;
        let Whole { seq, past, window, heads, d, .. } = case;
        assert!(Kernels::attention_serves(&q, &k, &v));
        let causal = Causal { seq, past, window };
        let expected = on_host(2, case, [&qs, &ks, &vs], &vec![0.0; 2 * seq * heads * d]);
        let dense = kernels.attention(&nodes, &q, &k, &v, causal)?;
        check(&format!("dense {case:?}"), DType::BF16, &dense, &expected.out);
        let (blocked, kept) = kernels.attention_blocked(&nodes, &q, &k, &v, causal, false)?;
        check(&format!("blocked {case:?}"), DType::BF16, &blocked, &expected.out);
        assert!(kept.is_none());
    }
    Ok(())
}

#[test]
fn gradients_of_attention() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, DType::BF16).unwrap();
    let all = [true; 3];
    let long = Whole { seq: 330, keys: (330, 330), ..PLAIN };
    for (case, wanted) in [
        (PLAIN, all),
        (Whole { d: 128, ..PLAIN }, all),
        (long, all),
        (Whole { d: 128, ..long }, all),
        (long, [true, false, false]),
        (long, [false, true, false]),
        (long, [false, false, true]),
        (Whole { d: 128, ..long }, [true, false, true]),
        (Whole { window: Some(70), ..long }, all),
        (Whole { d: 128, window: Some(64), ..long }, all),
        (Whole { window: Some(1), ..long }, all),
        (Whole { seq: 100, past: 70, keys: (170, 170), ..PLAIN }, all),
        (Whole { seq: 1, keys: (1, 1), ..PLAIN }, all),
        (Whole { heads: 3, kv_heads: 3, seq: 64, keys: (64, 64), ..PLAIN }, all),
    ] {
        let ([q, k, v], [qs, ks, vs]) = qkv(3, case, &device)?;
        let Whole { seq, past, window, heads, d, .. } = case;
        let (dy, dys) = random(&[3, seq, heads * d], DType::BF16, 4, &device);
        let causal = Causal { seq, past, window };
        let expected = on_host(3, case, [&qs, &ks, &vs], &dys);
        let (out, kept) = kernels.attention_blocked(&nodes, &q, &k, &v, causal, true)?;
        let ours = kernels.attention_gradients(
            &nodes,
            [&q, &k, &v],
            [&out, &dy, &kept.unwrap()],
            causal,
            wanted,
        )?;
        for (index, (ours, theirs)) in ours.iter().zip(&expected.gradients).enumerate() {
            assert_eq!(ours.is_some(), wanted[index], "{case:?}");
            let Some(ours) = ours else { continue };
            // Of a query that sees but itself, the weights are 1 and what they come from is 0.
            if theirs.iter().all(|x| x.abs() < 1e-5) {
                let most = values_of(ours).into_iter().fold(0.0, |most: f32, x| most.max(x.abs()));
                assert!(most < 0.1, "{case:?}: {most}");
                continue;
            }
            check(&format!("{} of {case:?}", ["dq", "dk", "dv"][index]), DType::BF16, ours, theirs);
        }
    }
    Ok(())
}

/// One case of attention with one token.
#[derive(Debug, Clone, Copy)]
struct One {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
    held: usize,
    /// How many fewer tokens the second sequence holds.
    behind: usize,
    window: Option<usize>,
    norms: bool,
    /// (lookers, splits), where it is not what is fastest.
    cut: Option<(usize, usize)>,
}

#[test]
fn attention_with_one_token() -> Result<()> {
    let plain = One {
        batch: 2,
        heads: 14,
        kv_heads: 2,
        d: 64,
        held: 100,
        behind: 0,
        window: None,
        norms: false,
        cut: None,
    };
    for dtype in TYPES {
        for case in [
            plain,
            One { held: 0, ..plain },
            One { held: 0, cut: Some((2, 2)), ..plain },
            One { held: 700, behind: 150, cut: Some((2, 3)), ..plain },
            One { d: 128, held: 500, window: Some(100), cut: Some((4, 3)), heads: 16, ..plain },
            One { behind: 37, ..plain },
            One { behind: 100, cut: Some((2, 5)), norms: true, ..plain },
            One { behind: 90, window: Some(17), cut: Some((14, 4)), ..plain },
            One { cut: Some((2, 5)), ..plain },
            One { cut: Some((2, 1)), norms: true, ..plain },
            One { window: Some(17), cut: Some((14, 4)), ..plain },
            One { window: Some(500), norms: true, ..plain },
            One { window: Some(1), ..plain },
            One { d: 8, ..plain },
            One { d: 16, norms: true, cut: Some((2, 3)), ..plain },
            One { d: 32, window: Some(64), cut: Some((2, 3)), ..plain },
            One { d: 128, norms: true, cut: Some((2, 32)), held: 300, ..plain },
            One { d: 256, heads: 4, kv_heads: 1, norms: true, window: Some(50), ..plain },
            One { d: 256, heads: 8, kv_heads: 1, norms: true, cut: Some((2, 7)), ..plain },
            One { d: 256, heads: 8, kv_heads: 4, cut: Some((4, 2)), ..plain },
            One { heads: 18, kv_heads: 2, cut: Some((6, 2)), ..plain },
        ] {
            attend_once(dtype, case)?;
        }
    }
    Ok(())
}

fn attend_once(dtype: DType, case: One) -> Result<()> {
    let One { batch, heads, kv_heads, d, held, behind, window, norms, cut } = case;
    let (device, nodes, capacity) = (gpu(), Nodes::kept(), held + 9);
    let kernels = Kernels::on(&device, dtype).unwrap();
    let (lookers, splits) =
        cut.or_else(|| attend_space(dtype, batch, heads, kv_heads, d, capacity)).unwrap();
    let of = |shape: &[usize], seed| random(shape, dtype, seed, &device);
    let (all, qkv) = of(&[batch, (heads + 2 * kv_heads) * d], 1);
    let (keys, mut ks) = of(&[batch, kv_heads, capacity, d], 2);
    let (values, mut vs) = of(&[batch, kv_heads, capacity, d], 3);
    let ((cos, c), (sin, s)) = (of(&[capacity, d / 2], 4), of(&[capacity, d / 2], 5));
    let ((q_gain, q_gains), (k_gain, k_gains)) = (of(&[d], 6), of(&[d], 7));
    let norm = |gain, shift| norms.then_some(Norm { gain, eps: 1e-6, shift });
    let zeros = |shape: (usize, usize), dtype| Tensor::zeros(shape, dtype, &device);
    let out = zeros((batch, heads * d), dtype)?;
    let done = zeros((1, batch * lookers), DType::U32)?;
    let counted = Tensor::from_vec(vec![held as u32], (1, 1), &device)?;
    let fewer = [0, behind as u32].into_iter().cycle().take(batch).collect();
    let fewer = Tensor::from_vec(fewer, (1, batch), &device)?;
    let fewer = (behind > 0).then_some(fewer);
    kernels.attend(
        &nodes,
        Attend {
            out: &out,
            q: &all.narrow(1, 0, heads * d)?,
            k: &all.narrow(1, heads * d, kv_heads * d)?,
            v: &all.narrow(1, (heads + kv_heads) * d, kv_heads * d)?,
            keys: &keys,
            values: &values,
            cos: &cos,
            sin: &sin,
            scale: &one(0.25, dtype, &device),
            q_norm: norm(&q_gain, true),
            k_norm: norm(&k_gain, false),
            held: &counted,
            behind: fewer.as_ref(),
            window,
            shares: &zeros((batch * heads, splits * (d + 2)), DType::F32)?,
            done: &done,
        },
    )?;

    let turned = |x: &[f32], held: usize, gain: &[f32], shift: f32| {
        let x = if norms { normed(x, gain, 1e-6, shift) } else { x.to_vec() };
        let (half, mut y) = (d / 2, x.clone());
        for i in 0..half {
            let (c, s) = (c[held * half + i], s[held * half + i]);
            y[i] = x[i] * c - x[i + half] * s;
            y[i + half] = x[i] * s + x[i + half] * c;
        }
        y
    };
    let mut expected = vec![];
    for (b, row) in qkv.chunks_exact((heads + 2 * kv_heads) * d).enumerate() {
        let vector = |i: usize| &row[i * d..][..d];
        let held = held - behind * (b % 2);
        for h in 0..kv_heads {
            let place = ((b * kv_heads + h) * capacity + held) * d;
            ks[place..][..d].copy_from_slice(&turned(vector(heads + h), held, &k_gains, 0.0));
            vs[place..][..d].copy_from_slice(vector(heads + kv_heads + h));
        }
        for h in 0..heads {
            let query: Vec<f32> =
                turned(vector(h), held, &q_gains, 1.0).iter().map(|x| 0.25 * x).collect();
            let first = window.map_or(0, |w: usize| (held + 1).saturating_sub(w));
            let head = (b * kv_heads + h / (heads / kv_heads)) * capacity;
            let at = |all: &[f32], i: usize| all[(head + i) * d..][..d].to_vec();
            let scores: Vec<f32> = (first..=held).map(|i| dot(&query, &at(&ks, i))).collect();
            let mut mixed = vec![0.0; d];
            for (weight, i) in softmax(&scores).into_iter().zip(first..) {
                mixed.iter_mut().zip(at(&vs, i)).for_each(|(m, v)| *m += weight * v);
            }
            expected.extend(mixed);
        }
    }
    check(&format!("{case:?}"), dtype, &out, &expected);
    check("keys", dtype, &keys, &ks);
    check("values", dtype, &values, &vs);
    assert_eq!(done.flatten_all()?.to_vec1::<u32>()?, vec![0; batch * lookers]);
    Ok(())
}
