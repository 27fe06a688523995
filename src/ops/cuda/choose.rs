//! One token for each row of logits: nothing but tokens goes to the host.

use candle_core::{Result, Tensor};

use super::{
    Kernels,
    args::{self, Choices, Penalty},
    call::File,
    tiles::{CHOOSERS, DRAWERS, PEERS},
};
use crate::ops::launch::Nodes;

/// A choice for each row: it becomes the row's next input, and then one token more is held.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Choose<'a> {
    /// (1, rows) in u32, the tokens that come next.
    pub ids: &'a Tensor,
    /// One u32: tokens held.
    pub held: &'a Tensor,
    /// One u32, zero between launches.
    pub done: &'a Tensor,
    /// (steps, rows) in i64, as `ranked` in choose.cu.
    pub chosen: &'a Tensor,
    /// Tokens that were held when the first of these steps began.
    pub first: usize,
    /// (rows, width) in u8, 1 where a token was seen.
    pub seen: Option<&'a Tensor>,
    /// Factors on positive logits of seen tokens, and on others.
    pub penalties: (f32, f32),
    /// (rows, width)
    pub logits: &'a Tensor,
    /// By what rule.
    pub how: How<'a>,
}

/// The rule of a choice.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) enum How<'a> {
    /// The largest logit.
    Largest {
        /// (1, rows) in i64, zeros between launches.
        best: &'a Tensor,
    },
    /// By chance.
    Drawn {
        /// (rows, width) in f32, scratch.
        probabilities: &'a Tensor,
        /// (steps, rows) in f32: a number in [0, 1) for each draw.
        uniforms: &'a Tensor,
        /// 1 / temperature
        inverse_temperature: f32,
        /// Among so many likeliest tokens; 0 for all.
        top_k: usize,
        /// Among the fewest likeliest that hold so much; 0 for all.
        top_p: f32,
    },
}

/// Logits that a thread looks at in one go.
const AT_ONCE: usize = 8;

impl Kernels {
    /// A token for each row of logits.
    ///
    /// # Errors
    /// Shapes that do not fit one another; the device's.
    pub(in crate::ops) fn choose(&self, nodes: &Nodes, c: Choose) -> Result<()> {
        let Choose { ids, held, done, chosen, first, seen, penalties, logits, how } = c;
        let name = match how {
            How::Largest { .. } => "choose",
            How::Drawn { .. } => "draw",
        };
        let call = self.call(nodes, File::Choose, name);
        let [rows, width] = call.dims(logits)?;
        let [_, columns] = call.dims(chosen)?;
        let by_row = rows > 0 && width > 0 && [ids.elem_count(), columns] == [rows, rows];
        call.check(by_row, &[logits, ids, chosen])?;
        call.check([held, done].iter().all(|t| t.elem_count() == 1), &[held, done])?;
        call.check(seen.is_none_or(|seen| seen.dims() == [rows, width]), &[logits])?;
        let to = Choices {
            ids: call.writes(ids)?,
            held: call.writes(held)?,
            done: call.writes(done)?,
            chosen: call.writes(chosen)?,
            first: call.size(first)?,
            rows: call.size(rows)?,
            width: call.size(width)?,
        };
        let (less, more) = penalties;
        let penalty = Penalty { seen: call.writes_any(seen)?, less, more };
        match how {
            How::Largest { best } => {
                call.check(best.elem_count() == rows, &[logits, best])?;
                let best = call.writes(best)?;
                let args = args::Choose { to, penalty, logits: call.reads(logits)?, best };
                // Enough for every multiprocessor to have four.
                let needed = width.div_ceil(CHOOSERS as usize * AT_ONCE);
                let grid = [needed.min(528usize.div_ceil(rows)), rows, 1];
                // SAFETY: there are so many rows of so many logits, and of the rest one a row;
                // whoever counts the steps stops at the last.
                unsafe { call.start(&[], grid, CHOOSERS, &args) }
            }
            How::Drawn { probabilities, uniforms, inverse_temperature, top_k, top_p } => {
                let fits =
                    probabilities.dims() == [rows, width] && uniforms.dims() == chosen.dims();
                call.check(fits, &[logits, probabilities, uniforms, chosen])?;
                let args = args::Draw {
                    to,
                    penalty,
                    logits: call.reads(logits)?,
                    probabilities: call.writes(probabilities)?,
                    uniforms: call.reads(uniforms)?,
                    inverse_temperature,
                    top_k: call.size(top_k)?,
                    top_p,
                };
                // SAFETY: as above; the probabilities are as many as the logits.
                unsafe { call.start(&[], [PEERS as usize, rows, 1], DRAWERS, &args) }
            }
        }
    }
}
