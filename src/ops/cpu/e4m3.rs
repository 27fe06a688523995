//! 8-bit floats, e4m3: a sign, four bits of exponent, three of mantissa; 448 is the largest, 2⁻⁹ the
//! smallest above 0, and there is no infinity.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use float8::F8E4M3;
use rayon::prelude::*;

use super::{by_row::FEW, gemv};
use crate::ops::eight_bit::{LARGEST, LEAST};

/// What each code stands for.
static VALUES: [f32; 256] = values();

const fn values() -> [f32; 256] {
    let mut all = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code as u32 >> 3) & 15, code as u32 & 7);
        let magnitude = match (exponent, mantissa) {
            (15, 7) => f32::NAN,
            (0, steps) => steps as f32 / 512.0,
            // The exponent's bias is 7 here and 127 in f32, whose mantissa has 20 bits more.
            _ => f32::from_bits(((exponent + 120) << 23) | (mantissa << 20)),
        };
        all[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    all
}

/// The value of a code.
fn decoded(code: F8E4M3) -> f32 {
    VALUES[usize::from(code.to_bits())]
}

/// The code nearest to `x`, of two the even one; of what is beyond 448, that of 448.
fn encoded(x: f32) -> F8E4M3 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = x.abs();
    let code = if x.is_nan() {
        0x7f
    } else if magnitude >= LARGEST {
        0x7e
    } else {
        // Codes are 2^(exponent − 3) apart; below 2⁻⁶, as far as there.
        let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
        let apart = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
        let steps = (magnitude / apart).round_ties_even() as i32;
        // Eight codes for each exponent, counted from that of 0; steps start at 8 where it is not
        // the lowest, and 16 are the first of the next.
        ((exponent + 6) * 8 + steps) as u8
    };
    F8E4M3::from_bits(sign | code)
}

/// Rows (rows, width) of any type in 8 bits, and their scales (rows).
pub(in crate::ops) fn quantized(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let (rows, width) = x.dims2()?;
    let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let (mut codes, mut scales) = (vec![F8E4M3::ZERO; values.len()], vec![0f32; rows]);
    let row = |((codes, values), scale): ((&mut [F8E4M3], &[f32]), &mut f32)| {
        let most = values.iter().fold(LEAST, |most, x| most.max(x.abs()));
        *scale = most / LARGEST;
        let inverse = 1.0 / *scale;
        codes.iter_mut().zip(values).for_each(|(code, x)| *code = encoded(x * inverse));
    };
    let each = width.max(1);
    if values.len() < FEW {
        codes.chunks_mut(each).zip(values.chunks(each)).zip(&mut scales).for_each(row);
    } else {
        codes.par_chunks_mut(each).zip(values.par_chunks(each)).zip(&mut scales).for_each(row);
    }
    let codes = Tensor::from_vec(codes, (rows, width), &Device::Cpu)?;
    Ok((codes, Tensor::from_vec(scales, rows, &Device::Cpu)?))
}

/// x (m, k) · wᵀ of a weight (n, k), times the scales of the rows of both: (m, n) in `dtype`. Summed
/// in f32.
pub(in crate::ops) fn product(x: [&Tensor; 2], w: [&Tensor; 2], dtype: DType) -> Result<Tensor> {
    let ([x, of_rows], [w, of_columns]) = (x, w);
    let ((m, k), (n, _)) = (x.dims2()?, w.dims2()?);
    let wide = with_codes(x, |codes| codes.iter().map(|code| decoded(*code)).collect::<Vec<_>>())?;
    let mut sums = match m <= gemv::MOST_ROWS {
        true => with_codes(w, |codes| gemv::by_rows(&wide, codes, k, decoded))?,
        false => {
            let mut weight = vec![0f32; n * k];
            with_codes(w, |codes| {
                let of = |(to, codes): (&mut [f32], &[F8E4M3])| {
                    to.iter_mut().zip(codes).for_each(|(to, code)| *to = decoded(*code));
                };
                weight.par_chunks_mut(FEW).zip(codes.par_chunks(FEW)).for_each(of);
            })?;
            let of = |values, shape| Tensor::from_vec(values, shape, &Device::Cpu);
            let (x, w) = (of(wide, (m, k))?, of(weight, (n, k))?.t()?);
            let product =
                if super::serves(&x, &w) { super::product(&x, &w)? } else { x.matmul(&w)? };
            product.flatten_all()?.to_vec1()?
        }
    };
    let (of_rows, of_columns) = (of_rows.to_vec1::<f32>()?, of_columns.to_vec1::<f32>()?);
    for (sums, row) in sums.chunks_mut(n.max(1)).zip(&of_rows) {
        sums.iter_mut().zip(&of_columns).for_each(|(sum, column)| *sum = *sum * row * column);
    }
    Tensor::from_vec(sums, (m, n), &Device::Cpu)?.to_dtype(dtype)
}

