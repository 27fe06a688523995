//! What a checkpoint suggests for choosing tokens: its generation_config.json, or a GGUF's
//! `general.sampling` keys.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::read_json;
use crate::{
    error::{Error, Result},
    weights::Metadata,
    workload::Sampling,
};

/// The suggestion, as the file spells it. Nothing of it is taken unless it is asked for, but the
/// tokens that end a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Suggested {
    /// The file that makes it.
    pub file: PathBuf,
    /// Its keys; a GGUF's under the names of generation_config.json, where it has one.
    pub values: Map<String, Json>,
    /// What a draw takes where the file names no `top_k`.
    top_k: u64,
}

/// What a key does to the choice of tokens.
enum Role {
    /// It is taken.
    Taken,
    /// It asks for what is not supported, unless it is null, false, empty or this number.
    Off(f64),
    /// The same, of what narrows a draw: it does nothing where the likeliest token is taken.
    Drawn(f64),
    /// It chooses nothing: it is about lengths, output or other tokens, or refines what is off.
    Idle,
}

/// Every key that is known: transformers' `GenerationConfig`, and a GGUF's other keys.
const ROLES: [(&str, Role); 60] = [
    ("do_sample", Role::Taken),
    ("temperature", Role::Taken),
    ("top_k", Role::Taken),
    ("top_p", Role::Taken),
    ("repetition_penalty", Role::Taken),
    ("eos_token_id", Role::Taken),
    ("min_p", Role::Drawn(0.0)),
    ("top_h", Role::Drawn(0.0)),
    ("typical_p", Role::Drawn(1.0)),
    ("epsilon_cutoff", Role::Drawn(0.0)),
    ("eta_cutoff", Role::Drawn(0.0)),
    ("presence_penalty", Role::Off(0.0)),
    ("frequency_penalty", Role::Off(0.0)),
    ("encoder_repetition_penalty", Role::Off(1.0)),
    ("no_repeat_ngram_size", Role::Off(0.0)),
    ("encoder_no_repeat_ngram_size", Role::Off(0.0)),
    ("penalty_alpha", Role::Off(0.0)),
    ("guidance_scale", Role::Off(1.0)),
    ("num_beams", Role::Off(1.0)),
    ("num_beam_groups", Role::Off(1.0)),
    ("num_return_sequences", Role::Off(1.0)),
    ("min_length", Role::Off(0.0)),
    ("min_new_tokens", Role::Off(0.0)),
    ("exponential_decay_length_penalty", Role::Off(0.0)),
    ("bad_words_ids", Role::Off(0.0)),
    ("force_words_ids", Role::Off(0.0)),
    ("constraints", Role::Off(0.0)),
    // Token 0 is a token: no number is harmless.
    ("forced_bos_token_id", Role::Off(f64::NAN)),
    ("forced_eos_token_id", Role::Off(f64::NAN)),
    ("forced_decoder_ids", Role::Off(f64::NAN)),
    ("suppress_tokens", Role::Off(f64::NAN)),
    ("begin_suppress_tokens", Role::Off(f64::NAN)),
    ("sequence_bias", Role::Off(f64::NAN)),
    ("watermarking_config", Role::Off(f64::NAN)),
    ("stop_strings", Role::Off(f64::NAN)),
    ("dola_layers", Role::Off(f64::NAN)),
    ("sequence", Role::Off(f64::NAN)),
    ("mirostat", Role::Off(0.0)),
    ("xtc_probability", Role::Off(0.0)),
    // The penalty here looks at the whole context, which llama.cpp calls -1.
    ("penalty_last_n", Role::Off(-1.0)),
    ("mirostat_tau", Role::Idle),
    ("mirostat_eta", Role::Idle),
    ("xtc_threshold", Role::Idle),
    ("diversity_penalty", Role::Idle),
    ("length_penalty", Role::Idle),
    ("early_stopping", Role::Idle),
    // Scores all move alike, so that no draw changes.
    ("renormalize_logits", Role::Idle),
    // Logits that are not finite are an error here.
    ("remove_invalid_values", Role::Idle),
    ("max_length", Role::Idle),
    ("max_new_tokens", Role::Idle),
    ("max_time", Role::Idle),
    ("use_cache", Role::Idle),
    ("cache_implementation", Role::Idle),
    ("bos_token_id", Role::Idle),
    ("pad_token_id", Role::Idle),
    ("decoder_start_token_id", Role::Idle),
    ("output_attentions", Role::Idle),
    ("output_hidden_states", Role::Idle),
    ("return_dict_in_generate", Role::Idle),
    ("transformers_version", Role::Idle),
];

