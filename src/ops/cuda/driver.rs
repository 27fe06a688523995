//! Launches through the driver, and products through cuBLAS.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    ptr::null_mut,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    DType, Device, Result, Storage, Tensor,
    cuda_backend::{
        CudaStorageSlice as Slice, WrapErr,
        cudarc::{
            cublas::{result::gemm_strided_batched_ex, sys as blas},
            driver::{CudaFunction, CudaModule, CudaStream, DevicePtr, sys},
            nvrtc::Ptx,
        },
    },
};

use super::{
    call::{File, Space},
    library::{Gemm, Side},
};
use crate::ops::launch::{Node, Nodes};

/// Bytes of shared memory that a kernel gets without being allowed more.
const SHARED_UNASKED: u32 = 48 * 1024;

/// Whether kernels were built for Hopper or later: those may wait by themselves for what another one
/// writes, and for bytes on their way.
pub(super) fn are_for_hopper() -> bool {
    env!("FLOPAUDIT_CUDA_CAPABILITY").parse().is_ok_and(|built: u32| built >= 90)
}

/// Whether kernels were built with Hopper's products by warpgroups, which no other GPU has.
pub(super) fn have_warpgroups() -> bool {
    env!("FLOPAUDIT_CUDA_CAPABILITY") == "90"
}

/// Multiprocessors of `device`, and bytes of shared memory that a block may have.
pub(super) fn room(device: &Device) -> Result<[usize; 2]> {
    use sys::CUdevice_attribute as Attribute;
    let context = device.as_cuda_device()?.cuda_stream().context().clone();
    let of = |attribute| -> Result<usize> { Ok(context.attribute(attribute).w()?.try_into()?) };
    Ok([
        of(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        of(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    ])
}

/// The compute capability of `device`: 90 is 9.0.
pub(super) fn capability(device: &Device) -> Result<i32> {
    let context = device.as_cuda_device()?.cuda_stream().context().clone();
    let (major, minor) = context.compute_capability().w()?;
    Ok(10 * major + minor)
}

impl File {
    /// Whether its kernels wait, by themselves, for what the one before them writes: they may
    /// start before that has ended. Before Hopper there is no such waiting.
    fn overlaps(self) -> bool {
        match self {
            Self::Attention | Self::Elements | Self::Optimizer | Self::Rows | Self::Sums => false,
            Self::Choose | Self::Decode | Self::Products => are_for_hopper(),
            // It runs together or not at all, and such a kernel waits for the one before it.
            Self::Step => false,
        }
    }

    /// Whether the blocks of its kernels wait for one another, and so must all be there.
    fn runs_together(self) -> bool {
        self == Self::Step
    }

    fn image(self) -> &'static [u8] {
        match self {
            Self::Attention => include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin")),
            Self::Choose => include_bytes!(concat!(env!("OUT_DIR"), "/choose.fatbin")),
            Self::Decode => include_bytes!(concat!(env!("OUT_DIR"), "/decode.fatbin")),
            Self::Elements => include_bytes!(concat!(env!("OUT_DIR"), "/elements.fatbin")),
            Self::Optimizer => include_bytes!(concat!(env!("OUT_DIR"), "/optimizer.fatbin")),
            Self::Products => include_bytes!(concat!(env!("OUT_DIR"), "/products.fatbin")),
            Self::Rows => include_bytes!(concat!(env!("OUT_DIR"), "/rows.fatbin")),
            Self::Step => include_bytes!(concat!(env!("OUT_DIR"), "/step.fatbin")),
            Self::Sums => include_bytes!(concat!(env!("OUT_DIR"), "/sums.fatbin")),
        }
    }
}

/// Starts `function` of `file`: the one place where a kernel of ours is started, and written to
/// `nodes`.
///
/// # Safety
/// `args` is the struct that the function is declared with, and wherever it reads or writes by what
/// is in it there are elements, which live until it has run.
pub(super) unsafe fn launch<A: Copy>(
    device: &Device,
    nodes: &Nodes,
    file: File,
    function: String,
    space: Space,
    args: &A,
) -> Result<()> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let Space { grid, block, shared } = space;
    let loaded = loaded(&stream, file, &function)?;
    if shared > SHARED_UNASKED {
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        loaded.set_attribute(most, shared.try_into()?).w()?;
    }
    use sys::CUlaunchAttributeID as Id;
    let (id, value) = match file.runs_together() {
        true => {
            (Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, sys::CUlaunchAttributeValue { cooperative: 1 })
        }
        false => (
            Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        ),
    };
    let mut attribute = sys::CUlaunchAttribute { id, pad: Default::default(), value };
    let [x, y, z] = grid;
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: stream.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: u32::from(file.overlaps() || file.runs_together()),
    };
    stream.context().bind_to_thread().w()?;
    let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
    // SAFETY: the caller's. Tensors live until then, since one stream alone is used: what frees
    // them comes after.
    unsafe {
        let params = params.as_mut_ptr();
        sys::cuLaunchKernelEx(&config, loaded.cu_function(), params, null_mut()).result().w()?;
    }
    nodes.push(|| Node::Ours { function, grid, block: [block, 1, 1] });
    Ok(())
}

