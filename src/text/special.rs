//! The special tokens that a tokenizer's files name: tokenizer_config.json's, and those of
//! special_tokens_map.json, which older checkpoints keep beside it.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::{read_json, token_text};
use crate::error::{Error, Result};

/// The names that every tokenizer may give a token, in the order in which transformers adds them.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Further tokens: a list of them, or an object of tokens by further names.
const EXTRA: &str = "extra_special_tokens";
/// The same list under its older name.
const ADDITIONAL: &str = "additional_special_tokens";
/// The file that holds names alone.
const MAP: &str = "special_tokens_map.json";

/// The special tokens of a config, as it spells them.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Special {
    /// Those with a name, which templates know them by.
    pub(super) named: Vec<(String, Json)>,
    /// Those without.
    pub(super) extra: Vec<Json>,
}

impl Special {
    /// Those of `config`; the error is a value that is no token.
    pub(super) fn of(config: &Json) -> Result<Self, String> {
        let Json::Object(config) = config else { return Ok(Self::default()) };
        let mut special = Self::default();
        for name in NAMES {
            match config.get(name) {
                None | Some(Json::Null) => (),
                Some(token) => special.name(name, token)?,
            }
        }
        // Names of a model's own: `image_token`. `add_bos_token` is none, for it is true or false.
        let own = |name: &str| name.ends_with("_token") && !NAMES.contains(&name);
        for (name, token) in config.iter().filter(|(name, _)| own(name)) {
            if token_text(token).is_some() {
                special.name(name, token)?;
            }
        }
        match config.get(EXTRA) {
            None | Some(Json::Null) => (),
            Some(Json::Array(list)) => special.extra.clone_from(list),
            Some(Json::Object(named)) => {
                for (name, token) in named {
                    special.name(name, token)?;
                }
            }
            Some(_) => return Err(format!("`{EXTRA}` is neither a list nor an object of tokens")),
        }
        // The older name counts where the newer one lists nothing, as in transformers.
        if special.extra.is_empty() {
            match config.get(ADDITIONAL) {
                None | Some(Json::Null) => (),
                Some(Json::Array(list)) => special.extra.clone_from(list),
                Some(_) => return Err(format!("`{ADDITIONAL}` is no list of tokens")),
            }
        }
        match special.extra.iter().find(|token| token_text(token).is_none()) {
            Some(other) => {
                Err(format!("`{EXTRA}` or `{ADDITIONAL}` holds {other}, which is no token"))
            }
            None => Ok(special),
        }
    }

    /// Gives a token this name, whatever had it.
    fn name(&mut self, name: &str, token: &Json) -> Result<(), String> {
        if token_text(token).is_none() {
            return Err(format!("`{name}` is {token}, which is no token"));
        }
        self.named.retain(|(known, _)| known != name);
        self.named.push((name.into(), token.clone()));
        Ok(())
    }

    /// The texts of those with a name.
    pub(super) fn texts(&self) -> impl Iterator<Item = (String, String)> {
        self.named
            .iter()
            .filter_map(|(name, token)| Some((name.clone(), token_text(token)?.to_string())))
    }
}

/// Puts what special_tokens_map.json in `dir` says into `config`, as transformers does: not at all
/// where the config has an `added_tokens_decoder`, for it is then of the format that needs no
/// such file; else the file's names take the place of the config's.
///
/// # Errors
/// A file that is no object of tokens.
pub(super) fn merge_map(dir: &Path, config: &mut Json) -> Result<()> {
    if config.get("added_tokens_decoder").is_some() {
        return Ok(());
    }
    let file = dir.join(MAP);
    let fail = |why: String| Error::File { file: file.clone(), why };
    let map = match read_json(&file)? {
        None => return Ok(()),
        Some(Json::Object(map)) => map,
        Some(_) => return Err(fail("is no JSON object".into()).into()),
    };
    // What is wrong with it is told of this file, not of the config that it goes into.
    Special::of(&Json::Object(map.clone())).map_err(fail)?;
    if !config.is_object() {
        *config = Json::Object(Map::new());
    }
    if let Json::Object(config) = config {
        merge(config, map);
    }
    Ok(())
}

fn merge(config: &mut Map<String, Json>, map: Map<String, Json>) {
    // What the config lists under the older name counts before the file does.
    let lists = |value: &Json| match value {
        Json::Array(list) => !list.is_empty(),
        Json::Object(named) => !named.is_empty(),
        _ => false,
    };
    if !config.get(EXTRA).is_some_and(lists)
        && let Some(list) = config.remove(ADDITIONAL)
    {
        config.insert(EXTRA.into(), list);
    }
    for (key, value) in map {
        match key.as_str() {
            EXTRA => {
                let merged = match (config.remove(EXTRA), value) {
                    (Some(Json::Array(mut all)), Json::Array(new)) => {
                        all.extend(new);
                        Json::Array(all)
                    }
                    (Some(Json::Object(mut all)), Json::Object(new)) => {
                        all.extend(new);
                        Json::Object(all)
                    }
                    (_, new) => new,
                };
                config.insert(key, merged);
            }
            ADDITIONAL if config.contains_key(EXTRA) => (),
            ADDITIONAL => _ = config.insert(key, value),
            name if NAMES.contains(&name) => _ = config.insert(key, value),
            // Of a model's own names the config's come first.
            name if name.ends_with("_token") => _ = config.entry(key).or_insert(value),
            _ => (),
        }
    }
}
