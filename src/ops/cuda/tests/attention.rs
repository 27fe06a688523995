//! Attention, of whole sequences and with one token.

use candle_core::{DType, Result, Tensor};

use super::{
    super::{Attend, Causal, Kernels, Norm, attend_space},
    TYPES, check, dot, gpu, normed, one, random, softmax,
};
use crate::ops::launch::Nodes;

#[test]
fn attention_in_a_window() -> Result<()> {
    let (device, nodes, dtype) = (gpu(), Nodes::kept(), DType::BF16);
    let kernels = Kernels::on(&device, dtype).unwrap();
    // (heads, key heads, d, queries, tokens before, window, keys of so many in the cache)
    for (heads, kv_heads, d, seq, past, window, (keys, capacity)) in [
        (4, 2, 64, 150, 0, Some(40), (150, 150)),
        (2, 1, 128, 70, 33, Some(9), (103, 120)),
        (3, 3, 64, 5, 200, Some(64), (68, 90)),
        (2, 2, 64, 33, 7, None, (40, 64)),
    ] {
        let (q, qs) = random(&[2, heads, seq, d], dtype, 1, &device);
        let ((k, ks), (v, vs)) = (
            random(&[2, kv_heads, capacity, d], dtype, 2, &device),
            random(&[2, kv_heads, capacity, d], dtype, 3, &device),
        );
        let (k, v) = (k.narrow(2, 0, keys)?, v.narrow(2, 0, keys)?);
        assert!(Kernels::attention_serves(&q, &k, &v));
        let ours = kernels.attention(&nodes, &q, &k, &v, Causal { seq, past, window })?;
        let mut expected = vec![0.0; 2 * seq * heads * d];
        for (b, h, t) in (0..2 * heads * seq).map(|i| (i / seq / heads, i / seq % heads, i % seq)) {
            let own = keys - seq + t;
            let first = window.map_or(0, |w: usize| (own + 1).saturating_sub(w));
            let head = (b * kv_heads + h / (heads / kv_heads)) * capacity;
            let row = |all: &[f32], i: usize| all[(head + i) * d..][..d].to_vec();
            let query = &qs[((b * heads + h) * seq + t) * d..][..d];
            let scores: Vec<f32> = (first..=own).map(|i| dot(query, &row(&ks, i))).collect();
            let out = &mut expected[((b * seq + t) * heads + h) * d..][..d];
            for (weight, i) in softmax(&scores).into_iter().zip(first..) {
                out.iter_mut().zip(row(&vs, i)).for_each(|(o, v)| *o += weight * v);
            }
        }
        check(&format!("attention {heads} {d} {window:?}"), dtype, &ours, &expected);
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
        window: None,
        norms: false,
        cut: None,
    };
    for dtype in TYPES {
        for case in [
            plain,
            One { held: 0, ..plain },
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
    let One { batch, heads, kv_heads, d, held, window, norms, cut } = case;
    let (device, nodes, capacity) = (gpu(), Nodes::kept(), held + 9);
    let kernels = Kernels::on(&device, dtype).unwrap();
    let (lookers, splits) =
        cut.or_else(|| attend_space(batch, heads, kv_heads, d, capacity)).unwrap();
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
            window,
            shares: &zeros((batch * heads, splits * (d + 2)), DType::F32)?,
            done: &done,
        },
    )?;

    let turned = |x: &[f32], gain: &[f32], shift: f32| {
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
        for h in 0..kv_heads {
            let place = ((b * kv_heads + h) * capacity + held) * d;
            ks[place..][..d].copy_from_slice(&turned(vector(heads + h), &k_gains, 0.0));
            vs[place..][..d].copy_from_slice(vector(heads + kv_heads + h));
        }
        for h in 0..heads {
            let query: Vec<f32> =
                turned(vector(h), &q_gains, 1.0).iter().map(|x| 0.25 * x).collect();
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
