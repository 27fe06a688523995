//! Launches, recordings and products through the driver and cuBLAS.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    DType, Device, Result, Storage, Tensor,
    cuda_backend::{
        CudaStorageSlice as Slice, WrapErr,
        cudarc::{
            cublas::{result::gemm_strided_batched_ex, sys as blas},
            driver::{CudaFunction, CudaGraph, CudaModule, CudaStream, DevicePtr, sys},
            nvrtc::Ptx,
        },
    },
};

use super::{Arg, File};

impl File {
    /// Whether its kernels wait, by themselves, for what the one before them writes: they may
    /// start before that has ended. Before Hopper there is no such waiting.
    fn overlaps(self) -> bool {
        let waits = env!("FLOPAUDIT_CUDA_CAPABILITY").parse().is_ok_and(|built: u32| built >= 90);
        match self {
            Self::Attention | Self::Rows => false,
            Self::Choose | Self::Decode | Self::Products => waits,
        }
    }

    fn image(self) -> &'static [u8] {
        match self {
            Self::Attention => include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin")),
            Self::Choose => include_bytes!(concat!(env!("OUT_DIR"), "/choose.fatbin")),
            Self::Rows => include_bytes!(concat!(env!("OUT_DIR"), "/rows.fatbin")),
            Self::Decode => include_bytes!(concat!(env!("OUT_DIR"), "/decode.fatbin")),
            Self::Products => include_bytes!(concat!(env!("OUT_DIR"), "/products.fatbin")),
        }
    }
}

/// Launches recorded once, to be replayed as one.
pub(in crate::ops) struct Graph(CudaGraph);

impl Graph {
    /// Records what `run` launches on `device`; nothing of it is executed.
    pub(in crate::ops) fn record(
        device: &Device,
        run: impl FnOnce() -> crate::error::Result<()>,
    ) -> crate::error::Result<Self> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode)?;
        let ran = run();
        // Ended in any case: a stream left in capture is of no more use.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags);
        ran?;
        let graph = graph?.ok_or_else(|| anyhow::anyhow!("nothing was recorded"))?;
        Ok(Self(graph))
    }

    /// Executes it.
    pub(in crate::ops) fn replay(&self) -> crate::error::Result<()> {
        Ok(self.0.launch()?)
    }
}

/// out (m, n) = x (m, k) · weightᵀ, plus what `out` held where `add` says so; rows of `out` are
/// `stride` apart and begin `after` elements into it.
pub(in crate::ops) fn product(
    device: &Device,
    (out, after, stride): (&Tensor, usize, usize),
    x: &Tensor,
    weight: &Tensor,
    add: bool,
) -> Result<()> {
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    let ((m, k), n) = (x.dims2()?, weight.dim(0)?);
    let kind = match weight.dtype() {
        DType::BF16 => blas::cudaDataType::CUDA_R_16BF,
        _ => blas::cudaDataType::CUDA_R_32F,
    };
    let (one, beta) = (1f32, if add { 1f32 } else { 0f32 });
    let read = |t| Ok::<_, candle_core::Error>(pointer(t, 0, &stream)? as *const c_void);
    // cuBLAS counts by columns: the transpose of each, n × m.
    // SAFETY: the three matrices are dense, of these sizes, and live until the product is done.
    unsafe {
        gemm_strided_batched_ex(
            *cuda.cublas_handle().handle(),
            blas::cublasOperation_t::CUBLAS_OP_T,
            blas::cublasOperation_t::CUBLAS_OP_N,
            n as i32,
            m as i32,
            k as i32,
            (&raw const one).cast(),
            read(weight)?,
            kind,
            k as i32,
            (n * k) as i64,
            read(x)?,
            kind,
            k as i32,
            (m * k) as i64,
            (&raw const beta).cast(),
            pointer(out, after, &stream)? as *mut c_void,
            kind,
            stride as i32,
            (m * stride) as i64,
            1,
            blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
        .w()
    }
}

pub(super) fn launch(
    device: &Device,
    file: File,
    name: &str,
    grid: [u64; 3],
    block: u32,
    args: &[Arg],
) -> Result<()> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let function = function(&stream, file, name)?;
    // Each argument in eight bytes of its own, of which a kernel reads as many as it declares.
    let mut values: Vec<u64> = Vec::with_capacity(args.len());
    for arg in args {
        values.push(match *arg {
            Arg::Of(tensor) => pointer(tensor, 0, &stream)?,
            Arg::Strided(tensor) => start(tensor, 0, &stream)?,
            Arg::After(tensor, elements) => pointer(tensor, elements, &stream)?,
            Arg::Null => 0,
            Arg::U64(value) => value,
            Arg::U32(value) => value.into(),
            Arg::F32(value) => value.to_bits().into(),
        });
    }
    let mut pointers: Vec<*mut c_void> =
        values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect();
    let mut overlap = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: Default::default(),
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let [x, y, z] = grid.map(|n| n as u32);
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        hStream: stream.cu_stream(),
        attrs: &raw mut overlap,
        numAttrs: u32::from(file.overlaps()),
    };
    stream.context().bind_to_thread().w()?;
    // SAFETY: the kernel declares these arguments, in this order; tensors are dense and, used on
    // one stream alone, live until the kernel has run.
    unsafe {
        let params = pointers.as_mut_ptr();
        sys::cuLaunchKernelEx(&config, function.cu_function(), params, std::ptr::null_mut())
            .result()
            .w()
    }
}

/// What has been loaded, by context: looking a kernel up takes the driver longer than
/// launching it.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(usize, File), Arc<CudaModule>>,
    functions: HashMap<(usize, String), CudaFunction>,
}

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

fn function(stream: &CudaStream, file: File, name: &str) -> Result<CudaFunction> {
    let context = stream.context();
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_default();
    let key = |name: &str| (context.cu_ctx() as usize, name.to_string());
    if let Some(function) = loaded.functions.get(&key(name)) {
        return Ok(function.clone());
    }
    let module = match loaded.modules.entry((context.cu_ctx() as usize, file)) {
        Entry::Occupied(module) => module.into_mut(),
        Entry::Vacant(free) => {
            let image = Ptx::from_binary(file.image().to_vec());
            free.insert(context.load_module(image).w()?)
        }
    };
    let function = module.load_function(name).w()?;
    loaded.functions.insert(key(name), function.clone());
    Ok(function)
}

fn pointer(tensor: &Tensor, after: usize, stream: &CudaStream) -> Result<u64> {
    match tensor.is_contiguous() {
        true => start(tensor, after, stream),
        false => candle_core::bail!("{:?} is not dense", tensor.layout()),
    }
}

fn start(tensor: &Tensor, after: usize, stream: &CudaStream) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { candle_core::bail!("is not on a GPU") };
    let start = match &storage.slice {
        Slice::F32(slice) => slice.device_ptr(stream).0,
        Slice::F64(slice) => slice.device_ptr(stream).0,
        Slice::BF16(slice) => slice.device_ptr(stream).0,
        Slice::U8(slice) => slice.device_ptr(stream).0,
        Slice::U32(slice) => slice.device_ptr(stream).0,
        Slice::I64(slice) => slice.device_ptr(stream).0,
        _ => candle_core::bail!("no kernel of ours takes {:?}", tensor.dtype()),
    };
    let elements = layout.start_offset() + after;
    Ok(start + (elements * tensor.dtype().size_in_bytes()) as u64)
}
