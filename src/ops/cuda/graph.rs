//! Recordings: launches that are replayed as one, and listed by CUDA itself.

use std::{
    ffi::{CStr, c_char},
    ptr::null_mut,
    sync::Arc,
};

use anyhow::Context;
use candle_core::{
    Device,
    cuda_backend::cudarc::driver::{
        CudaStream, DriverError,
        result::{graph as driver, stream::end_capture},
        sys,
    },
};

use super::{Fault, Listed, witness::in_order};
use crate::error::Result;

/// Launches recorded once, to be replayed as one.
pub(in crate::ops) struct Graph {
    captured: Captured,
    executable: sys::CUgraphExec,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        let destroyed = unsafe { driver::exec_destroy(self.executable) };
        self.captured.stream.context().record_err(destroyed);
    }
}

impl Graph {
    /// Records what `run` launches on `device`; nothing of it is executed. A `fault` is planted
    /// before it becomes what can be replayed.
    ///
    /// # Errors
    /// `run`'s, or the device's.
    pub(in crate::ops) fn record<T>(
        device: &Device,
        fault: Option<Fault>,
        run: impl FnOnce() -> Result<T>,
    ) -> Result<(Self, T)> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode)?;
        let ran = run();
        // Ended in any case: a stream left in capture is of no more use.
        let captured = Captured::end(stream);
        let (ran, captured) = (ran?, captured?);
        if let Some(fault) = fault {
            captured.plant(fault)?;
        }
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // SAFETY: the graph was captured, and lives on beside what is made of it.
        let executable = unsafe { driver::instantiate(captured.graph, flags)? };
        Ok((Self { captured, executable }, ran))
    }

    /// CUDA's own list of what is in it, in the order of execution.
    ///
    /// # Errors
    /// The driver's.
    pub(in crate::ops) fn nodes(&self) -> Result<Vec<Listed>> {
        self.captured.nodes()?.into_iter().map(listed).collect()
    }

    /// Executes it.
    ///
    /// # Errors
    /// The device's.
    pub(in crate::ops) fn replay(&self) -> Result<()> {
        let stream = &self.captured.stream;
        stream.context().bind_to_thread()?;
        // SAFETY: both live.
        unsafe { driver::launch(self.executable, stream.cu_stream())? };
        Ok(())
    }
}

/// What a stream captured.
struct Captured {
    graph: sys::CUgraph,
    stream: Arc<CudaStream>,
}

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        self.stream.context().record_err(unsafe { driver::destroy(self.graph) });
    }
}

type Node = sys::CUgraphNode;

impl Captured {
    fn end(stream: Arc<CudaStream>) -> Result<Self> {
        // SAFETY: the stream is in capture.
        let graph = unsafe { end_capture(stream.cu_stream())? };
        anyhow::ensure!(!graph.is_null(), "nothing was recorded");
        Ok(Self { graph, stream })
    }

    /// All nodes, in the order of execution.
    fn nodes(&self) -> Result<Vec<Node>> {
        let mut count = 0;
        // SAFETY: without a place to write, the driver tells how many there are.
        unsafe { sys::cuGraphGetNodes(self.graph, null_mut(), &raw mut count).result()? };
        let mut nodes = vec![null_mut(); count];
        // SAFETY: there is room for so many.
        unsafe { sys::cuGraphGetNodes(self.graph, nodes.as_mut_ptr(), &raw mut count).result()? };
        let index = |node: Node| nodes.iter().position(|n| *n == node);
        let edges: Option<Vec<_>> =
            self.edges()?.into_iter().map(|(from, to)| Some((index(from)?, index(to)?))).collect();
        let order = edges.and_then(|edges| in_order(count, &edges));
        let order = order.context("the edges of a CUDA graph lead nowhere")?;
        Ok(order.into_iter().map(|i| nodes[i]).collect())
    }

