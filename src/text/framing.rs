//! The tokens around a text of its own: those that the tokenizer's post-processor adds, and those
//! that `add_bos_token` and `add_eos_token` ask for.

use serde_json::Value as Json;
use tokenizers::{
    PostProcessorWrapper, Tokenizer,
    processors::{sequence::Sequence, template::TemplateProcessing},
};

use super::{first_line, token_text};

/// A token that may stand at an end of a text.
type Token = (String, u32);

/// Has the tokenizer add `bos` before and `eos` after what it adds so far; the error is what is
/// wrong, as the rest of a sentence.
pub(super) fn add(
    tokenizer: &mut Tokenizer,
    bos: Option<Token>,
    eos: Option<Token>,
) -> Result<(), String> {
    if bos.is_none() && eos.is_none() {
        return Ok(());
    }
    let name = |token: &Option<Token>| token.as_ref().map(|(name, _)| name.clone());
    let pieces: Vec<String> =
        name(&bos).into_iter().chain(["$A".into()]).chain(name(&eos)).collect();
    let special: Vec<Token> = bos.into_iter().chain(eos).collect();
    let processor = TemplateProcessing::builder()
        .try_single(pieces)
        .and_then(|builder| builder.special_tokens(special).build().map_err(|e| first_line(&e)));
    let processor: PostProcessorWrapper =
        processor.map_err(|e| format!("adds tokens that it cannot: {e}"))?.into();
    let all = tokenizer.get_post_processor().cloned().into_iter().chain([processor]);
    tokenizer.with_post_processor(Some(Sequence::new(all.collect())));
    Ok(())
}

/// Has a tokenizer.json's tokenizer add what tokenizer_config.json asks for besides.
///
/// A key that is true and not yet served is served, as transformers 4 does for the tokenizers of
/// Llama's kind; version 5 reads the post-processor alone. A key that is false while the
/// post-processor adds tokens is refused: the two versions differ, and nothing says which is meant.
pub(super) fn complete(tokenizer: &mut Tokenizer, config: &Json) -> Result<(), String> {
    let (before, after) = added(tokenizer)?;
    let missing = |end: &str, found: &[u32]| {
        let (key, role) = (format!("add_{end}_token"), format!("{end}_token"));
        let wanted = match config.get(&key) {
            None | Some(Json::Null) => return Ok(None),
            Some(Json::Bool(wanted)) => *wanted,
            Some(_) => return Err(format!("`{key}` is neither true nor false")),
        };
        let spelt = |id: &u32| tokenizer.id_to_token(*id).unwrap_or_default();
        let named = config.get(&role).and_then(token_text);
        match (wanted, found) {
            (false, []) => Ok(None),
            (false, [first, ..]) => Err(format!(
                "`{key}` is false, but the post_processor of tokenizer.json adds `{}`; make them \
                 agree",
                spelt(first)
            )),
            (true, found) => {
                let name = named.ok_or(format!("`{key}` is true, and there is no `{role}`"))?;
                let id = tokenizer.token_to_id(name);
                let id = id.ok_or(format!("`{role}` is `{name}`, which is no token"))?;
                match found {
                    [] => Ok(Some((name.to_string(), id))),
                    found if found.contains(&id) => Ok(None),
                    [other, ..] => Err(format!(
                        "`{key}` is true and `{role}` is `{name}`, but the post_processor of \
                         tokenizer.json adds `{}`; make them agree",
                        spelt(other)
                    )),
                }
            }
        }
    };
    let (bos, eos) = (missing("bos", &before)?, missing("eos", &after)?);
    add(tokenizer, bos, eos)
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
