//! The table of PyTorch's `FlopCounterMode`.
//!
//! Source: `FlopCounterMode.get_table` and `convert_num_with_suffix` in torch/utils/flop_counter.py,
//! 2.15.0: three decimals of thousands, millions (`M`), billions (`B`) or trillions (`T`), one unit
//! for all rows. The counted whole is the row `Global`, or the largest module where there is none.

use super::{Stated, Told};
use crate::{analytic::Structure, prices::Prices, workload::Workload};

/// What opens the table, in the order of its columns.
const HEADER: [&str; 4] = ["Module", "FLOP", "%", "Total"];

/// The whole, and how attention was computed, by the operations' names.
#[derive(Debug)]
pub(super) struct Table {
    stated: Stated,
    structures: &'static [Structure],
}

fn is_header(line: &str) -> bool {
    line.split_whitespace().eq(HEADER)
}

pub(super) fn is_one(text: &str) -> bool {
    text.lines().any(is_header)
}

impl Table {
    pub(super) fn read(text: &str) -> Result<Self, String> {
        if text.lines().filter(|line| is_header(line)).count() > 1 {
            return Err("holds several tables; keep one".into());
        }
        let numbered = text.lines().enumerate().skip_while(|(_, line)| !is_header(line)).skip(1);
        let rows = numbered
            .skip_while(|(_, line)| !line.is_empty() && line.bytes().all(|b| b" -".contains(&b)))
            .take_while(|(_, line)| !line.trim().is_empty());
        let (mut whole, mut fused, mut products) = (None::<Stated>, false, false);
        for (index, line) in rows {
            let bad = || format!("line {}: `{}` is no row of FLOPs", index + 1, line.trim());
            let mut columns = line.split_whitespace().rev();
            columns.next().filter(|share| share.ends_with('%')).ok_or_else(bad)?;
            let stated = columns.next().and_then(number).ok_or_else(bad)?;
            let name = columns.next().ok_or_else(bad)?;
            match columns.next() {
                Some("-") => {
                    fused |= name.contains("_attention");
                    products |= name == "aten.bmm" || name == "aten.baddbmm";
                }
                _ => {
                    whole = Some(whole.filter(|most| most.flops >= stated.flops).unwrap_or(stated))
                }
            }
        }
        let structures: &[Structure] = match (fused, products) {
            (true, _) => &[Structure::TorchSdpa],
            (false, true) => &[Structure::Torch],
            (false, false) => &[Structure::TorchSdpaCpu],
        };
        let stated = whole.ok_or("holds a table without a row")?;
        Ok(Self { stated, structures })
    }

    pub(super) fn told(&self, _: &Workload) -> Result<Told, String> {
        Ok(Told {
            structures: self.structures,
            prices: Prices::matmul(),
            stated: Some(self.stated),
            seconds: None,
            facts: vec![],
            notes: vec![],
        })
    }
}

/// `3591.168K`, `512.000`, `0`.
fn number(text: &str) -> Option<Stated> {
    let scales = [("K", 1), ("M", 2), ("B", 3), ("T", 4)];
    let found =
        scales.iter().find_map(|(suffix, power)| Some((text.strip_suffix(suffix)?, *power)));
    let (digits, power) = found.unwrap_or((text, 0));
    Stated::printed(digits, 1000u128.pow(power), 3)
}
