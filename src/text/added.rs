//! Tokens that tokenizer_config.json lists beside those of tokenizer.json, and what else it says of
//! how text becomes tokens.

use std::collections::HashSet;

use serde_json::Value as Json;
use tokenizers::{AddedToken, Tokenizer};

use super::{first_line, special::Special};

/// Has the tokenizer recognise the tokens that the config lists, as transformers does; the error is
/// what is wrong with the config.
pub(super) fn recognise(
    tokenizer: &mut Tokenizer,
    config: &Json,
    special: &Special,
) -> Result<(), String> {
    const SPLIT: &str = "split_special_tokens";
    if config.get(SPLIT).is_some_and(|on| !matches!(on, Json::Null | Json::Bool(false))) {
        return Err(format!("`{SPLIT}` is {}, which is not supported", config[SPLIT]));
    }
    agree_on_prefix(tokenizer, config)?;
    numbered(tokenizer, config)?;
    unnumbered(tokenizer, special)
}

/// The tokens of `added_tokens_decoder`, which must get the ids that it gives them.
fn numbered(tokenizer: &mut Tokenizer, config: &Json) -> Result<(), String> {
    const KEY: &str = "added_tokens_decoder";
    let listed = match config.get(KEY) {
        None | Some(Json::Null) => return Ok(()),
        Some(Json::Object(listed)) => listed,
        Some(_) => return Err(format!("`{KEY}` is no object of tokens by their ids")),
    };
    let read = |(id, json): (&String, &Json)| {
        let token = Option::zip(id.parse::<u32>().ok(), token(json));
        token.ok_or_else(|| format!("`{KEY}.{id}` is no token"))
    };
    let mut tokens = listed.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    tokens.sort_by_key(|(id, _)| *id);
    for (id, token) in tokens {
        let known = tokenizer.get_added_tokens_decoder();
        if known.get(&id).is_some_and(|known| known.content == token.content) {
            continue;
        }
        let name = token.content.clone();
        add(tokenizer, token).map_err(|e| format!("`{KEY}.{id}`: {e}"))?;
        if tokenizer.token_to_id(&name) != Some(id) {
            return Err(format!(
                "`{KEY}.{id}` is `{name}`, which tokenizer.json numbers otherwise"
            ));
        }
    }
    Ok(())
}

/// The special tokens, named and not. One that tokenizer.json does not recognise gets its id in the
/// vocabulary, else the next that is free.
fn unnumbered(tokenizer: &mut Tokenizer, special: &Special) -> Result<(), String> {
    let known = tokenizer.get_added_tokens_decoder();
    let mut known: HashSet<String> = known.into_values().map(|token| token.content).collect();
    let named = special.named.iter().map(|(name, json)| (name.as_str(), json, true));
    let extra = special.extra.iter().map(|json| ("extra_special_tokens", json, false));
    for (name, json, is_named) in named.chain(extra) {
        let mut token = match json.as_str() {
            Some(text) => AddedToken::from(text, true),
            None => token(json).ok_or_else(|| format!("`{name}` is no token"))?,
        };
        // A name makes a token special, whatever its own flag says.
        token.special |= is_named;
        if known.insert(token.content.clone()) {
            add(tokenizer, token).map_err(|e| format!("`{name}`: {e}"))?;
        }
    }
    Ok(())
}

fn add(tokenizer: &mut Tokenizer, token: AddedToken) -> Result<(), String> {
    let added = match token.special {
        true => tokenizer.add_special_tokens([token]),
        false => tokenizer.add_tokens([token]),
    };
    added.map(drop).map_err(|e| first_line(&e))
}

fn token(json: &Json) -> Option<AddedToken> {
    let flag = |key: &str| json.get(key).and_then(Json::as_bool);
    let special = flag("special").unwrap_or(false);
    let token = AddedToken::from(json.get("content")?.as_str()?, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false));
    Some(token.normalized(flag("normalized").unwrap_or(!special)))
}

/// Refuses an `add_prefix_space` that tokenizer.json contradicts: transformers obeys the one for
/// some classes of tokenizers, the other for the rest.
fn agree_on_prefix(tokenizer: &Tokenizer, config: &Json) -> Result<(), String> {
    const KEY: &str = "add_prefix_space";
    let wanted = match config.get(KEY) {
        None | Some(Json::Null) => return Ok(()),
        Some(Json::Bool(wanted)) => *wanted,
        Some(other) => return Err(format!("`{KEY}` is {other}, neither true nor false")),
    };
    let json = |part: serde_json::Result<Json>| part.map_err(|e| first_line(&e));
    let steps = [
        json(serde_json::to_value(tokenizer.get_normalizer()))?,
        json(serde_json::to_value(tokenizer.get_pre_tokenizer()))?,
    ];
    match (wanted, steps.iter().any(adds_space)) {
        (true, false) => Err(format!("`{KEY}` is true, but tokenizer.json adds no space")),
        (false, true) => Err(format!("`{KEY}` is false, but tokenizer.json adds a space")),
        (true, true) | (false, false) => Ok(()),
    }
}

/// Whether a normalizer or a pre-tokenizer, or one inside it, puts a space before a text.
fn adds_space(step: &Json) -> bool {
    let inside = |key: &str| step.get(key).and_then(Json::as_array).into_iter().flatten();
    match step.get("type").and_then(Json::as_str) {
        Some("ByteLevel") => step.get("add_prefix_space") == Some(&Json::Bool(true)),
        Some("Metaspace") => step.get("prepend_scheme").and_then(Json::as_str) != Some("never"),
        Some("Prepend") => true,
        _ => inside("normalizers").chain(inside("pretokenizers")).any(adds_space),
    }
}
