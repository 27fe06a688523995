//! Products by cuBLAS in every layout that it reads.

use candle_core::{DType, Device, Result, Tensor};

use super::{super::Kernels, TYPES, check, gpu, random, values_of};
use crate::ops::launch::{Node, Nodes};

/// Matrices (batch…, rows, columns) laid out as `way` says, and their values by rows.
fn laid_out(
    way: usize,
    (batch, rows, columns): (&[usize], usize, usize),
    (dtype, seed): (DType, u64),
    device: &Device,
) -> Result<(Tensor, Vec<f32>)> {
    let of = |rows: usize, columns: usize| {
        random(&[batch, &[rows, columns]].concat(), dtype, seed, device).0
    };
    let last = batch.len();
    let tensor = match way {
        0 => of(rows, columns),
        // Column after column.
        1 => of(columns, rows).t()?,
        // Columns of a wider matrix, which begin at an odd place.
        2 => of(rows, columns + 5).narrow(last + 1, 3, columns)?,
        3 => of(columns, rows + 3).narrow(last + 1, 1, rows)?.t()?,
        // The held part of a cache.
        _ => of(rows + 4, columns).narrow(last, 0, rows)?,
    };
    let values = values_of(&tensor);
    Ok((tensor, values))
}

/// before + factor · a · b on the host.
fn expected(
    (a, b): (&[f32], &[f32]),
    [batch, m, k, n]: [usize; 4],
    factor: f32,
    before: impl Fn(usize, usize, usize) -> f32,
) -> Vec<f32> {
    let each = (0..batch * m * n).map(|at| (at / (m * n), at / n % m, at % n));
    each.map(|(matrix, i, j)| {
        let of = |p: usize| a[(matrix * m + i) * k + p] * b[(matrix * k + p) * n + j];
        before(matrix, i, j) + factor * (0..k).map(of).sum::<f32>()
    })
    .collect()
}

/// (leading dimensions, m, k, n)
const SIZES: [(&[usize], usize, usize, usize); 6] = [
    (&[], 1, 7, 5),
    (&[], 33, 1, 9),
    (&[], 64, 48, 1),
    (&[], 130, 72, 40),
    (&[3], 17, 20, 31),
    (&[2, 3], 9, 65, 16),
];

#[test]
fn products_of_every_layout() -> Result<()> {
    let device = gpu();
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        for (batch, m, k, n) in SIZES {
            for (way_a, way_b) in (0..25).map(|i| (i / 5, i % 5)) {
                let (a, a_s) = laid_out(way_a, (batch, m, k), (dtype, 1), &device)?;
                let (b, b_s) = laid_out(way_b, (batch, k, n), (dtype, 2), &device)?;
                assert!(Kernels::multiply(&a, &b).is_some(), "{batch:?} {way_a} {way_b}");
                let nodes = Nodes::kept();
                let out = kernels.product(&nodes, &a, &b)?;
                assert_eq!(out.dims(), [batch, &[m, n]].concat());
                // Nothing is being recorded, so that it is no node of a graph.
                assert_eq!(nodes.into_vec(), [Node::Library { nodes: 0 }]);
                let size = [batch.iter().product(), m, k, n];
                let name = format!("{batch:?} {m} {k} {n} by {way_a} and {way_b}");
                check(&name, dtype, &out, &expected((&a_s, &b_s), size, 1.0, |_, _, _| 0.0));
            }
        }
    }
    Ok(())
}

