//! Products in 8 bits through cuBLASLt: its handle, its workspace and the algorithms that it chose, once
//! for each context.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    sync::{Mutex, PoisonError},
};

use candle_core::{
    Device, Result,
    cuda_backend::{
        WrapErr,
        cudarc::{
            cublas::sys::cublasOperation_t,
            cublaslt::{result as lt, sys},
            driver::{CudaSlice, CudaStream, DevicePtr},
        },
    },
};

use super::{backend::by_library, eight_bit::Scaled};
use crate::ops::launch::Nodes;

// As in cublasLt.h, whose enumerations older CUDA has without them: there, setting one fails.
unsafe extern "C" {
    fn cublasLtMatmulDescSetAttribute(
        description: sys::cublasLtMatmulDesc_t,
        attribute: u32,
        value: *const c_void,
        bytes: usize,
    ) -> sys::cublasStatus_t;
}
const A_SCALE_MODE: u32 = 31;
const B_SCALE_MODE: u32 = 32;
/// A scale of f32 for each row of A, or column of B.
const BY_ROW: i32 = 3;

/// Bytes that a product may use beside its matrices: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// What products of one context share.
struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    /// By m, k, n and the stride of the output.
    algorithms: HashMap<[usize; 4], sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: a handle belongs to no thread, and is used by one at a time.
unsafe impl Send for Library {}

/// By context.
static LIBRARIES: Mutex<Option<HashMap<usize, Library>>> = Mutex::new(None);

impl Library {
    fn new(stream: &std::sync::Arc<CudaStream>) -> Result<Self> {
        // SAFETY: nobody reads it before the library has written it.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE).w()? };
        let handle = lt::create_handle().map_err(candle_core::Error::wrap)?;
        Ok(Self { handle, workspace, algorithms: HashMap::new() })
    }
}

/// out = x · weightᵀ, scaled: the one place where a product is given to cuBLASLt, and written to
/// `nodes`.
///
/// # Safety
/// All of it lies where it says, in these sizes and types, and lives until the product is done; no two
/// elements of `out` are in one place, nor in that of anything else.
pub(super) unsafe fn scaled_product(device: &Device, nodes: &Nodes, scaled: Scaled) -> Result<()> {
    let stream = device.as_cuda_device()?.cuda_stream();
    stream.context().bind_to_thread().w()?;
    let mut all = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    let context = stream.context().cu_ctx() as usize;
    let library = match all.get_or_insert_default().entry(context) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(free) => free.insert(Library::new(&stream)?),
    };
    by_library(&stream, nodes, || {
        // SAFETY: the caller's.
        unsafe { multiply(library, &stream, scaled) }.map_err(|error| {
            let [m, k, n] = scaled.sizes;
            let what = format!("cuBLASLt has no fp8 product of {m} x {k} and {k} x {n} here");
            candle_core::Error::wrap(error).context(what)
        })
    })
}

/// # Safety
/// As [`scaled_product`].
unsafe fn multiply(
    library: &mut Library,
    stream: &std::sync::Arc<CudaStream>,
    scaled: Scaled,
) -> std::result::Result<(), lt::CublasError> {
    let Scaled { out, stride, x, weight, sizes: [m, k, n] } = scaled;
    use sys::cudaDataType_t::{CUDA_R_8F_E4M3, CUDA_R_16BF};
    let how = Description::new(weight[1], x[1])?;
    // By columns, as cuBLAS counts, each matrix is its own transpose: outᵀ = weight · xᵀ, and of these
    // the weight lies transposed, which 8 bits ask for.
    let a = Matrix::new(CUDA_R_8F_E4M3, k, n, k)?;
    let b = Matrix::new(CUDA_R_8F_E4M3, k, m, k)?;
    let d = Matrix::new(CUDA_R_16BF, n, m, stride)?;
    let key = [m, k, n, stride];
    let algorithm = match library.algorithms.get(&key) {
        Some(known) => *known,
        None => {
            let preference = Preference::new()?;
            // SAFETY: all of them live.
            let found = unsafe {
                lt::get_matmul_algo_heuristic(
                    library.handle,
                    how.0,
                    a.0,
                    b.0,
                    d.0,
                    d.0,
                    preference.0,
                )?
            };
            *library.algorithms.entry(key).or_insert(found.algo)
        }
    };
    let (one, zero) = (1f32, 0f32);
    let (workspace, _in_use) = library.workspace.device_ptr(stream);
    // SAFETY: the caller's; one stream alone uses the workspace.
    unsafe {
        lt::matmul(
            library.handle,
            how.0,
            (&raw const one).cast(),
            (&raw const zero).cast(),
            weight[0] as *const c_void,
            a.0,
            x[0] as *const c_void,
            b.0,
            out as *const c_void,
            d.0,
            out as *mut c_void,
            d.0,
            &raw const algorithm,
            workspace as *mut c_void,
            WORKSPACE,
            stream.cu_stream().cast(),
        )
    }
}

/// A product summed in f32, a transposed, with a scale for each row of either side.
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(of_a: u64, of_b: u64) -> std::result::Result<Self, lt::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let it = Self(lt::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)?);
        let transposed = cublasOperation_t::CUBLAS_OP_T as i32;
        it.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA as u32, transposed)?;
        it.set(A_SCALE_MODE, BY_ROW)?;
        it.set(B_SCALE_MODE, BY_ROW)?;
        it.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER as u32, of_a)?;
        it.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER as u32, of_b)?;
        Ok(it)
    }

    fn set<T: Copy>(&self, attribute: u32, value: T) -> std::result::Result<(), lt::CublasError> {
        let (value, bytes) = (&raw const value, size_of::<T>());
        // SAFETY: it lives, and the value is copied during the call.
        unsafe { cublasLtMatmulDescSetAttribute(self.0, attribute, value.cast(), bytes).result() }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: nobody else has it. There is nothing to be done about a failure.
        unsafe { lt::destroy_matmul_desc(self.0).ok() };
    }
}

/// How a matrix lies: columns of so many rows.
struct Matrix(sys::cublasLtMatrixLayout_t);

impl Matrix {
    fn new(
        kind: sys::cudaDataType_t,
        rows: usize,
        columns: usize,
        leading: usize,
    ) -> std::result::Result<Self, lt::CublasError> {
        lt::create_matrix_layout(kind, rows as u64, columns as u64, leading as i64).map(Self)
    }
}

impl Drop for Matrix {
    fn drop(&mut self) {
        // SAFETY: nobody else has it. There is nothing to be done about a failure.
        unsafe { lt::destroy_matrix_layout(self.0).ok() };
    }
}

/// What an algorithm may use: the workspace, and matrices that begin at multiples of 16 bytes, as
/// columns of wider ones do.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> std::result::Result<Self, lt::CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let it = Self(lt::create_matmul_pref()?);
        it.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE)?;
        for begins in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            it.set(begins, 16u32)?;
        }
        Ok(it)
    }

    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: T,
    ) -> std::result::Result<(), lt::CublasError> {
        let value = &raw const value;
        // SAFETY: it lives, and the value is copied during the call.
        unsafe { lt::set_matmul_pref_attribute(self.0, attribute, value.cast(), size_of::<T>()) }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: nobody else has it. There is nothing to be done about a failure.
        unsafe { lt::destroy_matmul_pref(self.0).ok() };
    }
}
