//! `flopaudit reconcile`: the way from one counting's total to another's.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use clap::{Subcommand, ValueEnum};

use super::{
    args::{Described, Listing, OutputArgs},
    task::{EvaluationArgs, ForwardArgs, GenerationArgs, TrainingArgs, VerificationArgs},
    workload::WorkloadArgs,
};
use crate::{
    analytic::Structure,
    config::Ignored,
    error::{Error, Result},
    foreign::{self, Agreement, Foreign, Tool},
    input,
    prices::Prices,
    reconcile::{End, Reconciliation, Run, Side, reconcile},
    report::{self, FinishedRun},
    workload::Workload,
};

/// Flags of `reconcile`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A structure's name, the JSON of a finished run, or what another tool wrote (`-`: stdin)
    #[arg(long, global = true, value_name = "STRUCTURE|FILE", default_value = "notebook")]
    from: String,
    /// A structure's name, the JSON of a finished run, or what another tool wrote (`-`: stdin)
    #[arg(long, global = true, value_name = "STRUCTURE|FILE", default_value = "exact")]
    to: String,
    /// Prices of both ends, or of the one beside a tool's file [default: the file's, else unit]
    #[arg(long, global = true, value_name = "PRICES")]
    prices: Option<String>,
    /// Prices of FROM alone
    #[arg(long, global = true, value_name = "PRICES")]
    from_prices: Option<String>,
    /// Prices of TO alone
    #[arg(long, global = true, value_name = "PRICES")]
    to_prices: Option<String>,
    /// GPUs together, for a file that counts FLOPs per GPU
    #[arg(long, global = true, value_name = "N")]
    gpus: Option<u64>,
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
    /// Rounds of verification in speculative decoding.
    Verify(Box<WorkloadArgs<VerificationArgs>>),
    /// A training.
    Train(Box<WorkloadArgs<TrainingArgs>>),
    /// Forward passes over known text.
    #[command(name = "eval", visible_alias = "evaluate")]
    Evaluate(Box<WorkloadArgs<EvaluationArgs>>),
}

impl Command {
    fn workloads(&self) -> Result<(Vec<Workload>, Described)> {
        match self {
            Self::Forward(args) => args.of(args.task.task()),
            Self::Generate(args) => args.of(args.task.task()),
            Self::Verify(args) => args.of(args.task.task()),
            Self::Train(args) => args.of(args.task.task()),
            Self::Evaluate(args) => args.of(args.task.task()),
        }
    }
}

/// What `--from` or `--to` names.
enum Named {
    Structure(Structure),
    Run(PathBuf, Box<FinishedRun>),
    Foreign(PathBuf, Box<Foreign>),
}

impl Named {
    fn read(flag: &str, spec: &str) -> Result<Self> {
        if let Ok(structure) = Structure::from_str(spec, false) {
            return Ok(Self::Structure(structure));
        }
        let path = Path::new(if spec == "-" { "stdin" } else { spec });
        if spec != "-" && !path.exists() && path.extension().is_none() {
            let known = Structure::ALL.map(Structure::name).join(", ");
            let why = format!("`{spec}` is no structure ({known}) and no file");
            return Err(Error::flag(flag, why).into());
        }
        let bad = |why: String| Error::File { file: path.into(), why };
        let text = text(spec).map_err(|e| bad(e.to_string()))?;
        if of_this_program(&text) {
            return Ok(Self::Run(path.into(), Box::new(FinishedRun::parse(path, &text)?)));
        }
        Ok(Self::Foreign(path.into(), Box::new(foreign::read(&text).map_err(bad)?)))
    }

