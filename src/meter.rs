//! The executed side: ops tell a [`Meter`] what they ran, observers see it.

use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

use candle_core::Device;

use crate::{
    error::Result,
    ledger::{Dtype, Key, Ledger, Module, Op, Phase, Scope},
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
    observer: &'a RefCell<dyn Observer + 'a>,
    phase: Phase,
    layer: Option<u32>,
    timed: bool,
    taped: bool,
}

/// A [`Meter`] that knows its module: what ops are called with.
#[derive(Clone, Copy)]
pub struct At<'a> {
    meter: Meter<'a>,
    module: Module,
}

impl<'a> Meter<'a> {
    /// Reports to `observer`, outside all layers, without timing.
    pub fn new(observer: &'a RefCell<dyn Observer + 'a>, phase: Phase) -> Self {
        Self { observer, phase, layer: None, timed: false, taped: false }
    }

    /// Times each op, waiting for the device before and after: slower, so on request only.
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

    /// Names the module whose ops run next.
    pub fn at(self, module: Module) -> At<'a> {
        At { meter: self, module }
    }

    /// The same meter where `scope` says.
    pub(crate) fn scope(self, scope: Scope) -> At<'a> {
        At { meter: Self { layer: scope.layer, ..self }, module: scope.module }
    }
}

impl At<'_> {
    /// Where in the model the op runs.
    pub(crate) fn scope(self) -> Scope {
        Scope { layer: self.meter.layer, module: self.module }
    }

    /// Whether ops keep what their gradients need.
    pub(crate) fn is_taped(self) -> bool {
        self.meter.taped
    }

    /// Runs `kernel` and reports it as `op`.
    pub(crate) fn run<T>(
        self,
        op: Op,
        dtype: Dtype,
        device: &Device,
        kernel: impl FnOnce() -> candle_core::Result<T>,
    ) -> Result<T> {
        let (out, time) = if self.meter.timed {
            device.synchronize()?;
            let start = Instant::now();
            let out = kernel()?;
            device.synchronize()?;
            (out, Some(start.elapsed()))
        } else {
            (kernel()?, None)
        };
        self.report(op, dtype, time);
        Ok(out)
    }

    /// Reports `op` as part of a kernel that has run, or is about to, for several ops at once.
    pub(crate) fn ran(self, op: Op, dtype: Dtype) {
        self.report(op, dtype, self.meter.timed.then_some(Duration::ZERO));
    }

    fn report(self, op: Op, dtype: Dtype, time: Option<Duration>) {
        let Meter { observer, phase, .. } = self.meter;
        observer.borrow_mut().op(&Key { phase, scope: self.scope(), op, dtype }, time);
    }
}
