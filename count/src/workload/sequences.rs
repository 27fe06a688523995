//! Sequences of many lengths in place of one length for all: the tasks that they come to.

use super::{
    Filling, Groups, Key, Kind, Layout, Lengths, MOST_SEQUENCES, Ragged, Task, evaluations,
};
use crate::error::{Error, Result};

impl Kind {
    /// Dimensions that follow from the lengths of sequences, where these are listed.
    pub const fn listed(self) -> &'static [Key] {
        match self {
            Self::Forward => &[Key::Batch, Key::Seq],
            Self::Generate => &[Key::Batch, Key::PromptTokens],
            Self::Evaluate => &[Key::Passes],
            Self::Train | Self::Verify => &[],
        }
    }
}

/// What `task` comes to over sequences of these `lengths`, at least one, in this order: a forward
/// pass or a generation has all of them at once; an evaluation scores each once; a training feeds
/// them again and again. Without a `layout`, prompts of a generation are packed and all else is
/// padded.
///
/// # Errors
/// Verification, whose sequences are of one length; a layout that the task does not have; a sequence
/// longer than a row; more rows than are listed one by one.
pub fn tasks_of(lengths: &[u64], layout: Option<Layout>, task: Task) -> Result<Vec<Task>> {
    let padded = layout.unwrap_or_default();
    Ok(match task {
        Task::Forward { .. } => vec![forward(lengths, padded, task)?],
        Task::Generate { .. } => {
            vec![generation(lengths, layout.unwrap_or(Layout::Packed), task)?]
        }
        Task::Verify { .. } => {
            let why = "does not go with verification, whose sequences are of one length";
            return Err(Error::flag("--lengths", why).into());
        }
        Task::Evaluate { batch, seq, .. } => {
            let groups = grouped(lengths, padded, (batch, seq), false)?;
            evaluations(&groups, padded, lengths, batch, seq)
        }
        Task::Train { .. } => vec![training(lengths, padded, task)?],
    })
}

/// One pass over all of them.
fn forward(lengths: &[u64], layout: Layout, mut task: Task) -> Result<Task> {
    let Task::Forward { batch, seq, sequences, .. } = &mut task else { return Ok(task) };
    let all: Lengths = lengths.iter().copied().collect();
    match layout {
        Layout::Padded => {
            (*batch, *seq) = (lengths.len() as u64, longest(&all));
            *sequences = ragged(all, Ragged::Padded);
        }
        Layout::Packed => {
            (*batch, *seq) = (1, u64::try_from(all.tokens()).unwrap_or(u64::MAX));
            *sequences = Some(Ragged::Packed(all));
        }
        Layout::Bucketed => {
            let why =
                "bucketed sequences are in several passes; a forward pass is one, eval has more";
            return Err(Error::flag("--layout", why).into());
        }
    }
    Ok(task)
}

/// A generation from prompts of these lengths.
fn generation(lengths: &[u64], layout: Layout, mut task: Task) -> Result<Task> {
    let Task::Generate { batch, prompt_tokens, prompts, .. } = &mut task else { return Ok(task) };
    let all: Lengths = lengths.iter().copied().collect();
    (*batch, *prompt_tokens) = (lengths.len() as u64, longest(&all));
    *prompts = match layout {
        Layout::Padded => ragged(all, Ragged::Padded),
        Layout::Packed => ragged(all, Ragged::Packed),
        Layout::Bucketed => {
            let why = "prompts of a generation are packed, or padded";
            return Err(Error::flag("--layout", why).into());
        }
    };
    Ok(task)
}

