//! The tokens around a text of its own: those that the tokenizer's post-processor adds, and those
//! that `add_bos_token` and `add_eos_token` ask for.

use serde_json::Value as Json;
use tokenizers::{Tokenizer, processors::template::TemplateProcessing};

use super::{first_line, token_text};

/// Has the tokenizer put these tokens, and no others, around a text; the error is what is wrong, as
/// the rest of a sentence.
///
/// One processor does it all: of two in a row, the library's second would misplace its tokens.
pub(super) fn surround(
    tokenizer: &mut Tokenizer,
    before: &[u32],
    after: &[u32],
) -> Result<(), String> {
    let token = |id: &u32| {
        let name = tokenizer.id_to_token(*id).ok_or(format!("adds {id}, which is no token"))?;
        Ok::<_, String>((name, *id))
    };
    let tokens = |ids: &[u32]| ids.iter().map(token).collect::<Result<Vec<_>, _>>();
    let (before, after) = (tokens(before)?, tokens(after)?);
    let names = |tokens: &[(String, u32)]| tokens.iter().map(|(n, _)| n.clone()).collect();
    let pieces: [Vec<String>; 3] = [names(&before), vec!["$A".into()], names(&after)];
    let special = [before, after].concat();
    let processor = TemplateProcessing::builder()
        .try_single(pieces.concat())
        .and_then(|builder| builder.special_tokens(special).build().map_err(|e| first_line(&e)));
    let processor = processor.map_err(|e| format!("adds tokens that it cannot: {e}"))?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

/// Has a tokenizer.json's tokenizer add what tokenizer_config.json asks for besides; the error is
/// what is wrong with the latter.
///
/// A key that is true and not yet served is served, as transformers 4 does for the tokenizers of
/// Llama's kind; version 5 reads the post-processor alone. A key that is false while the
/// post-processor adds tokens is refused: the two versions differ, and nothing says which is meant.
pub(super) fn complete(tokenizer: &mut Tokenizer, config: &Json) -> Result<(), String> {
    let (before, after) = added(tokenizer)?;
    let (bos, eos) =
        (missing(tokenizer, config, "bos", &before)?, missing(tokenizer, config, "eos", &after)?);
    if bos.is_none() && eos.is_none() {
        return Ok(());
    }
    let before: Vec<u32> = bos.into_iter().chain(before).collect();
    let after: Vec<u32> = after.into_iter().chain(eos).collect();
    surround(tokenizer, &before, &after)
}

/// The token that the config wants at one `end` of a text, where `found` is without it.
fn missing(
    tokenizer: &Tokenizer,
    config: &Json,
    end: &str,
    found: &[u32],
) -> Result<Option<u32>, String> {
    let (key, role) = (format!("add_{end}_token"), format!("{end}_token"));
    let wanted = match config.get(&key) {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::Bool(wanted)) => *wanted,
        Some(_) => return Err(format!("`{key}` is neither true nor false")),
    };
    let other = |id: &u32| {
        let adds = tokenizer.id_to_token(*id).unwrap_or_default();
        format!("but the post_processor of tokenizer.json adds `{adds}`; make them agree")
    };
    if !wanted {
        let clash = found.first().map(|id| format!("`{key}` is false, {}", other(id)));
        return clash.map_or(Ok(None), Err);
    }
    let name = config.get(&role).and_then(token_text);
    let name = name.ok_or_else(|| format!("`{key}` is true, and there is no `{role}`"))?;
    let id = tokenizer.token_to_id(name);
    let id = id.ok_or_else(|| format!("`{role}` is `{name}`, which is no token"))?;
    match found {
        [] => Ok(Some(id)),
        found if found.contains(&id) => Ok(None),
        [first, ..] => Err(format!("`{key}` is true for the `{role}` `{name}`, {}", other(first))),
    }
}

/// The tokens that the post-processor puts before and after a text.
fn added(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    const PROBE: &str = "a";
    let encode = |special| {
        let encoding = tokenizer.encode_fast(PROBE, special);
        encoding.map(|e| e.get_ids().to_vec()).map_err(|e| first_line(&e))
    };
    let (alone, all) = (encode(false)?, encode(true)?);
    let starts = 0..=all.len().saturating_sub(alone.len());
    let mut places = starts.filter(|&at| all[at..].starts_with(&alone));
    let at =
        places.next().ok_or("the post_processor of tokenizer.json rewrites the text itself")?;
    Ok((all[..at].to_vec(), all[at + alone.len()..].to_vec()))
}
