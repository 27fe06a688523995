//! SentencePiece's BPE: pieces are merged in the order of their scores, a space is a letter of its
//! own, and what is no token falls back to bytes.

use std::collections::HashMap;

use tokenizers::{
    Tokenizer,
    decoders::{
        DecoderWrapper, byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders,
        strip::Strip,
    },
    normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers},
};

use super::{Kind, TYPES, Vocabulary};
use crate::{error::Result, weights::Metadata};

const SCORES: &str = "tokenizer.ggml.scores";
/// What a space is written as.
const SPACE: &str = "▁";

/// The tokenizer of the metadata's tokens and scores.
pub(super) fn tokenizer(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Tokenizer> {
    const PREFIX: &str = "tokenizer.ggml.add_space_prefix";
    const TRIM: &str = "tokenizer.ggml.remove_extra_whitespaces";
    const CHARACTERS: &str = "tokenizer.ggml.precompiled_charsmap";
    let space_first = metadata.flag(PREFIX)?.unwrap_or(true);
    metadata.refuse_unless(TRIM, 0.0)?;
    metadata.refuse_unless(CHARACTERS, 0.0)?;

    let scores = metadata.floats(SCORES)?.ok_or_else(|| metadata.missing(SCORES))?;
    if scores.len() != vocabulary.tokens.len() {
        let why = format!("has {} entries for {} tokens", scores.len(), vocabulary.tokens.len());
        return Err(metadata.bad(SCORES, why));
    }
    let mut normal = vocabulary.of(Kind::Normal).map(|(id, _)| scores[id as usize]);
    let first = normal.next();
    if normal.all(|score| Some(score) == first) {
        let why = "ranks no token above another; convert the model again, from tokenizer.model";
        return Err(metadata.bad(SCORES, why));
    }
    // With all 256 no text is unknown.
    let bytes = vocabulary.of(Kind::Byte).count();
    if bytes != 256 {
        return Err(metadata.bad(TYPES, format!("marks {bytes} tokens as bytes, not 256")));
    }
    let build = || -> tokenizers::Result<Tokenizer> {
        let merges = merges(vocabulary, &scores);
        let model = vocabulary.merging(merges).byte_fallback(true).build()?;
        let mut tokenizer = vocabulary.tokenizer(model)?;
        let spaces: NormalizerWrapper = Replace::new(" ", SPACE)?.into();
        let prefix = space_first.then(|| Prepend::new(SPACE.into()).into());
        let normalizers = prefix.into_iter().chain([spaces]).collect();
        tokenizer.with_normalizer(Some(Normalizers::new(normalizers)))?;
        let decoders: [DecoderWrapper; 3] =
            [Replace::new(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
        let strip = space_first.then(|| Strip::new(' ', 1, 0).into());
        tokenizer.with_decoder(Some(Decoders::new(decoders.into_iter().chain(strip).collect())));
        Ok(tokenizer)
    };
    build().map_err(|e| super::unusable(metadata, &e))
}

/// The pairs that are merged, first the one that is merged first.
///
/// SentencePiece merges any two neighbours that make a token, the token of the highest score
/// first. The pairs are all ways to part a token in two; those of one token go by the longer
/// first part, as transformers orders them.
fn merges(vocabulary: &Vocabulary, scores: &[f64]) -> Vec<(String, String)> {
    let ids: HashMap<&str, u32> = vocabulary.of(Kind::Normal).map(|(id, t)| (t, id)).collect();
    let mut tokens: Vec<(u32, &str)> = vocabulary.of(Kind::Normal).collect();
    tokens.sort_by(|(a, _), (b, _)| scores[*b as usize].total_cmp(&scores[*a as usize]));
    let halves = |token: &str| {
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let pairs = cuts.filter(|(a, b)| ids.contains_key(a) && ids.contains_key(b));
        pairs.map(|(a, b)| (a.to_string(), b.to_string())).collect::<Vec<_>>()
    };
    tokens.into_iter().flat_map(|(_, token)| halves(token).into_iter().rev()).collect()
}
