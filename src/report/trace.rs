//! A run as a trace in Chrome's event format, which ui.perfetto.dev opens: a slice an op, above
//! them the layers and the passes that they belong to.

use std::{
    collections::BTreeMap,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context;
use serde::Serialize;
use serde_json::{Value, json};

use super::Report;
use crate::{
    error::{Error, Result},
    ledger::{Dtype, Key, Phase, Scope},
    meter::Observer,
    prices::Prices,
    target::Target,
    traffic::Traffic,
    workload::Workload,
};

/// Version of the arguments and metadata that a [`Trace`] writes; raised when one changes its
/// meaning.
pub const TRACE_SCHEMA_VERSION: u32 = 1;

/// Writes each op as it is told of it: memory does not grow with the run.
///
/// The meter has to time ops. A slice ends when the op is reported and begins its duration before;
/// slices of ops never overlap, and times are whole nanoseconds.
pub struct Trace {
    file: PathBuf,
    out: BufWriter<Target>,
    prices: Prices,
    matmul: Prices,
    /// When the first op began.
    epoch: Option<Instant>,
    /// Where the latest op ended, in nanoseconds.
    end: u64,
    pass: Option<Span<Pass>>,
    layer: Option<Span<u32>>,
    /// How many passes of each kind began.
    passes: BTreeMap<Pass, u64>,
    sum: Sum,
    /// The first failure; nothing is written after it.
    failed: Option<anyhow::Error>,
}

/// Rows of the viewer from top to bottom.
#[derive(Clone, Copy)]
enum Track {
    Passes = 1,
    Layers = 2,
    Ops = 3,
}

impl Track {
    const ALL: [(Self, &'static str); 3] =
        [(Self::Passes, "passes"), (Self::Layers, "layers"), (Self::Ops, "ops")];
}

/// Phases that belong to one walk through the model.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Pass {
    Of(Phase),
    /// Gradients of all kinds, with the layers run forward again for them.
    Backward,
    /// Clipping and optimizer, which take turns tensor by tensor.
    Update,
}

impl From<Phase> for Pass {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Recompute
            | Phase::Backward
            | Phase::BackwardX
            | Phase::BackwardA
            | Phase::BackwardB
            | Phase::BackwardW => Self::Backward,
            Phase::Clipping | Phase::Optimizer => Self::Update,
            Phase::Setup
            | Phase::Forward
            | Phase::Loss
            | Phase::Prefill
            | Phase::Decode
            | Phase::Sampling => Self::Of(phase),
        }
    }
}

impl Pass {
    const fn name(self) -> &'static str {
        match self {
            Self::Of(phase) => phase.name(),
            Self::Backward => "backward",
            Self::Update => "update",
        }
    }
}

/// Ops in a row that share something.
struct Span<T> {
    of: T,
    start: u64,
    sum: Sum,
}

/// What ops come to.
#[derive(Clone, Copy, Default, Serialize)]
struct Sum {
    ops: u64,
    flops: u128,
    matmul_flops: u128,
}

impl Sum {
    fn add(&mut self, flops: u128, matmul_flops: u128) {
        self.ops += 1;
        self.flops += flops;
        self.matmul_flops += matmul_flops;
    }
}

/// A complete slice.
#[derive(Serialize)]
struct Slice<'a, A> {
    name: &'a str,
    cat: &'a str,
    ph: char,
    pid: u32,
    tid: u32,
    ts: Microseconds,
    dur: Microseconds,
    args: A,
}

/// Nanoseconds, written as the format's microseconds.
struct Microseconds(u64);

impl Serialize for Microseconds {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        // Three decimals of what is below 2^53 nanoseconds (104 days) survive as f64.
        s.serialize_f64(self.0 as f64 / 1e3)
    }
}

/// What an op's slice says of it.
#[derive(Serialize)]
struct OpArgs<'a> {
    scope: String,
    op: &'a str,
    dims: Value,
    dtype: Dtype,
    /// Under the report's prices.
    flops: u128,
    /// Under [`Prices::matmul`].
    matmul_flops: u128,
    bytes: Traffic,
    /// `flops` over the slice's duration.
    #[serde(skip_serializing_if = "Option::is_none")]
    flops_per_s: Option<f64>,
}

/// What ran, and what the slices come to.
#[derive(Serialize)]
struct Metadata<'a> {
    schema_version: u32,
    program: &'a str,
    command: &'a str,
    model: &'a str,
    device: Option<&'a str>,
    workload: &'a [Workload],
    prices: &'a Prices,
    ops: u64,
    total_flops: u128,
    total_matmul_flops: u128,
}

impl Trace {
    /// Opens `file`, to be written while ops run; FLOPs are those of `prices`.
    ///
    /// # Errors
    /// A path that cannot be written, or `-`: standard output is for the report.
    pub fn open(file: &Path, prices: &Prices) -> Result<Self> {
        if file == Path::new("-") {
            return Err(Error::flag("--trace", "`-`: a trace goes to a file").into());
        }
        let out = BufWriter::with_capacity(1 << 16, Target::open(file)?);
        let mut trace = Self {
            file: file.into(),
            out,
            prices: prices.clone(),
            matmul: Prices::matmul(),
            epoch: None,
            end: 0,
            pass: None,
            layer: None,
            passes: BTreeMap::new(),
            sum: Sum::default(),
            failed: None,
        };
        trace.begin().with_context(|| file.display().to_string())?;
        Ok(trace)
    }

    /// Ends the trace, with what `report` says of the run, and gives the file its name.
    ///
    /// # Errors
    /// A count past 128 bits, or what could not be written, now or before.
    pub fn finish(mut self, report: &Report) -> Result<()> {
        let name = self.file.display().to_string();
        let written = match self.failed.take() {
            Some(error) => Err(error),
            None => self.close_pass().and_then(|()| self.end(report)),
        };
        written.and_then(|()| Target::finish(self.out)).context(name)
    }

