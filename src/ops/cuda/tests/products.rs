//! Products, with what is done to their inputs and results.

use candle_core::{DType, Result};

use super::{
    super::{Adapt, Gate, Kernels, Norm, Out, Project},
    TYPES, check, dot, gelu, gpu, normed, one, random, silu,
};
use crate::ops::launch::Nodes;

#[test]
fn products_of_few_rows() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    let k = 328;
    for (dtype, batches) in
        [(DType::F32, &[1, 2, 3, 7][..]), (DType::BF16, &[1, 2, 3, 8, 9, 25, 32, 50][..])]
    {
        let kernels = Kernels::on(&device, dtype).unwrap();
        let of = |shape: &[usize], seed| random(shape, dtype, seed, &device);
        for &batch in batches {
            assert!(Kernels::project_serves(dtype, batch, 3));
            let ((x, xs), (gain, gains)) = (of(&[batch, k], 1), of(&[k], 2));
            let heights = [40, 24, 17];
            let weights = heights.map(|n| of(&[n, k], n as u64));
            let biases = heights.map(|n| of(&[n], 100 + n as u64));
            let products = [0, 1, 2].map(|i| (&weights[i].0, Some(&biases[i].0)));
            let norm = Norm { gain: &gain, eps: 1e-6, shift: true };
            let y = |x: &[f32], i: usize| -> Vec<f32> {
                let rows = weights[i].1.chunks_exact(k).zip(&biases[i].1);
                rows.map(|(w, b)| dot(x, w) + b).collect()
            };
            let rows = || xs.chunks_exact(k);
            let out = kernels.empty((batch, 81), dtype)?;
            let plain = Project {
                out: Out::Plain(&out),
                x: &x,
                norm: Some(norm),
                products: &products,
                ahead: &[&weights[0].0, &weights[1].0],
            };
            kernels.project(&nodes, plain)?;
            let expected: Vec<f32> = rows()
                .map(|x| normed(x, &gains, 1e-6, 1.0))
                .flat_map(|x| [0, 1, 2].map(|i| y(&x, i)).concat())
                .collect();
            check(&format!("normed products {batch}"), dtype, &out, &expected);

            let (out, before) = of(&[batch, 40], 7);
            let added =
                Project { out: Out::Added(&out), norm: None, products: &products[..1], ..plain };
            kernels.project(&nodes, added)?;
            let sums = rows().flat_map(|x| y(x, 0)).zip(&before).map(|(y, b)| y + b);
            check(&format!("added product {batch}"), dtype, &out, &sums.collect::<Vec<_>>());

            let (second, seconds) = of(&[40, k], 8);
            let pair = [products[0], (&second, None)];
            for (gate, act) in [(Gate::Silu, silu as fn(f32) -> f32), (Gate::Gelu, gelu)] {
                let out = kernels.empty((batch, 40), dtype)?;
                let gated = Project { out: Out::Gated(gate, &out), products: &pair, ..added };
                kernels.project(&nodes, gated)?;
                let expected: Vec<f32> = rows()
                    .flat_map(|x| {
                        let up = seconds.chunks_exact(k).map(|w| dot(x, w));
                        y(x, 0).into_iter().zip(up).map(|(g, u)| act(g) * u).collect::<Vec<_>>()
                    })
                    .collect();
                check(&format!("gated {gate:?} {batch}"), dtype, &out, &expected);
            }
        }
    }
    Ok(())
}

#[test]
fn products_into_columns() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        let of = |shape: &[usize], seed| random(shape, dtype, seed, &device);
        for (batch, rank) in [(1, 8), (5, 3), (40, 16)] {
            let ((x, xs), (w, ws)) = (of(&[batch, 48], 1), of(&[20, 48], 2));
            let ((bias, bs), (low, ls)) = (of(&[20], 3), of(&[batch, 2 * rank], 4));
            let ((a, a_s), (b, b_s)) = (of(&[20, rank], 5), of(&[13, rank], 6));
            let (wide, mut expected) = of(&[batch, 50], 7);
            let (first, second) = (wide.narrow(1, 3, 20)?, wide.narrow(1, 30, 13)?);
            let by = [kernels.matrices(&x)?, kernels.matrices(&w)?.t()];
            kernels.product_into(&nodes, &first, by[0], by[1], Some(1.0))?;
            kernels.add_bias(&nodes, &first, &bias)?;
            let scaling = one(0.5, dtype, &device);
            let adapters = [(&first, &a), (&second, &b)];
            kernels.adapt(&nodes, Adapt { x: &low, adapters: &adapters, scaling: &scaling })?;
            for (row, out) in expected.chunks_exact_mut(50).enumerate() {
                let low = &ls[row * 2 * rank..][..2 * rank];
                for j in 0..20 {
                    let product = dot(&xs[row * 48..][..48], &ws[j * 48..][..48]);
                    let adapted = dot(&low[..rank], &a_s[j * rank..][..rank]);
                    out[3 + j] += product + bs[j] + 0.5 * adapted;
                }
                for j in 0..13 {
                    out[30 + j] += 0.5 * dot(&low[rank..], &b_s[j * rank..][..rank]);
                }
            }
            check(&format!("columns {batch} {rank}"), dtype, &wide, &expected);
        }
    }
    Ok(())
}
