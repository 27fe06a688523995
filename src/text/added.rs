//! Tokens that tokenizer_config.json lists beside those of tokenizer.json.

use serde_json::Value as Json;
use tokenizers::{AddedToken, Tokenizer};

use super::first_line;

/// Has the tokenizer recognise the tokens of `added_tokens_decoder`, as transformers does; the error
/// is what is wrong with the config.
pub(super) fn recognise(tokenizer: &mut Tokenizer, config: &Json) -> Result<(), String> {
    const KEY: &str = "added_tokens_decoder";
    const SPLIT: &str = "split_special_tokens";
    if config.get(SPLIT).is_some_and(|on| !matches!(on, Json::Null | Json::Bool(false))) {
        return Err(format!("`{SPLIT}` is {}, which is not supported", config[SPLIT]));
    }
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
        let added = match token.special {
            true => tokenizer.add_special_tokens([token]),
            false => tokenizer.add_tokens([token]),
        };
        added.map_err(|e| format!("`{KEY}.{id}`: {}", first_line(&e)))?;
        if tokenizer.token_to_id(&name) != Some(id) {
            return Err(format!(
                "`{KEY}.{id}` is `{name}`, which tokenizer.json numbers otherwise"
            ));
        }
    }
    Ok(())
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
