//! Flags that several commands share, each spelled and explained once.

use std::path::{Path, PathBuf};

use candle_core::Device;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

pub use super::lora::LoraArgs;
use super::{device, interrupt::Interrupt, lora::ADAPTER_FLAGS};
use crate::{
    analytic::Structure,
    config::{Ignored, LoraConfig, Matters, ModelConfig},
    error::{Error, Result},
    ledger::{Dtype, Ledger},
    model::{AdapterSource, Decoder, How},
    ops::Fault,
    prices::Prices,
    report::{self, Figures, Report},
    target::{Target, temporary_beside},
    train::data::{Dataset, Notes, Options},
    weights::{self, Checkpoint, PeftAdapter},
    workload::{AttentionMode, Layout, Sampling, Task, Workload},
};

/// Which model.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Hub id, directory of safetensors, .gguf file, or synthetic[:preset][:seed]
    /// [default: ./weights, else Qwen/Qwen2.5-0.5B-Instruct; where nothing runs, the preset
    /// qwen2.5-0.5b]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// A config.json; its weights are synthetic where they are needed
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub config: Option<PathBuf>,
    /// A published size, qwen2.5-0.5b … qwen2.5-72b, or tiny; synthetic weights likewise
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "config"])]
    pub preset: Option<String>,
    /// How a GGUF's text is split before its tokenizer merges bytes, by llama.cpp's name, in place
    /// of the file's `tokenizer.ggml.pre`: qwen2, llama-bpe, smollm, tekken, gpt-2 …
    #[arg(long, value_name = "NAME", conflicts_with_all = ["config", "preset"])]
    pub pretokenizer: Option<String>,
}

impl ModelArgs {
    /// Opens the checkpoint, with tensors and tokenizer.
    pub fn open(&self) -> Result<Checkpoint> {
        let checkpoint = match self.config()? {
            Some(Described { config, ignored, .. }) => {
                let ignored = ignored.unwrap_or_default();
                Checkpoint { ignored, ..weights::synthetic(config, 0)? }
            }
            None => weights::open_split(self.model.as_deref(), self.pretokenizer.as_deref())?,
        };
        say_what_matters(&checkpoint.ignored);
        Ok(checkpoint)
    }

    /// Whether no model is named.
    pub fn names_no_model(&self) -> bool {
        self.model.is_none() && self.config.is_none() && self.preset.is_none()
    }

    /// That the default preset is counted where a run would take weights, if it is so.
    pub fn stand_in(&self) -> Option<String> {
        stand_in(self.names_no_model())
    }

    /// The config alone.
    pub fn config_only(&self) -> Result<Described> {
        if let Some(found) = self.config()? {
            return Ok(found);
        }
        match &self.model {
            Some(model) => {
                let checkpoint = weights::open_split(Some(model), self.pretokenizer.as_deref())?;
                say_what_matters(&checkpoint.ignored);
                let ignored = checkpoint.listed().map(<[Ignored]>::to_vec);
                let Checkpoint { config, origin, .. } = checkpoint;
                Ok(Described { config, origin, ignored })
            }
            None if self.pretokenizer.is_some() => {
                Err(Error::flag("--pretokenizer", "needs --model: no text is read without").into())
            }
            None => Described::preset(DEFAULT_PRESET),
        }
    }

    fn config(&self) -> Result<Option<Described>> {
        if let Some(file) = &self.config {
            let (config, ignored) = ModelConfig::read(file)?;
            let (origin, ignored) = (file.display().to_string(), Some(ignored));
            return Ok(Some(Described { config, origin, ignored }));
        }
        self.preset.as_deref().map(Described::preset).transpose()
    }
}

/// That the default preset is counted where a run would take weights: because no model is named.
pub fn stand_in(names_no_model: bool) -> Option<String> {
    (names_no_model && weights::default_is_local()).then(|| {
        format!(
            "counted is the preset {DEFAULT_PRESET}, not the weights that a run without --model \
             takes; --model counts those"
        )
    })
}

/// A config, where it came from, and what of its files is not used, where there are files.
pub struct Described {
    /// The model's widths and counts.
    pub config: ModelConfig,
    /// Its file, checkpoint or preset.
    pub origin: String,
    /// What is not used.
    pub ignored: Option<Vec<Ignored>>,
}

impl Described {
    fn preset(name: &str) -> Result<Self> {
        let (config, origin) = (ModelConfig::preset(name)?, format!("preset {name}"));
        Ok(Self { config, origin, ignored: None })
    }
}

/// A document with what of the model's files was not used.
#[derive(serde::Serialize)]
pub struct Listing<'a, T> {
    #[serde(flatten)]
    pub document: &'a T,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignored: Option<Vec<Ignored>>,
}

