//! Sequences of many lengths, in place of one length for all.

use std::path::PathBuf;

use clap::Args;

use super::{
    args::{DataArgs, Described, LayoutArgs, ModelArgs, TemplateArg},
    task::Given,
};
use crate::{
    error::{Error, Result},
    train::{
        data::{Order, Passes},
        evaluation_tasks,
    },
    workload::{Kind, Layout, MOST_SEQUENCES, Rows, Task, read_lengths, tasks_of},
};

/// Where lengths come from, and how sequences lie in a pass.
#[derive(Debug, Args)]
#[command(next_help_heading = "Lengths")]
pub struct LengthsArgs {
    /// Lengths of sequences in place of one for all: one a line, or a length and how many have it
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    lengths: Option<PathBuf>,
    /// Text that `train` or `eval` would read: its rows, as they would feed them
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    #[command(flatten)]
    layout: LayoutArgs,
    /// Of conversations in --data, score the assistant's turns alone; of prompts, the completions
    #[arg(long, requires = "data", conflicts_with = "lengths")]
    mask_prompt: bool,
    /// Seed of the order in which a training visits the rows of --data [default: 0]
    #[arg(long, requires = "data", conflicts_with = "lengths")]
    seed: Option<u64>,
    #[command(flatten)]
    template: TemplateArg,
    #[command(flatten)]
    given: Given,
}

impl LengthsArgs {
    /// Whether rows have lengths of their own.
    pub fn are_given(&self) -> bool {
        self.lengths.is_some() || self.data.is_some()
    }

    /// `task` with these lengths, as the tasks that it comes to, and the model of the data.
    pub fn tasks(&self, task: Task, model: &ModelArgs) -> Result<(Vec<Task>, Option<Described>)> {
        self.check(task.kind())?;
        if let Some(file) = &self.data {
            let (tasks, described) = self.of_data(task, model, file)?;
            return Ok((tasks, Some(described)));
        }
        Ok(match self.listed()? {
            Some(lengths) => (tasks_of(&lengths, self.layout.chosen(), task)?, None),
            None => (vec![task], None),
        })
    }

    /// The lengths that each point of a sweep has, and their layout. Text would have to be cut into
    /// rows anew for each.
    pub fn swept(&self, kind: Kind) -> Result<(Option<Vec<u64>>, Option<Layout>)> {
        self.check(kind)?;
        if self.data.is_some() {
            let why = "is read for one workload; a sweep goes over --lengths";
            return Err(Error::flag("--data", why).into());
        }
        Ok((self.listed()?, self.layout.chosen()))
    }

    fn listed(&self) -> Result<Option<Vec<u64>>> {
        self.lengths.as_deref().map(read_lengths).transpose()
    }

    /// Refuses flags that would change nothing.
    fn check(&self, kind: Kind) -> Result<()> {
        let of = match (&self.lengths, &self.data) {
            (Some(_), _) => "--lengths",
            (None, Some(_)) => "--data",
            (None, None) => {
                let alone = [
                    (self.layout.chosen().is_some(), "--layout", "needs --lengths or --data"),
                    (self.template.template.is_some(), "--template", "needs --data"),
                ];
                return match alone.into_iter().find(|(given, ..)| *given) {
                    Some((_, flag, why)) => Err(Error::flag(flag, why).into()),
                    None => Ok(()),
                };
            }
        };
        if self.lengths.is_some() && self.template.template.is_some() {
            return Err(Error::flag("--template", "needs --data").into());
        }
        match kind.listed().iter().find(|key| self.given.0.contains(key)) {
            Some(key) => {
                Err(Error::flag(format!("--{key}"), format!("follows from {of}; give one")).into())
            }
            None => Ok(()),
        }
    }

    /// The passes that `train` or `eval` would run over a file.
    fn of_data(
        &self,
        task: Task,
        model: &ModelArgs,
        file: &std::path::Path,
    ) -> Result<(Vec<Task>, Described)> {
        let shape = match task {
            Task::Train { batch, seq, .. } => (batch, seq),
            Task::Evaluate { batch, seq, .. } => (batch, seq),
            Task::Forward { .. } | Task::Generate { .. } | Task::Verify { .. } => {
                return Err(Error::flag("--data", "is what train and eval read; name one").into());
            }
        };
        let mut checkpoint = model.open()?;
        self.template.choose(&mut checkpoint)?;
        let [batch, seq] = [shape.0, shape.1].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        let layout = self.layout.chosen().unwrap_or_default();
        let args = DataArgs {
            seq,
            batch,
            layout: self.layout,
            mask_prompt: self.mask_prompt,
            token_cache: None,
        };
        let data = args.load(file, &checkpoint)?;
        let trains = matches!(task, Task::Train { .. });
        let passes = Passes::new(&data, layout, batch, trains)?;
        let tasks = match task {
            Task::Train { accumulate, steps, .. } => {
                let rows = u128::from(accumulate) * u128::from(steps) * u128::from(shape.0);
                if rows > MOST_SEQUENCES as u128 && !passes.are_whole() {
                    let why = format!(
                        "{rows} rows of --data are more than the {MOST_SEQUENCES} that are listed \
                         one by one; count fewer and multiply"
                    );
                    return Err(Error::flag("--steps", why).into());
                }
                let mut order = Order::new(passes.len(), self.seed.unwrap_or(0));
                let filled = passes.rows(&mut order, accumulate as usize, steps);
                vec![with_rows(task, filled)]
            }
            Task::Evaluate { .. }
            | Task::Forward { .. }
            | Task::Generate { .. }
            | Task::Verify { .. } => evaluation_tasks(&passes, batch),
        };
        let ignored = checkpoint.listed().map(<[_]>::to_vec);
        let (config, origin) = (checkpoint.config, checkpoint.origin);
        Ok((tasks, Described { config, origin, ignored }))
    }
}

fn with_rows(mut task: Task, filled: Rows) -> Task {
    if let Task::Train { rows, .. } = &mut task {
        *rows = filled;
    }
    task
}
