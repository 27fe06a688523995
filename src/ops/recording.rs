//! A step recorded once and replayed: the launches that went into it, and CUDA's own list of what
//! came of them.

use std::{cell::RefCell, str::FromStr};

use candle_core::Device;

use super::{
    Launched,
    cuda::{Graph, Listed, witness},
};
use crate::{audit::GraphView, error::Result, meter::Meter};

pub use super::cuda::Fault;

impl FromStr for Fault {
    type Err = String;

    /// `drop:N`, `double:N` or `halve:N`.
    fn from_str(text: &str) -> Result<Self, String> {
        let known = || format!("`{text}` is none of drop:N, double:N and halve:N");
        let (what, which) = text.split_once(':').ok_or_else(known)?;
        let which = which.parse().map_err(|_| known())?;
        match what {
            "drop" => Ok(Self::Drop(which)),
            "double" => Ok(Self::Double(which)),
            "halve" => Ok(Self::Halve(which)),
            _ => Err(known()),
        }
    }
}

/// Launches recorded as one.
pub struct Recording {
    graph: Graph,
    launches: Vec<Launched>,
    view: GraphView,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recording({:?})", self.view)
    }
}

impl Recording {
    /// Records what `step` launches on `device` with the meter that it is given; nothing of it is
    /// executed, or reported. `fault`, where there is one, is planted in the recorded graph.
    ///
    /// # Errors
    /// `step`'s, or the device's.
    pub(crate) fn record(
        device: &Device,
        meter: Meter,
        fault: Option<Fault>,
        step: impl FnOnce(Meter) -> Result<()>,
    ) -> Result<Self> {
        let launches = RefCell::new(vec![]);
        let (graph, ()) = Graph::record(device, fault, || step(meter.recording(&launches)))?;
        let launches = launches.into_inner();
        let view = view(&launches, &graph.nodes()?);
        Ok(Self { graph, launches, view })
    }

    /// Executes it, and reports to `meter` the very launches that went into it; `held` tokens are
    /// held after it.
    ///
    /// # Errors
    /// The device's.
    pub(crate) fn replay(&self, meter: Meter, held: u64) -> Result<()> {
        self.graph.replay()?;
        // Accounted for while the device is at it.
        meter.replayed(&self.launches, held);
        Ok(())
    }

    /// Both sides of it.
    pub fn view(&self) -> &GraphView {
        &self.view
    }
}

/// The launches beside what CUDA lists.
fn view(launches: &[Launched], listed: &[Listed]) -> GraphView {
    let started: Vec<_> = launches.iter().flat_map(|launch| launch.nodes.clone()).collect();
    // A launch that starts nothing is in no graph, and what it reports is not executed.
    let empty = launches.iter().find(|launch| launch.nodes.is_empty());
    let empty = empty.map(|launch| format!("{:?} started nothing on the device", launch.ops));
    GraphView {
        nodes: listed.len(),
        launches: launches.len(),
        difference: empty.or(witness(&started, listed).err()),
    }
}
