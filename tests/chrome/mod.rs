//! Chrome's trace event format (the JSON object form, as ui.perfetto.dev reads it): its rules as
//! code, for the kinds of event that a trace of ops holds.

// Each test file uses its own part of these.
#![allow(dead_code)]

use std::collections::BTreeMap;

use serde_json::Value;

/// A complete event.
#[derive(Debug, Clone)]
pub struct Slice {
    pub name: String,
    pub cat: String,
    pub track: String,
    /// Nanoseconds.
    pub start: u64,
    pub end: u64,
    pub args: Value,
}

impl Slice {
    pub fn arg(&self, name: &str) -> u64 {
        self.args[name].as_u64().unwrap_or_else(|| panic!("{} lacks {name}", self.name))
    }

    fn holds(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

/// All slices of a trace that keeps the rules, in order of time; else the first rule broken.
pub fn slices(trace: &Value) -> Result<Vec<Slice>, String> {
    let events = trace["traceEvents"].as_array().ok_or("no traceEvents")?;
    if !matches!(trace["displayTimeUnit"].as_str(), Some("ms" | "ns")) {
        return Err("displayTimeUnit is neither ms nor ns".into());
    }
    if !trace["otherData"].is_object() {
        return Err("otherData is no object".into());
    }
    let mut tracks: BTreeMap<(u64, u64), String> = BTreeMap::new();
    let mut slices = vec![];
    for event in events {
        let bad = |why: &str| Err(format!("{why}: {event}"));
        let (Some(name), Some(phase)) = (event["name"].as_str(), event["ph"].as_str()) else {
            return bad("name and ph are strings");
        };
        let (Some(pid), Some(tid)) = (event["pid"].as_u64(), event["tid"].as_u64()) else {
            return bad("pid and tid are numbers");
        };
        if !event["args"].is_object() {
            return bad("args is an object");
        }
        match (phase, name) {
            ("M", "process_name" | "thread_name") => {
                let Some(name) = event["args"]["name"].as_str() else {
                    return bad("args.name is a string");
                };
                tracks.insert((pid, tid), name.into());
            }
            ("M", "thread_sort_index") => {
                if !event["args"]["sort_index"].is_number() {
                    return bad("args.sort_index is a number");
                }
            }
            ("X", _) => {
                let Some(cat) = event["cat"].as_str() else { return bad("cat is a string") };
                let (Some(ts), Some(dur)) = (nanoseconds(&event["ts"]), nanoseconds(&event["dur"]))
                else {
                    return bad("ts and dur are microseconds from 0");
                };
                slices.push(((pid, tid), name, cat, ts, ts + dur, event["args"].clone()));
            }
            _ => return bad("an event of another kind"),
        }
    }
    let mut all = vec![];
    for (at, name, cat, start, end, args) in slices {
        let track = tracks.get(&at).ok_or(format!("track {at:?} has no name"))?.clone();
        all.push(Slice { name: name.into(), cat: cat.into(), track, start, end, args });
    }
    all.sort_by_key(|s| (s.start, std::cmp::Reverse(s.end)));
    nested(&all)?;
    Ok(all)
}

/// A whole number of nanoseconds.
fn nanoseconds(microseconds: &Value) -> Option<u64> {
    let nanoseconds = 1e3 * microseconds.as_f64()?;
    let whole = nanoseconds.round();
    (nanoseconds >= 0.0 && (nanoseconds - whole).abs() < 1e-3).then_some(whole as u64)
}

/// Two slices of one track lie apart, or one in the other.
fn nested(slices: &[Slice]) -> Result<(), String> {
    let mut open: BTreeMap<&str, Vec<&Slice>> = BTreeMap::new();
    for slice in slices {
        let open = open.entry(&slice.track).or_default();
        while open.last().is_some_and(|before| before.end <= slice.start) {
            open.pop();
        }
        if let Some(before) = open.last().filter(|before| !before.holds(slice)) {
            return Err(format!("{} and {} overlap on {}", before.name, slice.name, slice.track));
        }
        open.push(slice);
    }
    Ok(())
}

/// The slices of one track.
pub fn on<'a>(slices: &'a [Slice], track: &str) -> Vec<&'a Slice> {
    slices.iter().filter(|s| s.track == track).collect()
}

/// Checks the trace of one run: its rules; each op inside one pass; passes, layers and metadata
/// with the sums of their ops. Returns the slices of ops.
pub fn checked(trace: &Value) -> Vec<Slice> {
    let slices = slices(trace).unwrap();
    let ops = on(&slices, "ops");
    for pair in ops.windows(2) {
        assert!(pair[0].end <= pair[1].start, "{pair:?}");
    }
    for op in &ops {
        assert!(op.end > op.start, "{op:?} was not timed");
        for name in ["scope", "op", "dtype"] {
            assert!(op.args[name].is_string(), "{op:?} lacks {name}");
        }
        assert!(op.args["dims"].as_object().is_some_and(|dims| !dims.is_empty()), "{op:?}");
        assert!(op.args["bytes"].is_object(), "{op:?}");
        let rate = op.arg("flops") as f64 * 1e9 / (op.end - op.start) as f64;
        let stated = op.args["flops_per_s"].as_f64().unwrap();
        assert!((rate - stated).abs() <= 1e-9 * rate, "{op:?}");
    }
    let of_layer = |op: &&&Slice| op.args["scope"].as_str().unwrap().starts_with("layers.");
    let in_layers: Vec<&Slice> = ops.iter().filter(of_layer).copied().collect();
    for (track, ops) in [("passes", &ops), ("layers", &in_layers)] {
        let mut held = 0;
        for parent in on(&slices, track) {
            let inside: Vec<_> = ops.iter().filter(|op| parent.holds(op)).collect();
            held += inside.len();
            assert_eq!(parent.arg("ops"), inside.len() as u64, "{parent:?}");
            for sum in ["flops", "matmul_flops"] {
                let ops: u64 = inside.iter().map(|op| op.arg(sum)).sum();
                assert_eq!(parent.arg(sum), ops, "{parent:?}");
            }
        }
        assert_eq!(held, ops.len(), "{track}");
    }
    let about = &trace["otherData"];
    assert_eq!(about["schema_version"], 1);
    assert!(about["model"].is_string() && about["prices"].is_object(), "{about}");
    assert_eq!(about["ops"], ops.len());
    let sum = |name| ops.iter().map(|op| op.arg(name)).sum::<u64>();
    assert_eq!(about["total_flops"], sum("flops"));
    assert_eq!(about["total_matmul_flops"], sum("matmul_flops"));
    ops.into_iter().cloned().collect()
}