    /// The object's head, and the names of the tracks.
    fn begin(&mut self) -> Result<()> {
        write!(self.out, "{{\"displayTimeUnit\":\"ns\",\"traceEvents\":[")?;
        for (index, (track, name)) in Track::ALL.into_iter().enumerate() {
            let tid = track as u32;
            let comma = if index > 0 { "," } else { "" };
            let named = metadata("thread_name", tid, json!({ "name": name }));
            let sorted = metadata("thread_sort_index", tid, json!({ "sort_index": tid }));
            write!(self.out, "{comma}\n{named},\n{sorted}")?;
        }
        Ok(())
    }

    fn end(&mut self, report: &Report) -> Result<()> {
        let Report { command, model, device, workload, prices, .. } = report;
        let process = json!({ "name": format!("flopaudit {command}: {model}") });
        write!(self.out, ",\n{}\n],\"otherData\":", metadata("process_name", 0, process))?;
        let Sum { ops, flops, matmul_flops } = self.sum;
        let metadata = Metadata {
            schema_version: TRACE_SCHEMA_VERSION,
            program: concat!("flopaudit ", env!("CARGO_PKG_VERSION")),
            command,
            model,
            device: device.as_deref(),
            workload,
            prices,
            ops,
            total_flops: flops,
            total_matmul_flops: matmul_flops,
        };
        serde_json::to_writer(&mut self.out, &metadata).map_err(std::io::Error::from)?;
        Ok(writeln!(self.out, "}}")?)
    }

    /// The op's time as nanoseconds since the first op began.
    fn place(&mut self, time: Duration) -> (u64, u64) {
        let now = Instant::now();
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let epoch = *self.epoch.get_or_insert(now.checked_sub(time).unwrap_or(now));
        let end = nanoseconds(now.saturating_duration_since(epoch)).max(self.end);
        (end.saturating_sub(nanoseconds(time)).max(self.end), end)
    }

    fn add(&mut self, key: &Key, (start, end): (u64, u64)) -> Result<()> {
        let pass = Pass::from(key.phase);
        if self.pass.as_ref().is_none_or(|open| open.of != pass) {
            self.close_pass()?;
            *self.passes.entry(pass).or_default() += 1;
            self.pass = Some(Span { of: pass, start, sum: Sum::default() });
        }
        if self.layer.as_ref().map(|open| open.of) != key.scope.layer {
            self.close_layer()?;
            self.layer = key.scope.layer.map(|of| Span { of, start, sum: Sum::default() });
        }
        let cost = key.op.cost();
        let (flops, matmul_flops) = (self.prices.flops(&cost)?, self.matmul.flops(&cost)?);
        self.sum.add(flops, matmul_flops);
        self.pass.iter_mut().for_each(|open| open.sum.add(flops, matmul_flops));
        self.layer.iter_mut().for_each(|open| open.sum.add(flops, matmul_flops));
        let args = OpArgs {
            scope: key.scope.to_string(),
            op: key.op.name(),
            dims: dims(key)?,
            dtype: key.dtype,
            flops,
            matmul_flops,
            bytes: key.traffic(),
            flops_per_s: (end > start).then(|| flops as f64 / ((end - start) as f64 / 1e9)),
        };
        // Alike in all layers, so that a viewer sums over them.
        let scope = Scope { layer: None, ..key.scope }.to_string();
        let module = if scope.is_empty() { "residual" } else { &scope };
        let name = format!("{module} {}", key.op.name());
        self.end = end;
        self.slice(Track::Ops, &name, key.phase.name(), (start, end), args)
    }

    /// Writes the pass that is open, and its last layer.
    fn close_pass(&mut self) -> Result<()> {
        self.close_layer()?;
        let Some(Span { of, start, sum }) = self.pass.take() else { return Ok(()) };
        let number = self.passes.get(&of).copied().unwrap_or_default();
        let name = format!("{} {number}", of.name());
        self.slice(Track::Passes, &name, of.name(), (start, self.end), sum)
    }

    fn close_layer(&mut self) -> Result<()> {
        let Some(Span { of, start, sum }) = self.layer.take() else { return Ok(()) };
        let pass = self.pass.as_ref().map_or("", |pass| pass.of.name());
        self.slice(Track::Layers, &format!("layer {of}"), pass, (start, self.end), sum)
    }

    fn slice(
        &mut self,
        track: Track,
        name: &str,
        cat: &str,
        (start, end): (u64, u64),
        args: impl Serialize,
    ) -> Result<()> {
        let (ts, dur) = (Microseconds(start), Microseconds(end - start));
        let slice = Slice { name, cat, ph: 'X', pid: PROCESS, tid: track as u32, ts, dur, args };
        self.out.write_all(b",\n")?;
        Ok(serde_json::to_writer(&mut self.out, &slice).map_err(std::io::Error::from)?)
    }
}

impl Observer for Trace {
    fn op(&mut self, key: &Key, time: Option<Duration>) {
        if self.failed.is_none() {
            let at = self.place(time.unwrap_or_default());
            self.failed = self.add(key, at).err();
        }
    }
}

/// There is one.
const PROCESS: u32 = 1;

/// An event that names or orders something, as JSON.
fn metadata(name: &str, tid: u32, args: Value) -> Value {
    json!({ "name": name, "ph": "M", "pid": PROCESS, "tid": tid, "args": args })
}

/// The op's dimensions by name: an enum's variant in JSON is an object of its one name.
fn dims(key: &Key) -> Result<Value> {
    let variant = serde_json::to_value(key.op)?;
    Ok(variant.as_object().and_then(|v| v.values().next().cloned()).unwrap_or_default())
}