/// Where a checkpoint says two things, which of them was taken.
fn say_what_matters(ignored: &[Ignored]) {
    for Ignored { file, key, reason, .. } in ignored.iter().filter(|i| i.matters == Matters::Always)
    {
        let what = if key == "*" { file.clone() } else { format!("{file}: `{key}`") };
        warn(&format!("{what} {reason}"));
    }
}

/// What is counted where no model is named.
pub const DEFAULT_PRESET: &str = "qwen2.5-0.5b";

/// Which operations count.
#[derive(Debug, Args)]
#[command(next_help_heading = "Counting")]
pub struct StructureArg {
    /// Which operations are counted: what this program executes, or somebody's formula
    #[arg(long, value_enum, default_value_t = Structure::Exact)]
    pub structure: Structure,
}

/// For how much each primitive counts.
#[derive(Debug, Args)]
#[command(next_help_heading = "Counting")]
pub struct CountingArgs {
    /// What a primitive costs: unit, coursework (exp, log, sqrt, trig 10), matmul (2mnk, all else
    /// free), or a TOML file
    #[arg(long, value_name = "PRICES", default_value = "unit")]
    pub prices: String,
}

impl CountingArgs {
    /// The price list.
    pub fn prices(&self) -> Result<Prices> {
        Prices::named(&self.prices)
    }
}

/// Where and in which precision.
#[derive(Debug, Args)]
#[command(next_help_heading = "Execution")]
pub struct ExecutionArgs {
    /// cpu, cuda[:N] or metal
    #[arg(long, default_value = "cpu")]
    pub device: String,
    #[command(flatten)]
    dtype: DtypeArg,
    #[command(flatten)]
    pub attention: AttentionArg,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// A trained adapter in PEFT's format
    #[arg(long, value_name = "DIR", conflicts_with_all = ADAPTER_FLAGS)]
    pub adapter: Option<PathBuf>,
    /// Seed of draws, and of the adapters' initial values
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Time each op (waits for the device around it, so the run is slower)
    #[arg(long)]
    pub op_times: bool,
    /// On a GPU, launch each decoding step anew in place of replaying a recorded CUDA graph
    #[arg(long)]
    pub no_cuda_graph: bool,
    /// Drop, double or halve a kernel of the recorded CUDA graph, to see that the audit finds it:
    /// drop:3
    #[arg(long, value_name = "FAULT", hide = true, conflicts_with = "no_cuda_graph")]
    pub plant_fault: Option<Fault>,
    /// Write every op that ran, with its calls, to FILE as JSON; `-` is stdout
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
}

impl ExecutionArgs {
    /// How a GPU's decoding steps are run.
    pub fn how(&self) -> How {
        How { recorded: !self.no_cuda_graph, fault: self.plant_fault }
    }
}

/// An opened file for the executed ledger, where one was asked for.
#[derive(Debug)]
pub struct LedgerOutput(Option<Target>);

impl LedgerOutput {
    /// Writes `ledger`, which `command` executed on `device`.
    pub fn write(self, command: &str, device: &str, ledger: &Ledger) -> Result<()> {
        let Some(target) = self.0 else { return Ok(()) };
        target.write(&serde_json::json!({
            "schema_version": report::SCHEMA_VERSION,
            "command": command,
            "device": device,
            "ledger": ledger,
        }))
    }
}

/// Which scores attention computes.
#[derive(Debug, Args)]
pub struct AttentionArg {
    /// Which scores attention computes: dense, all of them; blocked, none of blocks of 64 x 64 that
    /// the mask hides wholly, and in training it computes them again in place of keeping them
    #[arg(long, value_enum, value_name = "MODE", default_value_t = AttentionMode::Dense, hide_possible_values = true)]
    attention: AttentionMode,
}

impl AttentionArg {
    /// The one asked for.
    pub fn mode(&self) -> AttentionMode {
        self.attention
    }
}

/// Element type of weights and activations.
#[derive(Debug, Args)]
pub struct DtypeArg {
    /// Element type of weights and activations; fp8 is bf16 but for the layers' products, which are
    /// in 8 bits with a scale a row [default: bf16 on cuda, else f32]
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
}

impl DtypeArg {
    /// The element type asked for, or that of `device`.
    pub fn on(&self, device: &str) -> Dtype {
        self.dtype.unwrap_or_else(|| device::default_dtype(device))
    }
}

impl ExecutionArgs {
    /// Sets the number of threads. To be called before anything else runs.
    pub fn set_threads(&self) {
        set_threads(self.threads);
    }

