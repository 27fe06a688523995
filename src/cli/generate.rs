//! `flopaudit generate`: text, then the audited account of what it took.

use std::{
    cell::RefCell,
    io::{IsTerminal, Read, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use super::{
    args::{
        CountingArgs, ExecutionArgs, LoraArgs, ModelArgs, Output, OutputArgs, SamplingArgs,
        TemplateArg, note, warn_of_noise,
    },
    interrupt::Interrupt,
    memory,
    trace::{self, TraceArgs},
};
use crate::{
    analytic::Structure,
    audit::Audit,
    error::{Error, Result},
    generate::{Generation, Request, generate},
    input::{self, read_text},
    ledger::{Ledger, Phase},
    model::Decoder,
    prices::Prices,
    report::{GenerationReport, Report, SequenceReport, SuggestedReport, Timings, Trace},
    tally::Tally,
    text::Text,
    traffic::Traffic,
    weights::Checkpoint,
    workload::{Sampling, Task},
};

/// What is said where a chat was meant and the checkpoint has no template for it.
const NO_TEMPLATE: &str = "the checkpoint has no chat template: the prompt runs raw, as with --raw";

/// Flags of `generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The prompt; `-` reads it from stdin
    #[arg(required_unless_present = "prompts")]
    prompt: Option<String>,
    /// Copies of the prompt, run as one batch
    #[arg(long, value_name = "B", default_value_t = 1, conflicts_with = "prompts")]
    batch: usize,
    /// A file of prompts, one a line, of any lengths; they run as one batch
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// Feed the prompt as it is, without the chat template
    #[arg(long, conflicts_with = "template")]
    raw: bool,
    /// System message of the chat template
    #[arg(long, conflicts_with = "raw")]
    system: Option<String>,
    /// Most new tokens of a sequence
    #[arg(long, visible_alias = "new-tokens", value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Do not stop at the model's ending tokens
    #[arg(long)]
    ignore_eos: bool,
    /// Feed prompts in parts of at most N tokens
    #[arg(long, value_name = "N", conflicts_with = "no_kv_cache")]
    prefill_chunk: Option<usize>,
    /// Run over the whole context again for each token, as the notebook counts
    #[arg(long)]
    no_kv_cache: bool,
    /// Do not compare the countings
    #[arg(long)]
    no_audit: bool,
    /// Print the text alone
    #[arg(long, short)]
    quiet: bool,
    /// Choose tokens as the checkpoint suggests: the values of its generation_config.json
    #[arg(long = "sampling", value_name = "FROM", help_heading = "Sampling",
        conflicts_with_all = ["temperature", "top_k", "top_p", "repeat_penalty"])]
    sampling_from: Option<SamplingFrom>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    template: TemplateArg,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    execution: ExecutionArgs,
    #[command(flatten)]
    counting: CountingArgs,
    #[command(flatten)]
    trace: TraceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Where the values come from that choose tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SamplingFrom {
    /// The checkpoint
    Checkpoint,
}

/// Generates, reports, audits.
pub fn run(args: Args) -> Result<()> {
    args.execution.set_threads();
    let output = args.output.open()?;
    let ledger_file = args.execution.open_ledger()?;
    let prices = args.counting.prices()?;
    let trace = args.trace.open(&prices)?;
    args.sampling.sampling()?;
    let device = args.execution.open_device()?;
    let prompts = args.read_prompts()?;
    let interrupt = Interrupt::listen()?;

    let start = Instant::now();
    let mut checkpoint = args.model.open()?;
    args.template.choose(&mut checkpoint)?;
    let adapters = args.execution.adapters(&checkpoint.config, &args.lora)?;
    let sampling = args.sampling(&checkpoint)?;
    let encoded = args.encode(&checkpoint.text, &prompts)?;
    let request = args.request(&checkpoint, &encoded, sampling);
    request.check(&checkpoint.config)?;
    let workload = args.execution.workload(&checkpoint.config, adapters.lora(), request.task());
    workload.validate()?;
    memory::check(&workload, &device)?;
    warn_of_noise(&checkpoint);
    let raw = args.runs_raw(&checkpoint.text).then(|| NO_TEMPLATE.to_string());
    raw.iter().for_each(|told| note(told));
    let model = args.execution.load(&checkpoint, &adapters, &device, &interrupt, false)?;
    let load = start.elapsed();

    let observers = (Ledger::default(), trace);
    let (run, trace) =
        args.generate(&model, &checkpoint.text, request, observers, &output, &interrupt)?;
    args.execution.fault_was_planted(!run.generation.recordings.is_empty())?;
    let report = args.report(&checkpoint, &encoded, &run, &prices, load)?;
    let report = report.and_ignored(adapters.ignored()).with_notes(raw);
    let audit = match args.no_audit {
        true => None,
        false => {
            let Generation { workload, recordings, .. } = &run.generation;
            let audit = Audit::new(std::slice::from_ref(workload), &run.ledger)?;
            Some(audit.with_graphs(recordings.clone()))
        }
    };
    let report = audit.iter().try_fold(report, |report, audit| report.with_audit(audit))?;
    let traced = trace::finish(trace, &report);
    output.write(&report, args.quiet)?;
    traced?;
    ledger_file.write("generate", &args.execution.device, &run.ledger)?;
    audit.map_or(Ok(()), |audit| audit.verdict())
}

