//! From a tensor as the file holds it to one that the model can use: finite, converted, placed.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Elements that one thread scans or converts at a time.
const CHUNK: usize = 1 << 16;

/// Checks a CPU tensor's elements, converts it to `dtype` and moves it to `device`.
///
/// # Errors
/// An element that is NaN or infinite, before or after the conversion.
pub(super) fn place(
    tensor: Tensor,
    origin: &str,
    name: &str,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    check_finite(&tensor, origin, name, "")?;
    let converted = if tensor.dtype() == dtype {
        tensor
    } else {
        let converted = convert(&tensor, dtype)?;
        // Finite values may leave the range of a narrower type.
        if matches!(dtype, DType::F16 | DType::BF16) {
            check_finite(&converted, origin, name, &format!(" as {}", dtype.as_str()))?;
        }
        converted
    };
    Ok(converted.to_device(device)?)
}

/// `to_dtype` on all threads.
fn convert(tensor: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
    let flat = tensor.flatten_all()?;
    let n = flat.elem_count();
    let convert = |start| flat.narrow(0, start, CHUNK.min(n - start))?.to_dtype(dtype);
    let starts: Vec<usize> = (0..n).step_by(CHUNK).collect();
    match starts.into_par_iter().map(convert).collect::<candle_core::Result<Vec<_>>>()?.as_slice() {
        [] => tensor.to_dtype(dtype),
        parts => Tensor::cat(parts, 0)?.reshape(tensor.shape()),
    }
}

fn check_finite(tensor: &Tensor, origin: &str, name: &str, how: &str) -> Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        anyhow::bail!("tensor `{name}` is not on the CPU");
    };
    let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    let bad = match storage {
        CpuStorage::F32(v) => not_finite(&v[range], |x| x.is_finite()),
        CpuStorage::F64(v) => not_finite(&v[range], |x| x.is_finite()),
        CpuStorage::F16(v) => not_finite(&v[range], |x| x.is_finite()),
        CpuStorage::BF16(v) => not_finite(&v[range], |x| x.is_finite()),
        _ => {
            let dtype = tensor.dtype().as_str();
            let why = format!("holds {dtype}; weights are f32, f16, bf16 or f64");
            return Err(Error::tensor(origin, name, why).into());
        }
    };
    let Some((count, first)) = bad else { return Ok(()) };
    let why = format!("holds {count} NaN or infinite values{how}, the first at flat index {first}");
    Err(Error::tensor(origin, name, why).into())
}

/// How many values are not finite and the flat index of the first, or `None` if all are.
fn not_finite<T: Sync>(values: &[T], finite: impl Fn(&T) -> bool + Sync) -> Option<(usize, usize)> {
    values
        .par_chunks(CHUNK)
        .enumerate()
        .filter_map(|(index, chunk)| {
            // A plain count has no early exit, so it vectorises.
            let bad: u32 = chunk.iter().map(|x| u32::from(!finite(x))).sum();
            let first = if bad == 0 { None } else { chunk.iter().position(|x| !finite(x)) };
            first.map(|first| (bad as usize, index * CHUNK + first))
        })
        .reduce_with(|a, b| (a.0 + b.0, a.1.min(b.1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(values: Vec<f32>, from: DType, to: DType) -> String {
        let tensor = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(from).unwrap();
        place(tensor, "file", "w", to, &Device::Cpu).unwrap_err().to_string()
    }

    #[test]
    fn values_that_are_not_finite_are_counted_and_located() {
        let mut values = vec![1f32; 3 * CHUNK];
        values[CHUNK + 7] = f32::NAN;
        values[2 * CHUNK] = f32::NEG_INFINITY;
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            assert_eq!(
                error(values.clone(), dtype, DType::F32),
                "file: tensor `w` holds 2 NaN or infinite values, the first at flat index 65543"
            );
        }
    }

    #[test]
    fn overflow_of_a_narrower_type_is_found() {
        let error = error(vec![1.0, 1e6], DType::F32, DType::F16);
        assert!(error.contains("1 NaN or infinite values as f16"), "{error}");
    }
}