/// out = factor · a · b, plus what `out` held where `add` says so: the one place where a product is
/// given to cuBLAS, and written to `nodes`.
///
/// # Safety
/// The matrices are of these sizes and of `dtype`, and live until the product is done; no two
/// elements of `out` are in one place, nor in that of an element of the others.
pub(super) unsafe fn product(
    device: &Device,
    dtype: DType,
    nodes: &Nodes,
    gemm: Gemm,
) -> Result<()> {
    let handle = device.as_cuda_device()?.cublas_handle();
    let Gemm { out, a, b, sizes: [batch, m, k, n], factor, add } = gemm;
    let kind = match dtype {
        DType::BF16 => blas::cudaDataType::CUDA_R_16BF,
        _ => blas::cudaDataType::CUDA_R_32F,
    };
    let beta = if add { 1f32 } else { 0f32 };
    // By columns, as cuBLAS counts, each matrix is its own transpose: outᵀ = bᵀ · aᵀ.
    let op = |side: Side| match side.transposed {
        true => blas::cublasOperation_t::CUBLAS_OP_T,
        false => blas::cublasOperation_t::CUBLAS_OP_N,
    };
    // SAFETY: the caller's.
    let run = || unsafe {
        gemm_strided_batched_ex(
            *handle.handle(),
            op(b),
            op(a),
            n,
            m,
            k,
            (&raw const factor).cast(),
            b.at as *const c_void,
            kind,
            b.leading,
            b.stride,
            a.at as *const c_void,
            kind,
            a.leading,
            a.stride,
            (&raw const beta).cast(),
            out.at as *mut c_void,
            kind,
            out.leading,
            out.stride,
            batch,
            blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
        .w()
    };
    by_library(&device.as_cuda_device()?.cuda_stream(), nodes, run)
}

/// Has a library start what `run` asks it for, and writes to `nodes` how many nodes of a graph that was.
pub(super) fn by_library(
    stream: &CudaStream,
    nodes: &Nodes,
    run: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let captured = || match nodes.are_kept() {
        true => captured_nodes(stream),
        false => Ok(0),
    };
    let before = captured()?;
    run()?;
    let added = captured()?.saturating_sub(before);
    nodes.push(|| Node::Library { nodes: added });
    Ok(())
}

/// Nodes of the graph that `stream` is capturing; 0 where it captures none.
fn captured_nodes(stream: &CudaStream) -> Result<usize> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut graph, mut count) = (null_mut(), 0);
    // SAFETY: what is not asked for has no place; with no place for nodes, their number is told.
    unsafe {
        let (status, graph) = (&raw mut status, &raw mut graph);
        let stream = stream.cu_stream();
        sys::cuStreamGetCaptureInfo_v3(
            stream,
            status,
            null_mut(),
            graph,
            null_mut(),
            null_mut(),
            null_mut(),
        )
        .result()
        .w()?;
        if !(*graph).is_null() {
            sys::cuGraphGetNodes(*graph, null_mut(), &raw mut count).result().w()?;
        }
    }
    Ok(count)
}

/// What has been loaded of one context: looking a kernel up takes the driver longer than launching
/// it.
#[derive(Default)]
struct Loaded {
    modules: HashMap<File, Arc<CudaModule>>,
    functions: HashMap<String, CudaFunction>,
}

/// By context.
static LOADED: Mutex<Option<HashMap<usize, Loaded>>> = Mutex::new(None);

fn loaded(stream: &CudaStream, file: File, name: &str) -> Result<CudaFunction> {
    let context = stream.context();
    let mut all = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = all.get_or_insert_default().entry(context.cu_ctx() as usize).or_default();
    if let Some(function) = loaded.functions.get(name) {
        return Ok(function.clone());
    }
    let module = match loaded.modules.entry(file) {
        Entry::Occupied(module) => module.into_mut(),
        Entry::Vacant(free) => {
            let image = Ptx::from_binary(file.image().to_vec());
            free.insert(context.load_module(image).w()?)
        }
    };
    let function = module.load_function(name).w()?;
    loaded.functions.insert(name.to_string(), function.clone());
    Ok(function)
}

/// Where the elements of `tensor` begin.
pub(super) fn address(tensor: &Tensor) -> Result<u64> {
    let stream = tensor.device().as_cuda_device()?.cuda_stream();
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { candle_core::bail!("is not on a GPU") };
    let start = match &storage.slice {
        Slice::F32(slice) => slice.device_ptr(&stream).0,
        Slice::F64(slice) => slice.device_ptr(&stream).0,
        Slice::BF16(slice) => slice.device_ptr(&stream).0,
        Slice::F8E4M3(slice) => slice.device_ptr(&stream).0,
        Slice::U8(slice) => slice.device_ptr(&stream).0,
        Slice::U32(slice) => slice.device_ptr(&stream).0,
        Slice::I64(slice) => slice.device_ptr(&stream).0,
        _ => candle_core::bail!("no kernel of ours takes {:?}", tensor.dtype()),
    };
    Ok(start + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}