    /// All edges, also such along which a kernel may start before the one ahead has ended.
    fn edges(&self) -> Result<Vec<(Node, Node)>> {
        let mut count = 0;
        let ask = |from: *mut Node, to: *mut Node, data, count: *mut usize| {
            // SAFETY: there is room for `count` of each, or none is asked for.
            unsafe { sys::cuGraphGetEdges_v2(self.graph, from, to, data, count).result() }
        };
        ask(null_mut(), null_mut(), null_mut(), &raw mut count)?;
        if count == 0 {
            return Ok(vec![]); // of a single node; with no room, the driver refuses
        }
        let (mut from, mut to) = (vec![null_mut(); count], vec![null_mut(); count]);
        let plain = sys::CUgraphEdgeData { from_port: 0, to_port: 0, type_: 0, reserved: [0; 5] };
        let mut data = vec![plain; count];
        ask(from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr(), &raw mut count)?;
        Ok(from.into_iter().zip(to).collect())
    }

    /// Plants `fault`, so that whoever looks for one has one to find.
    fn plant(&self, fault: Fault) -> Result<()> {
        let (Fault::Drop(n) | Fault::Double(n) | Fault::Halve(n)) = fault;
        let mut kernels = vec![];
        for node in self.nodes()? {
            if matches!(listed(node)?, Listed::Kernel { .. }) {
                kernels.push(node);
            }
        }
        let node =
            *kernels.get(n).with_context(|| format!("no kernel {n} of {}", kernels.len()))?;
        let edges = self.edges()?;
        let after = edges.iter().filter(|(from, _)| *from == node).map(|&(_, to)| to);
        let before: Vec<_> = match fault {
            Fault::Drop(_) => {
                // SAFETY: the node is of this graph; its edges go with it.
                unsafe { sys::cuGraphDestroyNode(node).result()? };
                edges.iter().filter(|(_, to)| *to == node).map(|&(from, _)| from).collect()
            }
            Fault::Double(_) => {
                let (params, mut copy) = (params(node)?, null_mut());
                // SAFETY: these are the parameters of a node of this graph. Its attributes are
                // copied too: a kernel of a library may be one for clusters of blocks.
                unsafe {
                    sys::cuGraphAddKernelNode_v2(&raw mut copy, self.graph, &node, 1, &params)
                        .result()?;
                    sys::cuGraphKernelNodeCopyAttributes(copy, node).result()?;
                }
                vec![copy]
            }
            Fault::Halve(_) => {
                let mut params = params(node)?;
                let grid = [&mut params.gridDimX, &mut params.gridDimY, &mut params.gridDimZ];
                let blocks = grid.into_iter().find(|blocks| **blocks > 1);
                *blocks.with_context(|| format!("kernel {n} has one block"))? /= 2;
                // SAFETY: but for the grid, these are the node's own parameters.
                unsafe { sys::cuGraphKernelNodeSetParams_v2(node, &raw const params).result()? };
                return Ok(());
            }
        };
        for to in after {
            for from in &before {
                // SAFETY: both are nodes of this graph, and had no edge between them.
                unsafe {
                    sys::cuGraphAddDependencies_v2(self.graph, from, &to, null_mut(), 1)
                        .result()?;
                }
            }
        }
        Ok(())
    }
}

/// A node as CUDA tells of it.
fn listed(node: Node) -> Result<Listed> {
    let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
    // SAFETY: the node is of a graph that lives.
    unsafe { sys::cuGraphNodeGetType(node, &raw mut kind).result()? };
    if kind != sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL {
        let name = format!("{kind:?}").replace("CU_GRAPH_NODE_TYPE_", "").to_lowercase();
        return Ok(Listed::Other(name));
    }
    let params = params(node)?;
    Ok(Listed::Kernel {
        function: name(&params)?,
        grid: [params.gridDimX, params.gridDimY, params.gridDimZ],
        block: [params.blockDimX, params.blockDimY, params.blockDimZ],
    })
}

