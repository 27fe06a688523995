//! Tensors to a safetensors file that appears whole or not at all, and back.

use std::{borrow::Cow, collections::HashMap, fs, hash::Hasher, path::Path};

use anyhow::Context;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors, View, serialize_to_file};

use crate::{
    error::{Error, Result},
    target::temporary_beside,
};

/// A named f32 tensor, its values row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// Its name in the file.
    pub name: String,
    /// Lengths of its dimensions.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<f32>,
}

/// Writes `tensors` and `metadata` to `file`: beside it first, then in its place.
///
/// # Errors
/// A folder that cannot be written, or a full disk; what was there before stays.
pub fn save(file: &Path, tensors: &[Named], metadata: HashMap<String, String>) -> Result<()> {
    let name = || file.display().to_string();
    let temporary = temporary_beside(file).with_context(name)?.into_temp_path();
    let permissions = fs::metadata(&temporary).with_context(name)?.permissions();
    let views = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor));
    let written = serialize_to_file(views, Some(metadata), &temporary);
    written.map_err(plain).with_context(name)?;
    // The library has put another file in its place.
    fs::set_permissions(&temporary, permissions).with_context(name)?;
    fs::File::open(&temporary).and_then(|written| written.sync_all()).with_context(name)?;
    // The library's own error names the system's twice.
    temporary.persist(file).map_err(|e| e.error).with_context(name)
}

/// The system's own error, which the library's would say twice.
fn plain(error: SafeTensorError) -> anyhow::Error {
    match error {
        SafeTensorError::IoError(error) => error.into(),
        other => other.into(),
    }
}

impl View for &Named {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn data_len(&self) -> usize {
        4 * self.values.len()
    }
}

/// Reads what [`save`] wrote.
///
/// # Errors
/// A file that is missing, cut short or of other tensors than f32.
pub fn read(file: &Path) -> Result<(Vec<Named>, HashMap<String, String>)> {
    let bad = |why: String| Error::File { file: file.into(), why };
    let opened = fs::File::open(file).map_err(|e| bad(e.to_string()))?;
    // SAFETY: the file is replaced by renaming, never changed in place.
    let bytes = unsafe { Mmap::map(&opened) }.map_err(|e| bad(e.to_string()))?;
    let broken = |e: SafeTensorError| bad(format!("cannot be read: {e}"));
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let tensors = SafeTensors::deserialize(&bytes).map_err(broken)?;
    let tensors = tensors.iter().map(|(name, view)| {
        if view.dtype() != Dtype::F32 {
            return Err(bad(format!("tensor `{name}` is {:?}, not f32", view.dtype())).into());
        }
        let (values, _) = view.data().as_chunks::<4>();
        let values = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok(Named { name: name.into(), shape: view.shape().to_vec(), values })
    });
    Ok((tensors.collect::<Result<_>>()?, metadata))
}

/// A hash of `bytes` (FNV-1a, 64 bits) that stays the same from build to build, so that files can
/// hold it.
pub fn fingerprint(bytes: &[u8]) -> u64 {
    let mut hasher = fnv::FnvHasher::default();
    hasher.write(bytes);
    hasher.finish()
}
