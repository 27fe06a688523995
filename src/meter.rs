//! The executed side: launches tell a [`Meter`] what they ran, observers see it.

use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

use crate::{
    error::Result,
    ledger::{Key, Ledger, Module, Phase, Scope},
    ops::{Kernel, Launched, Nodes, Ops, Workspace},
};

/// Sees every op, right after it ran.
pub trait Observer {
    /// One executed op; its duration where the meter was asked to time ops.
    fn op(&mut self, key: &Key, time: Option<Duration>);
}

impl Observer for Ledger {
    fn op(&mut self, key: &Key, time: Option<Duration>) {
        self.add(*key, 1, time.unwrap_or_default());
    }
}

/// Two observers of one run.
impl<A: Observer, B: Observer> Observer for (A, B) {
    fn op(&mut self, key: &Key, time: Option<Duration>) {
        self.0.op(key, time);
        self.1.op(key, time);
    }
}

/// An observer that may be there.
impl<O: Observer> Observer for Option<O> {
    fn op(&mut self, key: &Key, time: Option<Duration>) {
        if let Some(observer) = self {
            observer.op(key, time);
        }
    }
}

/// An observer that somebody else holds.
impl<O: Observer + ?Sized> Observer for &RefCell<O> {
    fn op(&mut self, key: &Key, time: Option<Duration>) {
        self.borrow_mut().op(key, time);
    }
}

/// An [`Observer`] in its cell, so that a meter can be copied, and lives as long as any part asks.
trait Listener {
    fn hear(&self, key: &Key, time: Option<Duration>);
}

impl<O: Observer> Listener for RefCell<O> {
    fn hear(&self, key: &Key, time: Option<Duration>) {
        self.borrow_mut().op(key, time);
    }
}

/// Discards everything: for work that belongs to no audit.
impl Observer for () {
    fn op(&mut self, _: &Key, _: Option<Duration>) {}
}

/// A handle that every op takes: who observes, and where in the model the op runs.
///
/// ```
/// use std::cell::RefCell;
/// use flopaudit::{ledger::{Ledger, Phase}, meter::Meter};
///
/// let ledger = RefCell::new(Ledger::default());
/// let meter = Meter::new(&ledger, Phase::Forward);
/// // … run ops with `meter` …
/// assert!(ledger.into_inner().is_empty());
/// ```
#[derive(Clone, Copy)]
pub struct Meter<'a> {
    listener: &'a dyn Listener,
    phase: Phase,
    layer: Option<u32>,
    timed: bool,
    taped: bool,
    workspace: Option<&'a Workspace>,
    recording: Option<&'a RefCell<Vec<Launched>>>,
}

/// A [`Meter`] that knows its module: what ops are called with.
#[derive(Clone, Copy)]
pub struct At<'a> {
    meter: Meter<'a>,
    module: Module,
}

impl<'a> Meter<'a> {
    /// Reports to `observer`, outside all layers, without timing.
    pub fn new(observer: &'a RefCell<impl Observer>, phase: Phase) -> Self {
        Self {
            listener: observer,
            phase,
            layer: None,
            timed: false,
            taped: false,
            workspace: None,
            recording: None,
        }
    }

    /// Times each launch, waiting for the device before and after: slower, so on request only.
    pub fn timed(self, timed: bool) -> Self {
        Self { timed, ..self }
    }

    /// Has ops keep what their gradients need, where an input needs one.
    pub fn taped(self, taped: bool) -> Self {
        Self { taped, ..self }
    }

    /// The same meter in another phase.
    pub fn phase(self, phase: Phase) -> Self {
        Self { phase, ..self }
    }

    /// The same meter inside decoder layer `layer`.
    pub fn layer(self, layer: usize) -> Self {
        Self { layer: Some(layer as u32), ..self }
    }

    /// Has ops of one token a sequence compute several at once, into buffers of `workspace`, which
    /// the next such ops use again.
    pub(crate) fn within(self, workspace: &'a Workspace) -> Self {
        Self { workspace: Some(workspace), ..self }
    }

    /// Keeps launches in `recording`, in place of reporting them: while a device records them it
    /// executes nothing.
    pub(crate) fn recording(self, recording: &'a RefCell<Vec<Launched>>) -> Self {
        Self { recording: Some(recording), ..self }
    }

    /// Names the module whose ops run next.
    pub fn at(self, module: Module) -> At<'a> {
        At { meter: self, module }
    }

    /// The same meter where `scope` says.
    pub(crate) fn scope(self, scope: Scope) -> At<'a> {
        At { meter: Self { layer: scope.layer, ..self }, module: scope.module }
    }

    /// Reports a recording's launches, which a device has just been given again, over `held`
    /// tokens.
    pub(crate) fn replayed(self, launches: &[Launched], held: u64) {
        for (phase, scope, op, dtype) in launches.iter().flat_map(|launched| &launched.ops) {
            let key = Key { phase: *phase, scope: *scope, op: op.over(held), dtype: *dtype };
            self.listener.hear(&key, None);
        }
    }
}

impl<'a> At<'a> {
    /// Where in the model the op runs.
    pub(crate) fn scope(self) -> Scope {
        Scope { layer: self.meter.layer, module: self.module }
    }

    /// The same where `scope` says.
    pub(crate) fn elsewhere(self, scope: Scope) -> Self {
        self.meter.scope(scope)
    }

    /// Whether ops keep what their gradients need.
    pub(crate) fn is_taped(self) -> bool {
        self.meter.taped
    }

    /// Where ops of one token a sequence put what they compute, several at once.
    pub(crate) fn workspace(self) -> Option<&'a Workspace> {
        self.meter.workspace
    }

    /// Executes `kernel` and reports what it computes; while a recording is made, keeps that.
    pub(crate) fn launch<K: Kernel>(self, kernel: &K) -> Result<K::Output> {
        let recorded = self.meter.recording.is_some();
        let nodes = if recorded { Nodes::kept() } else { Nodes::default() };
        let mut ops = Ops::new(self);
        kernel.report(&mut ops)?;
        let (out, time) = if self.meter.timed {
            kernel.device().synchronize()?;
            let start = Instant::now();
            let out = kernel.run(&nodes)?;
            kernel.device().synchronize()?;
            (out, Some(start.elapsed()))
        } else {
            (kernel.run(&nodes)?, None)
        };
        match self.meter.recording {
            Some(recording) => {
                let key = |(at, op, dtype): (At, _, _)| (at.meter.phase, at.scope(), op, dtype);
                let ops = ops.all.into_iter().map(key).collect();
                recording.borrow_mut().push(Launched { ops, nodes: nodes.into_vec() });
            }
            None => {
                // The time of a launch is its last op's: the others are part of it.
                let last = ops.all.len().saturating_sub(1);
                for (i, (at, op, dtype)) in ops.all.iter().enumerate() {
                    let (phase, scope) = (at.meter.phase, at.scope());
                    let time = time.map(|time| if i == last { time } else { Duration::ZERO });
                    let key = Key { phase, scope, op: op.now(), dtype: *dtype };
                    self.meter.listener.hear(&key, time);
                }
            }
        }
        Ok(out)
    }
}