/// `f` of the codes of a dense tensor.
fn with_codes<T>(t: &Tensor, f: impl FnOnce(&[F8E4M3]) -> T) -> Result<T> {
    let (storage, layout) = t.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F8E4M3(codes)), Some((start, end))) =
        (&*storage, layout.contiguous_offsets())
    else {
        bail!("takes dense e4m3, not {:?} by {:?}", t.dtype(), layout.stride());
    };
    Ok(f(&codes[start..end]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(x: f32) -> f32 {
        decoded(encoded(x))
    }

    #[test]
    fn values_are_those_of_the_format() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0x81, -(2f32.powi(-9))),
            (0xfe, -448.0),
        ] {
            assert_eq!(VALUES[code], value, "{code:#x}");
        }
        assert!(VALUES[0x7f].is_nan() && VALUES[0xff].is_nan());
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(encoded(VALUES[usize::from(code)]).to_bits(), code);
        }
    }

    #[test]
    fn ties_go_to_the_even_code_and_the_largest_is_kept_to() {
        for (x, value) in [
            (1.0625, 1.0),  // between 1 and 1.125, whose code is odd
            (1.1875, 1.25), // between 1.125 and 1.25
            (1.063, 1.125),
            (15.5, 16.0), // between 15 and 16, of the next exponent
            (2f32.powi(-10), 0.0),
            (3.0 * 2f32.powi(-10), 2.0 * 2f32.powi(-9)),
            (1.01 * 2f32.powi(-10), 2f32.powi(-9)),
            (15.0 * 2f32.powi(-10), 2f32.powi(-6)), // from the smallest exponent to the next
            (432.0, 448.0),
            (431.9, 416.0),
            (464.0, 448.0),
            (1e30, 448.0),
            (f32::INFINITY, 448.0),
            (f32::MIN_POSITIVE / 2.0, 0.0),
        ] {
            assert_eq!(rounded(x), value, "{x}");
            assert_eq!(rounded(-x), -value, "-{x}");
        }
        assert!(rounded(f32::NAN).is_nan());
    }

    #[test]
    fn each_number_goes_to_the_nearest_code() {
        let mut codes: Vec<f32> = VALUES.into_iter().filter(|value| !value.is_nan()).collect();
        codes.sort_by(f32::total_cmp);
        for i in -20_000..20_000 {
            let x = i as f32 * 0.0241;
            let nearest = codes.iter().map(|code| (code - x).abs()).fold(f32::MAX, f32::min);
            assert_eq!((rounded(x) - x).abs(), nearest, "{x}");
        }
    }

    #[test]
    fn rows_have_scales_of_their_own() {
        let rows = vec![1.0f32, -2.0, 0.5, 0.0, 0.0, 0.0, 896.0, 1.0, 448.0];
        let x = Tensor::from_vec(rows, (3, 3), &Device::Cpu).unwrap();
        let (codes, scales) = quantized(&x).unwrap();
        let scales = scales.to_vec1::<f32>().unwrap();
        assert_eq!([scales[0], scales[2]], [2.0 / 448.0, 2.0]);
        // Of a row of zeros, a number.
        assert!(scales[1] > 0.0 && (1.0 / scales[1]).is_finite());
        let values = with_codes(&codes, |codes| codes.iter().map(|c| decoded(*c)).collect());
        let values: Vec<f32> = values.unwrap();
        assert_eq!(values, [224.0, -448.0, 112.0, 0.0, 0.0, 0.0, 448.0, 0.5, 224.0]);
    }

    #[test]
    fn products_of_few_rows_and_of_many_are_those_of_what_codes_stand_for() {
        for (m, k, n) in [(1, 16, 5), (3, 7, 4), (20, 33, 9)] {
            let random = |shape: (usize, usize)| Tensor::randn(0f32, 1., shape, &Device::Cpu);
            let (x, w) = (random((m, k)).unwrap(), random((n, k)).unwrap());
            let ((x, of_x), (w, of_w)) = (quantized(&x).unwrap(), quantized(&w).unwrap());
            let found = product([&x, &of_x], [&w, &of_w], DType::F32).unwrap();
            let wide = |t: &Tensor, scales: &Tensor| {
                let scales = scales.reshape(((), 1)).unwrap();
                t.to_dtype(DType::F32).unwrap().broadcast_mul(&scales).unwrap()
            };
            let expected = wide(&x, &of_x).matmul(&wide(&w, &of_w).t().unwrap()).unwrap();
            let apart = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap();
            let apart = apart.max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(apart < 1e-4, "{m} {k} {n}: {apart}");
        }
    }
}
