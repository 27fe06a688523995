//! Rows in 8 bits and their products.

use candle_core::{DType, Device, Result, Tensor};

use super::{super::Kernels, gpu, random, values_of};
use crate::ops::{
    cpu,
    launch::{Node, Nodes},
};

/// Codes and scales that the CPU makes of the same rows.
fn on_the_cpu(x: &Tensor) -> Result<(Tensor, Tensor)> {
    cpu::quantized(&x.to_device(&Device::Cpu)?)
}

#[test]
fn codes_and_scales_are_the_cpus() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in [DType::F32, DType::BF16] {
        let kernels = Kernels::on(&device, dtype).unwrap();
        for (rows, width) in [(1, 16), (5, 7), (33, 896), (2, 4864), (3, 18_944)] {
            let (x, _) = random(&[rows, width], dtype, 3, &device);
            // Rows of very different sizes, one of zeros among them.
            let sizes: Vec<f32> = (0..rows).map(|i| 10f32.powi(i as i32 % 7 - 3)).collect();
            let sizes = sizes.iter().enumerate().map(|(i, s)| if i == 2 { 0.0 } else { *s });
            let sizes = Tensor::from_vec(sizes.collect(), (rows, 1), &Device::Cpu)?;
            let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.broadcast_mul(&sizes)?;
            let x = x.to_dtype(dtype)?.to_device(&device)?;
            let to = kernels.empty_8_bits((rows, width))?;
            kernels.quantize(&nodes, &x, [&to.codes, &to.scales])?;
            let (codes, scales) = on_the_cpu(&x)?;
            assert_eq!(values_of(&to.scales), values_of(&scales), "{dtype:?} {rows} x {width}");
            assert_eq!(values_of(&to.codes), values_of(&codes), "{dtype:?} {rows} x {width}");
        }
    }
    Ok(())
}

#[test]
fn products_are_those_of_the_codes() -> Result<()> {
    let device = gpu();
    assert!(Kernels::multiply_8_bits(&device)?, "a GPU with fp8");
    let kernels = Kernels::on(&device, DType::BF16).unwrap();
    for (m, k, n) in [(1, 896, 4864), (2, 32, 16), (7, 64, 48), (33, 4864, 896), (300, 512, 1024)] {
        let nodes = Nodes::kept();
        let of = |rows, seed| -> Result<_> {
            let (x, _) = random(&[rows, k], DType::BF16, seed, &device);
            let to = kernels.empty_8_bits((rows, k))?;
            kernels.quantize(&Nodes::default(), &x, [&to.codes, &to.scales])?;
            Ok((to, on_the_cpu(&x)?))
        };
        let ((x, (x_codes, of_x)), (w, (w_codes, of_w))) = (of(m, 1)?, of(n, 2)?);
        // Columns of a wider matrix, whose others stay as they are.
        let all = Tensor::ones((m, n + 32), DType::BF16, &device)?;
        let out = all.narrow(1, 16, n)?;
        let (x, w) = ([&x.codes, &x.scales], [&w.codes, &w.scales]);
        kernels.eight_bit_product(&nodes, &out, x, w)?;
        let expected = cpu::eight_bit_product([&x_codes, &of_x], [&w_codes, &of_w], DType::F32)?;
        let (ours, theirs) = (values_of(&out), values_of(&expected));
        let square = |x: f32| f64::from(x) * f64::from(x);
        let apart: f64 = ours.iter().zip(&theirs).map(|(a, b)| square(a - b)).sum();
        let apart = (apart / theirs.iter().map(|b| square(*b)).sum::<f64>()).sqrt();
        println!("{m} x {k} x {n}: {apart:.1e}");
        // Rounding to bf16, and whatever bits a tensor core drops of its sums.
        assert!(apart < 5e-3, "{m} x {k} x {n}: {apart}");
        for beside in [all.narrow(1, 0, 16)?, all.narrow(1, n + 16, 16)?] {
            assert!(values_of(&beside).iter().all(|x| *x == 1.0));
        }
        assert_eq!(nodes.into_vec(), [Node::Library { nodes: 0 }]);
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, DType::BF16).unwrap();
    let narrow = |rows, width| kernels.empty_8_bits((rows, width));
    let out = kernels.empty((2, 24), DType::BF16)?;
    let (x, w) = (narrow(2, 32)?, narrow(24, 32)?);
    let product =
        kernels.eight_bit_product(&nodes, &out, [&x.codes, &x.scales], [&w.codes, &w.scales]);
    assert!(product.unwrap_err().to_string().contains("32 and 24 columns"));
    let w = narrow(32, 48)?;
    let product =
        kernels.eight_bit_product(&nodes, &out, [&x.codes, &x.scales], [&w.codes, &w.scales]);
    assert!(product.unwrap_err().to_string().contains("does not take tensors"));
    assert!(nodes.into_vec().is_empty());
    Ok(())
}