    /// Opens the device.
    pub fn open_device(&self) -> Result<Device> {
        device::open(&self.device)
    }

    /// Refuses a fault that was to be planted where nothing has been recorded.
    pub fn fault_was_planted(&self, recorded: bool) -> Result<()> {
        match self.plant_fault {
            Some(_) if !recorded => {
                let why = "no CUDA graph was recorded that a fault could be planted in";
                Err(Error::Flag { flag: "--plant-fault".into(), why: why.into() }.into())
            }
            _ => Ok(()),
        }
    }

    /// Opens the file for the ledger before the work starts.
    pub fn open_ledger(&self) -> Result<LedgerOutput> {
        Ok(LedgerOutput(self.ledger.as_deref().map(Target::open).transpose()?))
    }

    /// The element type asked for, or the device's.
    pub fn dtype(&self) -> Dtype {
        self.dtype.on(&self.device)
    }

    /// The adapters that `checkpoint` is to carry.
    pub fn adapters(&self, config: &ModelConfig, lora: &LoraArgs) -> Result<AdapterSource> {
        Ok(match &self.adapter {
            Some(dir) => AdapterSource::Peft(PeftAdapter::open(dir, config)?),
            None => AdapterSource::Fresh { lora: lora.config(config)?, seed: self.seed },
        })
    }

    /// Loads the model with its adapters, behind a progress bar; with what gradients need where it is
    /// to be trained.
    pub fn load(
        &self,
        checkpoint: &Checkpoint,
        adapters: &AdapterSource,
        device: &Device,
        interrupt: &Interrupt,
        trains: bool,
    ) -> Result<Decoder> {
        let Checkpoint { config, weights, .. } = checkpoint;
        let layers = config.num_hidden_layers as u64;
        let bar = bar(layers, "loading weights {bar:30} {pos}/{len} layers");
        let progress = |layer| {
            bar.set_position(layer as u64);
            interrupt.check()
        };
        let dtype = self.dtype();
        let model = match trains {
            true => Decoder::load_to_train(config, weights, adapters, dtype, device, progress),
            false => Decoder::load(config, weights, adapters, dtype, device, progress),
        };
        bar.finish_and_clear();
        Ok(model?.with_attention(self.attention.mode()))
    }

    /// `task` run on `model` with these adapters.
    pub fn workload(&self, model: &ModelConfig, lora: &LoraConfig, task: Task) -> Workload {
        let (dtype, attention) = (self.dtype(), self.attention.mode());
        Workload { model: model.clone(), lora: lora.clone(), dtype, attention, task }
    }
}

/// Sets the number of threads, if one is given. To be called before anything else runs.
pub fn set_threads(threads: Option<u16>) {
    if let Some(threads) = threads {
        // candle and rayon read it once, at their first parallel operation.
        // SAFETY: called from main's thread before any other thread exists.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
}

/// Progress over `length` of something, on a terminal.
pub fn bar(length: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Says where text will be noise.
pub fn warn_of_noise(checkpoint: &Checkpoint) {
    if checkpoint.synthetic {
        warn("synthetic weights: the FLOPs are real, the text is noise");
    }
}

/// Says that something may not be what a user wants, in one line on stderr.
pub fn warn(what: &str) {
    let yellow = anstyle::AnsiColor::Yellow.on_default().bold();
    anstream::eprintln!("{yellow}warning:{yellow:#} {what}");
}

/// Says something that a user may not expect, in one line on stderr.
pub fn note(what: &str) {
    let cyan = anstyle::AnsiColor::Cyan.on_default().bold();
    anstream::eprintln!("{cyan}note:{cyan:#} {what}");
}

/// Which chat template.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct TemplateArg {
    /// Chat template: the checkpoint's of this name, or a .jinja file
    #[arg(long, value_name = "NAME")]
    pub template: Option<String>,
}

impl TemplateArg {
    /// Makes it the one that conversations get.
    pub fn choose(&self, checkpoint: &mut Checkpoint) -> Result<()> {
        self.template.iter().try_for_each(|name| checkpoint.text.choose_template(name))
    }
}

/// Where the result goes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Write JSON to FILE; without FILE, to stdout and nothing else there
    #[arg(long, global = true, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
    /// Every digit of FLOPs in tables, in place of four and a prefix
    #[arg(long, global = true)]
    exact: bool,
}

/// An opened output.
#[derive(Debug)]
pub struct Output {
    json: Option<Target>,
    style: Figures,
}

impl OutputArgs {
    /// Opens the output before the work starts.
    pub fn open(&self) -> Result<Output> {
        Ok(Output {
            json: self.json.as_deref().map(Target::open).transpose()?,
            style: self.style(),
        })
    }