fn params(node: Node) -> Result<sys::CUDA_KERNEL_NODE_PARAMS> {
    let mut params = std::mem::MaybeUninit::uninit();
    // SAFETY: the node is a kernel, and the driver writes all of its parameters.
    unsafe {
        sys::cuGraphKernelNodeGetParams_v2(node, params.as_mut_ptr()).result()?;
        Ok(params.assume_init())
    }
}

/// The name of a kernel, which comes from a module or from a library.
fn name(params: &sys::CUDA_KERNEL_NODE_PARAMS) -> Result<String, DriverError> {
    let mut name: *const c_char = std::ptr::null();
    // SAFETY: one of the two is a kernel's handle; its name lives as long as it.
    unsafe {
        match params.func.is_null() {
            false => sys::cuFuncGetName(&raw mut name, params.func),
            true => sys::cuKernelGetName(&raw mut name, params.kern),
        }
        .result()?;
        Ok(CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Tensor};

    use super::*;
    use crate::ops::{
        cuda::{Gate, Kernels, Norm, Out, Project, tests, witness},
        launch::Nodes,
    };

    /// Five launches, one of them of cuBLAS, that write to tensors of their own.
    struct Step {
        kernels: Kernels,
        x: Tensor,
        gain: Tensor,
        weight: Tensor,
        normed: Tensor,
        y: Tensor,
    }

    impl Step {
        fn new(device: &Device) -> Self {
            let of = |shape: &[usize], seed| tests::random(shape, DType::BF16, seed, device).0;
            Self {
                kernels: Kernels::on(device, DType::BF16).unwrap(),
                x: of(&[2, 64], 1),
                gain: of(&[64], 2),
                weight: of(&[64, 64], 3),
                normed: of(&[2, 64], 4),
                y: of(&[2, 64], 5),
            }
        }

        fn run(&self) -> Result<Vec<crate::ops::launch::Node>> {
            let (nodes, Self { kernels, x, gain, weight, normed, y }) = (Nodes::kept(), self);
            let norm = Norm { gain, eps: 1e-6, shift: false };
            kernels.rms_norm_into(&nodes, normed, x, norm)?;
            let [a, b] = [kernels.matrices(normed)?, kernels.matrices(weight)?.t()];
            kernels.product_into(&nodes, y, a, b, None)?;
            kernels.add_bias(&nodes, y, gain)?;
            let products = &[(weight, None)];
            let project = Project { out: Out::Added(y), x, norm: None, products, ahead: &[] };
            kernels.project(&nodes, project)?;
            kernels.gated_into(&nodes, Gate::Silu, y, y, x)?;
            Ok(nodes.into_vec())
        }
    }

    #[test]
    fn a_recording_holds_what_was_launched() {
        let device = tests::gpu();
        let step = Step::new(&device);
        step.run().unwrap();
        let launched = tests::values_of(&step.y);
        let (graph, nodes) = Graph::record(&device, None, || step.run()).unwrap();
        println!("{:#?}", graph.nodes().unwrap());
        assert_eq!(witness(&nodes, &graph.nodes().unwrap()), Ok(()));
        assert_eq!(nodes.len(), 5);
        for _ in 0..2 {
            graph.replay().unwrap();
            assert_eq!(tests::values_of(&step.y), launched);
        }
    }

    #[test]
    fn a_planted_fault_is_found() {
        let device = tests::gpu();
        let step = Step::new(&device);
        step.run().unwrap();
        for fault in (0..5).flat_map(|n| [Fault::Drop(n), Fault::Double(n)]) {
            let (graph, nodes) = Graph::record(&device, Some(fault), || step.run()).unwrap();
            let said = witness(&nodes, &graph.nodes().unwrap()).unwrap_err();
            println!("{fault:?}: {said}");
            graph.replay().unwrap();
        }
        assert!(Graph::record(&device, Some(Fault::Drop(5)), || step.run()).is_err());
        // A recording that fails leaves the stream as it was.
        assert!(Graph::record(&device, None, || -> Result<()> { anyhow::bail!("no") }).is_err());
        step.run().unwrap();
    }
}