/// A GGUF's keys after `general.sampling.`, and what they are called here.
const GGUF: [(&str, &str); 12] = [
    ("temp", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("penalty_repeat", "repetition_penalty"),
    ("min_p", "min_p"),
    ("sequence", "sequence"),
    ("xtc_probability", "xtc_probability"),
    ("xtc_threshold", "xtc_threshold"),
    ("penalty_last_n", "penalty_last_n"),
    ("mirostat", "mirostat"),
    ("mirostat_tau", "mirostat_tau"),
    ("mirostat_eta", "mirostat_eta"),
];

impl Suggested {
    /// What generation_config.json in `dir` says; `None` without one.
    pub(super) fn of_directory(dir: &Path) -> Result<Option<Self>> {
        let file = dir.join("generation_config.json");
        match read_json(&file)? {
            None => Ok(None),
            // What transformers draws among where no file says so.
            Some(Json::Object(values)) => Ok(Some(Self { file, values, top_k: 50 })),
            Some(_) => {
                let why = "is no JSON object".into();
                Err(Error::File { file, why }.into())
            }
        }
    }

    /// What the metadata says; `None` where it says nothing.
    pub(super) fn of_gguf(metadata: &Metadata) -> Result<Option<Self>> {
        let mut values = Map::new();
        for (key, name) in GGUF {
            let key = format!("general.sampling.{key}");
            if let Some(value) = metadata.scalar(&key)? {
                values.insert(name.into(), value);
            }
        }
        if values.is_empty() {
            return Ok(None);
        }
        let draws = values.get("temperature").and_then(Json::as_f64) != Some(0.0);
        values.insert("do_sample".into(), draws.into());
        Ok(Some(Self { file: metadata.file().into(), values, top_k: 0 }))
    }

    /// The values that choose tokens, or might: `do_sample true`, `temperature 0.7`.
    pub fn shown(&self) -> Vec<String> {
        let chooses = |key: &str| match role(key) {
            Some(Role::Taken) => key != "eos_token_id",
            Some(Role::Off(_) | Role::Drawn(_)) | None => !key.starts_with('_'),
            Some(Role::Idle) => false,
        };
        let shown = self.values.iter().filter(|(key, _)| chooses(key));
        shown.map(|(key, value)| format!("{key} {value}")).collect()
    }

    /// The same as a run takes it: what transformers' `generate` does with such a file. Without
    /// `do_sample` that is the likeliest token.
    ///
    /// # Errors
    /// A value that cannot be honoured, or a key that nobody knows, by name.
    pub fn sampling(&self) -> Result<Sampling> {
        let draws = match self.get("do_sample") {
            None => false,
            Some(Json::Bool(draws)) => *draws,
            Some(_) => return Err(self.bad("do_sample", "is neither true nor false")),
        };
        self.values.iter().try_for_each(|(key, value)| self.check(key, value, draws))?;
        let repeat_penalty = self.number("repetition_penalty")?.unwrap_or(1.0);
        let greedy = Sampling { repeat_penalty, ..Sampling::GREEDY };
        if !draws {
            return self.valid(greedy);
        }
        let temperature = self.number("temperature")?.unwrap_or(1.0);
        if temperature == 0.0 {
            return Err(self.bad("temperature", "is 0, while `do_sample` is true"));
        }
        let top_k = match self.get("top_k") {
            None => self.top_k,
            Some(k) => k.as_u64().ok_or_else(|| self.bad("top_k", "is not a count"))?,
        };
        let top_p = self.number("top_p")?.filter(|p| *p != 1.0);
        let top_k = usize::try_from(top_k).ok().filter(|k| *k > 0);
        self.valid(Sampling { temperature, top_k, top_p, repeat_penalty })
    }

    /// Refuses a value that would change the choice. A key that nobody knows may, unless its value
    /// says that it is off.
    fn check(&self, key: &str, value: &Json, draws: bool) -> Result<()> {
        match role(key) {
            Some(Role::Taken | Role::Idle) => Ok(()),
            Some(Role::Drawn(_)) if !draws => Ok(()),
            Some(Role::Off(harmless) | Role::Drawn(harmless)) if is_off(value, *harmless) => Ok(()),
            Some(Role::Off(_) | Role::Drawn(_)) => {
                Err(self.bad(key, format!("is {value}, which is not supported")))
            }
            None if key.starts_with('_') || is_off(value, f64::NAN) => Ok(()),
            None => Err(self.bad(key, "is unknown, and may change how tokens are chosen")),
        }
    }

    fn get(&self, key: &str) -> Option<&Json> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let number = |value: &Json| value.as_f64().ok_or_else(|| self.bad(key, "is not a number"));
        self.get(key).map(number).transpose()
    }

    /// The same, if a run can take it; the error names the file's key, not a flag.
    fn valid(&self, sampling: Sampling) -> Result<Sampling> {
        let named = |e: anyhow::Error| match e.downcast_ref() {
            Some(Error::Flag { flag, why }) => {
                let key = flag.trim_start_matches('-').replace('-', "_");
                self.bad(&key.replace("repeat_penalty", "repetition_penalty"), why)
            }
            _ => e,
        };
        sampling.validate().map(|()| sampling).map_err(named)
    }

    fn bad(&self, key: &str, why: impl Into<String>) -> anyhow::Error {
        let (origin, key, why) = (self.file.display().to_string(), key.into(), why.into());
        Error::Config { origin, key, why }.into()
    }
}

fn role(key: &str) -> Option<&'static Role> {
    ROLES.iter().find(|(known, _)| *known == key).map(|(_, role)| role)
}

fn is_off(value: &Json, harmless: f64) -> bool {
    match value {
        Json::Null | Json::Bool(false) => true,
        Json::Bool(true) => false,
        Json::Number(n) => n.as_f64() == Some(harmless),
        Json::String(text) => text.is_empty(),
        Json::Array(list) => list.is_empty(),
        Json::Object(map) => map.is_empty(),
    }
}