    /// How tables show FLOPs.
    pub fn style(&self) -> Figures {
        if self.exact { Figures::Exact } else { Figures::Human }
    }
}

impl Output {
    /// Whether stdout is for people.
    pub fn is_human(&self) -> bool {
        !matches!(self.json, Some(Target::Stdout))
    }

    /// Prints the report, for people (unless `quiet`) and as JSON where asked for.
    pub fn write(self, report: &Report, quiet: bool) -> Result<()> {
        let style = self.style;
        self.write_with(report, || if quiet { Ok(()) } else { report::print(report, style) })
    }

    /// The same for any value that has a JSON form: `print` is for people.
    pub fn write_with(
        self,
        value: &impl serde::Serialize,
        print: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let human = self.is_human();
        // First the file: a reader of stdout that goes away must not cost it.
        if let Some(json) = self.json {
            json.write(value)?;
        }
        if human { print() } else { Ok(()) }
    }
}

/// How tokens are chosen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// 0 is greedy; above 0, draw from softmax(logits / temperature)
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Draw among the K likeliest
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Draw among the likeliest that together hold probability P
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Factor against tokens already in the context; 1 is off
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repeat_penalty: f64,
}

impl SamplingArgs {
    /// The same, checked.
    pub fn sampling(&self) -> Result<Sampling> {
        let &Self { temperature, top_k, top_p, repeat_penalty } = self;
        let sampling = Sampling { temperature, top_k, top_p, repeat_penalty };
        sampling.validate()?;
        Ok(sampling)
    }
}

/// How sequences of different lengths lie in a pass.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Data")]
pub struct LayoutArgs {
    /// How sequences of different lengths lie in a pass [default: padded to the longest of it]
    #[arg(long, value_enum, value_name = "LAYOUT")]
    layout: Option<Layout>,
    /// Short for --layout packed
    #[arg(long, conflicts_with = "layout")]
    packing: bool,
}

impl LayoutArgs {
    /// The layout that is asked for.
    pub fn chosen(&self) -> Option<Layout> {
        self.layout.or(self.packing.then_some(Layout::Packed))
    }
}

/// How text becomes rows.
#[derive(Debug, Args)]
#[command(next_help_heading = "Data")]
pub struct DataArgs {
    /// Most tokens that a row feeds
    #[arg(long, value_name = "T", default_value_t = 512)]
    pub seq: usize,
    /// Rows of one pass
    #[arg(long, value_name = "B", default_value_t = 1)]
    pub batch: usize,
    #[command(flatten)]
    pub layout: LayoutArgs,
    /// Of conversations, learn and score the assistant's turns alone; of prompts, the completions
    #[arg(long)]
    pub mask_prompt: bool,
    /// Keep the tokens of files in DIR for later runs
    #[arg(long, value_name = "DIR")]
    pub token_cache: Option<PathBuf>,
}

impl DataArgs {
    /// How rows lie in a pass.
    pub fn layout(&self) -> Layout {
        self.layout.chosen().unwrap_or_default()
    }

    /// Reads and tokenizes `file` for `checkpoint`.
    pub fn load(&self, file: &Path, checkpoint: &Checkpoint) -> Result<Dataset> {
        let most = checkpoint.config.max_position_embeddings;
        if self.seq > most {
            let why = format!("{} is past the model's {most} positions", self.seq);
            return Err(Error::flag("--seq", why).into());
        }
        if self.batch == 0 {
            return Err(Error::flag("--batch", "must be at least 1").into());
        }
        if let Some(dir) = &self.token_cache {
            let bad =
                |e: std::io::Error| Error::flag("--token-cache", format!("{}: {e}", dir.display()));
            std::fs::create_dir_all(dir).map_err(bad)?;
            temporary_beside(&dir.join("tokens")).map_err(bad)?;
        }
        let &Self { seq, mask_prompt, .. } = self;
        let packing = self.layout() == Layout::Packed;
        let options = Options { seq, mask_prompt, packing, cache: self.token_cache.clone() };
        let dataset = Dataset::load(file, &checkpoint.text, &options)?;
        let Notes { form, ignored } = dataset.notes();
        if let Some(form) = form.as_ref().filter(|form| form.contains("in the prompt of")) {
            note(form);
        }
        if !ignored.is_empty() {
            let columns: Vec<String> = ignored.iter().map(|i| format!("`{}`", i.key)).collect();
            let (file, columns) = (file.display(), columns.join(", "));
            note(&format!("{file}: ignored, as they change nothing: {columns}"));
        }
        Ok(dataset)
    }
}