/// What ran, and what came of it.
struct Run {
    ledger: Ledger,
    generation: Generation,
}

impl Args {
    fn read_prompts(&self) -> Result<Vec<String>> {
        let prompts = match (&self.prompts, self.prompt.as_deref()) {
            (Some(file), _) => {
                let text = read_text(file)
                    .map_err(|e| Error::File { file: file.clone(), why: e.to_string() })?;
                text.lines().filter(|l| !l.trim().is_empty()).map(String::from).collect()
            }
            (None, Some("-")) => {
                let mut bytes = vec![];
                let read = std::io::stdin().read_to_end(&mut bytes);
                let text = read.and_then(|_| input::text(bytes));
                vec![without_newline(&text.map_err(|e| Error::Prompt(format!("stdin: {e}")))?)]
            }
            (None, prompt) => vec![prompt.unwrap_or_default().to_string()],
        };
        let prompts = vec![prompts; self.batch].concat();
        match (&self.prompts, prompts.iter().all(|p| p.is_empty())) {
            (_, false) => Ok(prompts),
            (Some(file), true) => {
                let why = format!("{}: is empty, without a prompt", file.display());
                Err(Error::flag("--prompts", why).into())
            }
            (None, true) => Err(Error::Prompt("is empty".into()).into()),
        }
    }

    fn sampling(&self, checkpoint: &Checkpoint) -> Result<Sampling> {
        match (self.sampling_from, checkpoint.text.suggested()) {
            (None, _) => self.sampling.sampling(),
            (Some(SamplingFrom::Checkpoint), Some(suggested)) => suggested.sampling(),
            (Some(SamplingFrom::Checkpoint), None) => {
                let why = format!("{} suggests none", checkpoint.name);
                Err(Error::flag("--sampling checkpoint", why).into())
            }
        }
    }

    /// Whether prompts that were meant for a chat are fed as they are.
    fn runs_raw(&self, text: &Text) -> bool {
        !self.raw && !text.has_chat_template() && !text.is_stand_in()
    }

    fn encode(&self, text: &Text, prompts: &[String]) -> Result<Vec<Vec<u32>>> {
        let templated = !self.raw && text.has_chat_template();
        if self.system.is_some() && !templated {
            return Err(Error::flag("--system", "this model has no chat template").into());
        }
        let encode = |prompt: &String| match templated {
            true => text.encode(&text.chat(self.system.as_deref(), prompt)?),
            false => text.encode_raw(prompt),
        };
        prompts.iter().map(encode).collect()
    }

    /// All prompts as one batch.
    fn request(
        &self,
        checkpoint: &Checkpoint,
        prompts: &[Vec<u32>],
        sampling: Sampling,
    ) -> Request {
        let seed = |index: usize| self.execution.seed.wrapping_add(index as u64);
        Request {
            prompts: prompts.to_vec(),
            max_new_tokens: self.max_new_tokens,
            sampling,
            seeds: (0..prompts.len()).map(seed).collect(),
            kv_cache: !self.no_kv_cache,
            eos: if self.ignore_eos { vec![] } else { checkpoint.text.eos_ids().to_vec() },
            timed: self.trace.timed(&self.execution),
            how: self.execution.how(),
            past: 0,
            prefill_chunk: self.prefill_chunk,
            then: vec![],
        }
    }

    /// Runs the batch, all ops told to `observers`.
    fn generate(
        &self,
        model: &Decoder,
        text: &Text,
        request: Request,
        observers: (Ledger, Option<Trace>),
        output: &Output,
        interrupt: &Interrupt,
    ) -> Result<(Run, Option<Trace>)> {
        let streamed = output.is_human() && request.prompts.len() == 1;
        let observers = RefCell::new(observers);
        let mut stream = text.stream(true);
        let generation = generate(model, &request, &observers, |_, id| {
            interrupt.check()?;
            match streamed {
                true => show(&stream.push(id)?.unwrap_or_default()),
                false => Ok(()),
            }
        })?;
        if streamed {
            show(&format!("{}\n", stream.finish()?.unwrap_or_default()))?;
        } else if output.is_human() {
            for (i, sequence) in generation.sequences.iter().enumerate() {
                show(&format!("[{}] {}\n", i + 1, text.decode(&sequence.tokens, true)?))?;
            }
        }
        if output.is_human() && !self.quiet && std::io::stdout().is_terminal() {
            show("\n")?;
        }
        let (ledger, trace) = observers.into_inner();
        Ok((Run { ledger, generation }, trace))
    }

