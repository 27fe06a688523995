//! The tokenizer that a GGUF's metadata describes: byte-level BPE with one of several ways to
//! split text first, or SentencePiece's BPE, whose merges follow from the tokens' scores.

mod byte_level;
mod sentence_piece;

use std::collections::{BTreeMap, HashSet};

use tokenizers::{
    AddedToken, Tokenizer,
    models::bpe::{BPE, BpeBuilder, Vocab},
};

use self::byte_level::Pre;
use super::{first_line, framing};
use crate::{
    error::{Error, Result},
    weights::Metadata,
};

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const PRE: &str = "tokenizer.ggml.pre";
/// What templates call the tokens of roles that no text asks for; llama.cpp spells one so.
const NAMED: [(&str, &str); 5] = [
    ("unk_token", "unknown"),
    ("sep_token", "seperator"),
    ("pad_token", "padding"),
    ("cls_token", "cls"),
    ("mask_token", "mask"),
];

/// What a token is, as `tokenizer.ggml.token_type` numbers it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Put together by merges.
    Normal,
    /// Recognised where it is spelt out, and no text: `<|im_start|>`.
    Control,
    /// Recognised where it is spelt out, and text like any other: `<tool_call>`.
    UserDefined,
    /// Padding of the vocabulary.
    Unused,
    /// One byte, of a character that is no token: `<0x0A>`.
    Byte,
}

/// The tokens of a file: its strings, and what each is.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &Metadata<'a>) -> Result<Self> {
        let tokens = metadata.texts(TOKENS)?.ok_or_else(|| metadata.missing(TOKENS))?;
        let types = metadata.integers(TYPES)?.ok_or_else(|| metadata.missing(TYPES))?;
        if types.len() != tokens.len() {
            let why = format!("has {} entries for {} tokens", types.len(), tokens.len());
            return Err(metadata.bad(TYPES, why));
        }
        let mut seen = HashSet::new();
        if let Some(twice) = tokens.iter().find(|token| !seen.insert(**token)) {
            return Err(metadata.bad(TOKENS, format!("has `{twice}` twice")));
        }
        let kind = |kind: usize| match kind {
            1 => Ok(Kind::Normal),
            2 | 3 => Ok(Kind::Control),
            4 => Ok(Kind::UserDefined),
            5 => Ok(Kind::Unused),
            6 => Ok(Kind::Byte),
            other => Err(metadata.bad(TYPES, format!("has a token of the unknown type {other}"))),
        };
        let kinds = types.into_iter().map(kind).collect::<Result<_>>()?;
        Ok(Self { tokens, kinds })
    }

    /// The ids and texts of the tokens of one kind.
    fn of(&self, kind: Kind) -> impl Iterator<Item = (u32, &'a str)> {
        let tokens = (0..).zip(self.tokens.iter().copied());
        tokens.zip(&self.kinds).filter_map(move |(token, k)| (*k == kind).then_some(token))
    }

    /// A model of these tokens that merges those pairs.
    fn merging(&self, pairs: Vec<(String, String)>) -> BpeBuilder {
        let ids: Vocab = self.tokens.iter().map(|token| token.to_string()).zip(0..).collect();
        BpeBuilder::new().vocab_and_merges(ids, pairs)
    }

    /// A tokenizer of that model, with the tokens that are recognised whole.
    fn tokenizer(&self, model: BPE) -> tokenizers::Result<Tokenizer> {
        let mut tokenizer = Tokenizer::new(model);
        let control = self.of(Kind::Control).map(|(_, token)| AddedToken::from(token, true));
        tokenizer.add_special_tokens(control)?;
        let text = |(_, token)| AddedToken::from(token, false).normalized(false);
        tokenizer.add_tokens(self.of(Kind::UserDefined).map(text))?;
        Ok(tokenizer)
    }
}

/// The ids of the tokens that the metadata gives a role, and whether encoding adds them.
pub(super) struct Roles {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
}