/// Steps over these rows, again and again in their order.
fn training(lengths: &[u64], layout: Layout, mut task: Task) -> Result<Task> {
    let passes = task.scored_passes();
    let Task::Train { batch, seq, rows, .. } = &mut task else { return Ok(task) };
    let too_many = |flag: &str, rows: u128, most: u128| {
        let why = format!("{rows} rows of listed lengths are more than {most}");
        Err(Error::flag(flag, why).into())
    };
    let most = MOST_SEQUENCES as u128;
    if u128::from(*batch) > most {
        return too_many("--batch", (*batch).into(), most);
    }
    let groups = grouped(lengths, layout, (*batch, *seq), true)?;
    let (all, each) = (groups.groups.len() as u128, groups.per_pass as u128);
    // After so many passes, the same groups come together again.
    let period = all / divisor(all, each);
    let shapes = passes.min(period);
    if shapes * each > most {
        return too_many("--batch", shapes * each, most);
    }
    let fed = passes.checked_mul((*batch).into()).and_then(|fed| fed.checked_mul(all));
    if fed.is_none_or(|fed| fed > u64::MAX.into()) {
        return too_many("--steps", passes.saturating_mul((*batch).into()), u64::MAX.into());
    }
    let mut fed = Filling::new(layout);
    for pass in 0..shapes {
        let of_pass = (pass * each..(pass + 1) * each).map(|group| (group % all) as usize);
        let times = (passes - pass).div_ceil(period) as u64;
        fed.add(&groups.lengths(of_pass, lengths), times);
    }
    *rows = fed.rows(*seq);
    Ok(task)
}

fn divisor(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { divisor(b, a % b) }
}

fn longest(all: &Lengths) -> u64 {
    all.range().map_or(1, |(_, longest)| longest)
}

/// Sequences as `of` has them, unless all are of one length.
fn ragged(all: Lengths, of: fn(Lengths) -> Ragged) -> Option<Ragged> {
    let differ = all.range().is_some_and(|(shortest, longest)| shortest < longest);
    differ.then(|| of(all))
}

fn grouped(
    lengths: &[u64],
    layout: Layout,
    (batch, seq): (u64, u64),
    of_one_size: bool,
) -> Result<Groups> {
    let batch = usize::try_from(batch).unwrap_or(usize::MAX);
    Groups::new(lengths, layout, (batch, seq), of_one_size).map_err(|index| {
        let why = format!(
            "sequence {} has {} tokens, a row {seq}; raise --seq",
            index + 1,
            lengths[index]
        );
        Error::flag("--lengths", why).into()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::workload::Rows;

    fn train(batch: u64, steps: u64) -> Task {
        let mut task = Kind::Train.task();
        for (key, n) in [(Key::Batch, batch), (Key::Steps, steps), (Key::Seq, 40)] {
            key.set(&mut task, &crate::workload::Value::Number(n)).unwrap();
        }
        task
    }

    fn rows(task: &Task) -> &Rows {
        let Task::Train { rows, .. } = task else { panic!("{task:?}") };
        rows
    }

    proptest! {
        /// Groups that come together again are not listed again.
        #[test]
        fn any_number_of_steps_is_the_sum_of_each(
            lengths in prop::collection::vec(1u64..41, 1..9), batch in 1u64..6, steps in 1u64..40,
            which in 0usize..3,
        ) {
            let layout = [Layout::Padded, Layout::Bucketed, Layout::Packed][which];
            let all = tasks_of(&lengths, Some(layout), train(batch, steps)).unwrap();
            let groups = grouped(&lengths, layout, (batch, 40), true).unwrap();
            let (count, each) = (groups.groups.len(), groups.per_pass);
            let mut fed = Filling::new(layout);
            for pass in 0..steps as usize {
                let of_pass = (pass * each..(pass + 1) * each).map(|group| group % count);
                fed.add(&groups.lengths(of_pass, &lengths), 1);
            }
            prop_assert_eq!(rows(&all[0]), &fed.rows(40));
        }
    }

    #[test]
    fn what_would_be_listed_without_end_is_refused() {
        let refused = |layout, batch, steps| {
            let task = tasks_of(&[3, 5], Some(layout), train(batch, steps));
            task.unwrap_err().to_string()
        };
        for layout in [Layout::Padded, Layout::Bucketed, Layout::Packed] {
            assert!(refused(layout, u64::MAX, 1).starts_with("--batch: "));
            assert!(refused(layout, 2, u64::MAX).starts_with("--steps: "));
            let task = tasks_of(&[3, 5], Some(layout), train(2, 1_000_000_000));
            assert_eq!(task.unwrap()[0].tokens().real % 8_000_000_000, 0);
        }
    }
}