    fn report(
        &self,
        checkpoint: &Checkpoint,
        prompts: &[Vec<u32>],
        run: &Run,
        prices: &Prices,
        load: Duration,
    ) -> Result<Report> {
        let tally = run.ledger.tally()?;
        let origin = &checkpoint.origin;
        let (workloads, exact) = (vec![run.generation.workload.clone()], Structure::Exact);
        let mut report = Report::new("generate", origin, workloads, exact, prices, &tally)?
            .with_ignored(checkpoint.listed())
            .ran_on(&self.execution.device);
        if self.trace.timed(&self.execution) {
            report = report.with_times(&run.ledger);
        }
        let sequences = run.generation.sequences.iter().zip(prompts).map(|(sequence, prompt)| {
            Ok(SequenceReport {
                prompt_tokens: prompt.len(),
                text: checkpoint.text.decode(&sequence.tokens, true)?,
                token_ids: sequence.tokens.clone(),
                stopped: sequence.stopped,
            })
        });
        let sequences = sequences.collect::<Result<Vec<_>>>()?;
        let first = sequences.first().ok_or_else(|| Error::Prompt("is empty".into()))?;
        report.generation = Some(GenerationReport {
            text: first.text.clone(),
            token_ids: first.token_ids.clone(),
            timings: timings(run, prompts, prices, &tally, load)?,
            bytes_per_decoded_token: bytes_per_decoded_token(run),
            sequences,
            suggested: checkpoint.text.suggested().map(|suggested| SuggestedReport {
                file: suggested.file.display().to_string(),
                values: suggested.values.clone(),
                shown: suggested.shown(),
                taken: self.sampling_from.is_some(),
            }),
        });
        Ok(report)
    }
}

/// A line that was piped in ends with a newline that is no part of the prompt; others are.
fn without_newline(text: &str) -> String {
    text.strip_suffix("\r\n").or(text.strip_suffix('\n')).unwrap_or(text).into()
}

/// Tokens decoded after the first of each sequence.
fn decoded(generation: &Generation) -> u64 {
    match generation.workload.task {
        Task::Generate { batch, new_tokens, .. } => batch * (new_tokens - 1),
        Task::Forward { .. } | Task::Verify { .. } | Task::Train { .. } | Task::Evaluate { .. } => {
            0
        }
    }
}

fn timings(
    run: &Run,
    prompts: &[Vec<u32>],
    prices: &Prices,
    tally: &Tally,
    load: Duration,
) -> Result<Timings> {
    let Generation { sequences, first_token, decode, .. } = &run.generation;
    let (prefill, decode) = (first_token.as_secs_f64(), decode.as_secs_f64());
    let fed = prompts.iter().map(Vec::len).sum::<usize>();
    let (decoded, choices) = (decoded(&run.generation), sequences.len() as u64);
    // A sequence that has ended is still computed, but gives no tokens.
    let kept = sequences.iter().map(|s| s.tokens.len() as u64 - 1).sum::<u64>();
    // Choices all cost the same; the first of each sequence belongs to the time to first token.
    let flops =
        |phase| Ok::<_, anyhow::Error>(prices.flops(&tally.sum(|p, _| p == phase)?)? as f64);
    let choice = flops(Phase::Sampling)? / (decoded + choices) as f64;
    let prefill_flops = flops(Phase::Prefill)? + choice * choices as f64;
    let decode_flops = flops(Phase::Decode)? + choice * decoded as f64;
    Ok(Timings {
        load_s: load.as_secs_f64(),
        time_to_first_token_s: prefill,
        decode_s: decode,
        prefill_tokens_per_s: fed as f64 / prefill,
        decode_tokens_per_s: (decoded > 0).then(|| kept as f64 / decode),
        prefill_flops_per_s: prefill_flops / prefill,
        decode_flops_per_s: (decoded > 0).then(|| decode_flops / decode),
    })
}

fn bytes_per_decoded_token(run: &Run) -> Option<Traffic> {
    let decoded = decoded(&run.generation);
    let all = run.ledger.traffic(|phase| phase == Phase::Decode);
    (decoded > 0).then(|| all.per(decoded))
}

fn show(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