impl Roles {
    /// What the keys say, and the kind of tokenizer where they are silent.
    fn read(
        metadata: &Metadata,
        bos: Option<u32>,
        eos: Option<u32>,
        add_bos: bool,
    ) -> Result<Self> {
        let flag = |name: &str| metadata.flag(&format!("tokenizer.ggml.add_{name}"));
        if flag("sep_token")? == Some(true) {
            let why = "is true, which is not supported";
            return Err(metadata.bad("tokenizer.ggml.add_sep_token", why));
        }
        Ok(Self {
            bos: token_id(metadata, "bos")?.or(bos),
            eos: token_id(metadata, "eos")?.or(eos),
            add_bos: flag("bos_token")?.unwrap_or(add_bos),
            add_eos: flag("eos_token")?.unwrap_or(false),
        })
    }

    /// Encoding with special tokens puts those around the text that the file asks for.
    fn add_to(&self, tokenizer: &mut Tokenizer, metadata: &Metadata) -> Result<()> {
        let added = |wanted: bool, id: Option<u32>, role: &str| {
            let key = format!("tokenizer.ggml.{role}_token_id");
            let asks = format!("tokenizer.ggml.add_{role}_token");
            // Where the file is silent, it is the kind of pre-tokenizer that has the token added.
            let asks = if metadata.flag(&asks)?.is_some() { &asks } else { PRE };
            let what = if id.is_some() { "names no token" } else { "is missing" };
            let none = || metadata.bad(&key, format!("{what}, and `{asks}` asks for that token"));
            let id = id.filter(|id| tokenizer.id_to_token(*id).is_some());
            wanted.then(|| id.ok_or_else(none)).transpose()
        };
        let before: Vec<u32> = added(self.add_bos, self.bos, "bos")?.into_iter().collect();
        let after: Vec<u32> = added(self.add_eos, self.eos, "eos")?.into_iter().collect();
        framing::surround(tokenizer, &before, &after).map_err(|why| metadata.bad(MODEL, why))
    }
}

/// The id that the metadata gives a role.
pub(super) fn token_id(metadata: &Metadata, role: &str) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{role}_token_id");
    let id = metadata.integer(&key)?.map(u32::try_from).transpose();
    id.map_err(|_| metadata.bad(&key, "is no token's id"))
}

/// The special tokens that templates know by name, of those that the metadata gives a role.
pub(super) fn special(
    metadata: &Metadata,
    tokenizer: &Tokenizer,
    roles: &Roles,
) -> Result<BTreeMap<String, String>> {
    let mut ids = vec![("bos_token", roles.bos), ("eos_token", roles.eos)];
    for (name, role) in NAMED {
        ids.push((name, token_id(metadata, role)?));
    }
    let text = |(name, id): (&str, Option<u32>)| Some((name.into(), tokenizer.id_to_token(id?)?));
    Ok(ids.into_iter().filter_map(text).collect())
}

/// The tokenizer, and the roles of its tokens; `pretokenizer` is `--pretokenizer`.
pub(super) fn tokenizer(
    metadata: &Metadata,
    pretokenizer: Option<&str>,
) -> Result<(Tokenizer, Roles)> {
    let kind = metadata.text(MODEL)?.ok_or_else(|| metadata.missing(MODEL))?;
    let vocabulary = Vocabulary::read(metadata)?;
    let (mut tokenizer, roles) = match kind {
        "gpt2" => {
            let pre = Pre::of(metadata, pretokenizer)?;
            let roles = Roles::read(metadata, None, None, pre.add_bos)?;
            (pre.tokenizer(metadata, &vocabulary)?, roles)
        }
        // SentencePiece's own numbering, where the file is silent.
        "llama" => {
            if let Some(name) = pretokenizer {
                let why = format!(
                    "{name}: {} is SentencePiece's, with no pre-tokenizer",
                    metadata.origin()
                );
                return Err(Error::flag("--pretokenizer", why).into());
            }
            let roles = Roles::read(metadata, Some(1), Some(2), true)?;
            (sentence_piece::tokenizer(metadata, &vocabulary)?, roles)
        }
        other => {
            let why = format!("is `{other}`; supported are gpt2 and llama");
            return Err(metadata.bad(MODEL, why));
        }
    };
    roles.add_to(&mut tokenizer, metadata)?;
    Ok((tokenizer, roles))
}

/// An error of the library's, for metadata that it makes no tokenizer of.
fn unusable(metadata: &Metadata, error: &tokenizers::Error) -> anyhow::Error {
    metadata.bad(MODEL, format!("describes no usable tokenizer: {}", first_line(error)))
}