    /// What it counts by. A tool's file is asked of `workload`.
    fn source(&self, workload: &Workload, gpus: Option<u64>) -> Result<Source> {
        let (structure, prices, tool) = match self {
            Self::Structure(structure) => (*structure, None, None),
            Self::Run(_, run) => (run.structure, Some(run.prices.clone()), None),
            Self::Foreign(file, foreign) => {
                let bad = |why| Error::File { file: file.clone(), why };
                let told = foreign.told(workload, gpus).map_err(bad)?;
                let name = file.display().to_string();
                let (structure, tool) = told.settle(&name, foreign.format(), workload)?;
                (structure, Some(told.prices), Some(tool))
            }
        };
        Ok(Source { structure, prices, tool })
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

/// What an end counts by, the prices that its file has, and a tool's file.
struct Source {
    structure: Structure,
    prices: Option<Prices>,
    tool: Option<Tool>,
}

fn text(spec: &str) -> std::io::Result<String> {
    if spec != "-" {
        return input::read_text(Path::new(spec));
    }
    let mut bytes = vec![];
    std::io::stdin().read_to_end(&mut bytes)?;
    input::text(bytes)
}

/// Whether it is JSON with this program's own mark.
fn of_this_program(text: &str) -> bool {
    let json = serde_json::from_str::<serde_json::Value>(text);
    json.is_ok_and(|json| json.get("schema_version").is_some())
}

/// Reconciles and prints; a file that is not what its structure counts is an error after that.
pub fn run(args: Args) -> Result<()> {
    let output = args.output.open()?;
    if args.from == "-" && args.to == "-" {
        return Err(Error::flag("--from, --to", "stdin is read once").into());
    }
    let (from, to) = (Named::read("--from", &args.from)?, Named::read("--to", &args.to)?);
    if args.gpus.is_some() && ![&from, &to].iter().any(|end| matches!(end, Named::Foreign(..))) {
        return Err(Error::flag("--gpus", "is for a tool's file, and none is named").into());
    }
    let (workloads, model, ignored) = args.workloads(&from, &to)?;
    let source = |end: &Named| end.source(&workloads[0], args.gpus);
    let sources = [source(&from)?, source(&to)?];
    let [from_end, to_end] = args.ends(&sources)?;
    let mut way = reconcile(&model, &workloads, &from_end, &to_end)?;
    way.from.run = from.check(&from_end.prices, way.from.total_flops)?;
    way.to.run = to.check(&to_end.prices, way.to.total_flops)?;
    for (side, source) in [Side::From, Side::To].into_iter().zip(sources) {
        if let Some(tool) = source.tool {
            way = way.with_tool(side, tool)?;
        }
    }
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
        use Named::{Foreign, Run, Structure};
        let fail = |why: &str| Err(Error::flag("--from, --to", why).into());
        match (from, to, &self.workload) {
            (Run(..) | Foreign(..), Run(..) | Foreign(..), _) => {
                fail("one file at a time; the other end is a structure")
            }
            (Run(..), _, Some(_)) | (_, Run(..), Some(_)) => {
                fail("a run brings its workload; name no other")
            }
            (Run(_, run), _, None) | (_, Run(_, run), None) => {
                Ok((run.workload.clone(), run.model.clone(), None))
            }
            (Structure(_) | Foreign(..), Structure(_) | Foreign(..), Some(command)) => {
                let (workloads, Described { origin, ignored, .. }) = command.workloads()?;
                Ok((workloads, origin, ignored))
            }
            (Structure(_) | Foreign(..), Structure(_) | Foreign(..), None) => fail(
                "of which workload? add forward, generate, verify, train or eval, or name a run",
            ),
        }
    }

    /// Both ends under the prices that are asked for. A tool's figure has the tool's.
    fn ends(&self, sources: &[Source; 2]) -> Result<[End; 2]> {
        let of_file = sources.iter().find_map(|source| source.prices.clone());
        let shared = match (&self.prices, of_file) {
            (Some(prices), _) => Prices::named(prices)?,
            (None, Some(prices)) => prices,
            (None, None) => Prices::unit(),
        };
        let end = |source: &Source, flag: &str, own: &Option<String>| -> Result<End> {
            let prices = match (source, own) {
                (Source { tool: Some(tool), .. }, Some(_)) => {
                    let why = format!("{} has its tool's; name the other end's", tool.file);
                    return Err(Error::flag(flag, why).into());
                }
                (Source { tool: Some(_), prices: Some(prices), .. }, None) => prices.clone(),
                (_, Some(own)) => Prices::named(own)?,
                (_, None) => shared.clone(),
            };
            Ok(End { structure: source.structure, prices })
        };
        let [from, to] = sources;
        Ok([
            end(from, "--from-prices", &self.from_prices)?,
            end(to, "--to-prices", &self.to_prices)?,
        ])
    }
}

fn verdict(way: &Reconciliation) -> Result<()> {
    for end in [&way.from, &way.to] {
        let unlike = |file: &str, stated: u128, counted: u128| {
            let structure = end.structure;
            let why = format!("{file} states {stated} FLOPs, {structure} counts {counted}");
            Err(Error::Unbalanced(why).into())
        };
        if let Some(Run { file, total_flops, agrees: false }) = &end.run {
            return unlike(file, *total_flops, end.total_flops);
        }
        if let Some(tool) = end.tool.as_ref().filter(|t| t.agreement == Agreement::Differs) {
            return unlike(&tool.file, end.total_flops, tool.counted_flops);
        }
    }
    Ok(())
}
