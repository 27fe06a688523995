//! `flopaudit reconcile`: the way from one counting's total to another's.

use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};

use super::{
    args::{
        Described, EvaluationArgs, ForwardArgs, GenerationArgs, Listing, OutputArgs, TrainingArgs,
    },
    workload::WorkloadArgs,
};
use crate::{
    analytic::Structure,
    config::Ignored,
    error::{Error, Result},
    prices::Prices,
    reconcile::{End, Reconciliation, Run, reconcile},
    report::{self, FinishedRun},
    workload::Workload,
};

/// Flags of `reconcile`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A structure's name, or the JSON of a finished run
    #[arg(long, global = true, value_name = "STRUCTURE|FILE", default_value = "notebook")]
    from: String,
    /// A structure's name, or the JSON of a finished run
    #[arg(long, global = true, value_name = "STRUCTURE|FILE", default_value = "exact")]
    to: String,
    /// Prices of both ends [default: the run's, else unit]
    #[arg(long, global = true, value_name = "PRICES")]
    prices: Option<String>,
    /// Prices of FROM alone
    #[arg(long, global = true, value_name = "PRICES")]
    from_prices: Option<String>,
    /// Prices of TO alone
    #[arg(long, global = true, value_name = "PRICES")]
    to_prices: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(subcommand)]
    workload: Option<Command>,
}

/// What to count; a finished run brings its own.
#[derive(Debug, Subcommand)]
enum Command {
    /// One forward pass.
    Forward(Box<WorkloadArgs<ForwardArgs>>),
    /// A generation.
    Generate(Box<WorkloadArgs<GenerationArgs>>),
    /// A training.
    Train(Box<WorkloadArgs<TrainingArgs>>),
    /// Forward passes over known text.
    #[command(name = "eval", visible_alias = "evaluate")]
    Evaluate(Box<WorkloadArgs<EvaluationArgs>>),
}

impl Command {
    fn workload(&self) -> Result<(Workload, Described)> {
        match self {
            Self::Forward(args) => args.of(args.task.task()),
            Self::Generate(args) => args.of(args.task.task()?),
            Self::Train(args) => args.of(args.task.task()),
            Self::Evaluate(args) => args.of(args.task.task()),
        }
    }
}

/// What `--from` or `--to` names.
enum Named {
    Structure(Structure),
    Run(PathBuf, Box<FinishedRun>),
}

impl Named {
    fn read(flag: &str, spec: &str) -> Result<Self> {
        if let Ok(structure) = Structure::from_str(spec, false) {
            return Ok(Self::Structure(structure));
        }
        if Path::new(spec).extension().is_some_and(|e| e == "json") {
            return Ok(Self::Run(spec.into(), Box::new(FinishedRun::read(Path::new(spec))?)));
        }
        let known = Structure::ALL.map(Structure::name).join(", ");
        let why = format!("`{spec}` is no structure ({known}) and no .json file of a run");
        Err(Error::flag(flag, why).into())
    }

    fn run(&self) -> Option<&FinishedRun> {
        match self {
            Self::Structure(_) => None,
            Self::Run(_, run) => Some(run),
        }
    }

    /// The end that it names.
    fn end(&self, prices: Prices) -> End {
        let structure = match self {
            Self::Structure(structure) => *structure,
            Self::Run(_, run) => run.structure,
        };
        End { structure, prices }
    }

    /// The run's own total under `prices` beside the one that its structure counts.
    fn check(&self, prices: &Prices, counted: u128) -> Result<Option<Run>> {
        let Self::Run(file, run) = self else { return Ok(None) };
        let bad = |why| Error::File { file: file.clone(), why };
        let total_flops = match run.prices == *prices {
            true => run.total_flops,
            false => run.flops(prices).map_err(bad)?,
        };
        let file = file.display().to_string();
        Ok(Some(Run { file, total_flops, agrees: total_flops == counted }))
    }
}

/// Reconciles and prints; a run that is not what its structure counts is an error after that.
pub fn run(args: Args) -> Result<()> {
    let output = args.output.open()?;
    let (from, to) = (Named::read("--from", &args.from)?, Named::read("--to", &args.to)?);
    let (workloads, model, ignored) = args.workloads(&from, &to)?;
    let [from_end, to_end] = args.ends(&from, &to)?;
    let mut way = reconcile(&model, &workloads, &from_end, &to_end)?;
    way.from.run = from.check(&from_end.prices, way.from.total_flops)?;
    way.to.run = to.check(&to_end.prices, way.to.total_flops)?;
    let listing = Listing { document: &way, ignored };
    output.write_with(&listing, || report::print_way(&way, args.output.style()))?;
    verdict(&way)
}

impl Args {
    /// What is counted, where its config came from, and what of that is not used.
    fn workloads(
        &self,
        from: &Named,
        to: &Named,
    ) -> Result<(Vec<Workload>, String, Option<Vec<Ignored>>)> {
        let fail = |why: &str| Err(Error::flag("--from, --to", why).into());
        match (&self.workload, from.run(), to.run()) {
            (Some(command), None, None) => {
                let (workload, Described { origin, ignored, .. }) = command.workload()?;
                Ok((vec![workload], origin, ignored))
            }
            (None, Some(run), None) | (None, None, Some(run)) => {
                Ok((run.workload.clone(), run.model.clone(), None))
            }
            (_, Some(_), Some(_)) => fail("one run at a time; the other end is a structure"),
            (Some(_), _, _) => fail("a run brings its workload; name no other"),
            (None, None, None) => {
                fail("of which workload? add forward, generate, train or eval, or name a run")
            }
        }
    }

    fn ends(&self, from: &Named, to: &Named) -> Result<[End; 2]> {
        let of_run = from.run().or(to.run()).map(|run| run.prices.clone());
        let shared = match (&self.prices, of_run) {
            (Some(prices), _) => Prices::named(prices)?,
            (None, Some(prices)) => prices,
            (None, None) => Prices::unit(),
        };
        let end = |named: &Named, own: &Option<String>| -> Result<End> {
            let own = own.as_deref().map(Prices::named).transpose()?;
            Ok(named.end(own.unwrap_or_else(|| shared.clone())))
        };
        Ok([end(from, &self.from_prices)?, end(to, &self.to_prices)?])
    }
}

fn verdict(way: &Reconciliation) -> Result<()> {
    for end in [&way.from, &way.to] {
        if let Some(Run { file, total_flops, agrees: false }) = &end.run {
            let (structure, counted) = (end.structure, end.total_flops);
            let why = format!("{file} states {total_flops} FLOPs, {structure} counts {counted}");
            return Err(Error::Unbalanced(why).into());
        }
    }
    Ok(())
}