#[test]
fn products_added_in_place() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        for (batch, m, k, n, factor) in
            [(1, 40, 8, 72, 2.0), (1, 5, 3, 7, -0.5), (4, 33, 16, 9, 1.0)]
        {
            for (way_a, way_b) in (0..25).map(|i| (i / 5, i % 5)) {
                let (a, a_s) = laid_out(way_a, (&[batch], m, k), (dtype, 1), &device)?;
                let (b, b_s) = laid_out(way_b, (&[batch], k, n), (dtype, 2), &device)?;
                // Columns of a wider matrix, whose others stay as they are.
                let (wide, before) = random(&[batch, m, n + 6], dtype, 3, &device);
                let out = wide.narrow(2, 5, n)?;
                let [x, y] = [kernels.matrices(&a)?, kernels.matrices(&b)?];
                kernels.product_into(&nodes, &out, x, y, Some(factor))?;
                let mut all = before.clone();
                let sums = expected((&a_s, &b_s), [batch, m, k, n], factor, |matrix, i, j| {
                    before[(matrix * m + i) * (n + 6) + 5 + j]
                });
                for (at, sum) in sums.into_iter().enumerate() {
                    all[at / n * (n + 6) + 5 + at % n] = sum;
                }
                let name = format!("{batch} {m} {k} {n} by {way_a} and {way_b}, added");
                check(&name, dtype, &wide, &all);
                // Into the same place once more, without what it holds.
                kernels.product_into(&nodes, &out, x, y, None)?;
                let product = expected((&a_s, &b_s), [batch, m, k, n], 1.0, |_, _, _| 0.0);
                check(&format!("{name}, then not"), dtype, &out.contiguous()?, &product);
            }
        }
    }
    Ok(())
}

#[test]
fn weights_one_after_another_are_one() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        let (all, values) = random(&[1 + 8 + 3, 40], dtype, 1, &device);
        let parts = [all.narrow(0, 0, 1)?, all.narrow(0, 1, 8)?, all.narrow(0, 9, 3)?];
        let [first, second, third] = &parts;
        assert!(kernels.are_stacked(&[first, second, third]));
        assert!(kernels.are_stacked(&[second, third]));
        assert!(!kernels.are_stacked(&[first, third]));
        assert!(!kernels.are_stacked(&[second, first]));
        assert!(!kernels.are_stacked(&[&second.t()?, third]));
        let ((x, xs), (y, ys)) =
            (random(&[17, 40], dtype, 2, &device), random(&[17, 12], dtype, 3, &device));
        let stacked = kernels.stacked(&[first, second, third])?;
        let transposed = (0..12 * 40).map(|i| values[i % 12 * 40 + i / 12]).collect::<Vec<_>>();
        let out = kernels.empty((17, 12), dtype)?;
        kernels.product_into(&nodes, &out, kernels.matrices(&x)?, stacked.t(), None)?;
        let of = |a, b, size| expected((a, b), size, 1.0, |_, _, _| 0.0);
        check("x times all", dtype, &out, &of(&xs, &transposed, [1, 17, 40, 12]));
        let out = kernels.empty((17, 40), dtype)?;
        kernels.product_into(&nodes, &out, kernels.matrices(&y)?, stacked, None)?;
        check("y times all", dtype, &out, &of(&ys, &values, [1, 17, 12, 40]));
    }
    Ok(())
}

#[test]
fn products_that_do_not_fit_are_refused() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, DType::BF16).unwrap();
    let of = |shape: &[usize], dtype| random(shape, dtype, 1, &device).0;
    let bf16 = |shape: &[usize]| of(shape, DType::BF16);
    let (a, b, wide) = (bf16(&[2, 6]), bf16(&[6, 4]), of(&[6, 4], DType::F32));
    assert!(Kernels::multiply(&a, &wide).is_none());
    let moved = bf16(&[3, 2, 6, 4]).transpose(0, 1)?;
    assert!(Kernels::multiply(&moved, &moved.t()?).is_none());
    let refused = |result: Result<()>, parts: &[&str]| {
        let said = result.unwrap_err().to_string();
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    };
    refused(kernels.product(&nodes, &a, &wide).map(drop), &["BF16", "F32"]);
    refused(kernels.product(&nodes, &a, &a).map(drop), &["[1, 2, 6] times [1, 2, 6]"]);
    refused(kernels.product(&nodes, &moved, &b).map(drop), &["[2, 3, 6, 4]", "[6, 4]"]);
    let into = |out: &Tensor| {
        kernels.product_into(&nodes, out, kernels.matrices(&a)?, kernels.matrices(&b)?, None)
    };
    refused(into(&bf16(&[2, 5])), &["into [1, 2, 5]"]);
    refused(into(&bf16(&[4, 2]).t()?), &["into [1, 2, 4] by [1, 2]"]);
    assert!(nodes.into_vec().is_empty());
    Ok(())
}
