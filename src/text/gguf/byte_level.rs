//! Byte-level BPE: the ways to split text before its bytes are merged, by llama.cpp's names.

use std::collections::HashSet;

use tokenizers::{
    Tokenizer,
    normalizers::unicode::NFC,
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    tokenizer::SplitDelimiterBehavior,
};

use super::{PRE, Vocabulary};
use crate::{
    error::{Error, Result},
    weights::Metadata,
};

const MERGES: &str = "tokenizer.ggml.merges";

/// What `tokenizer.ggml.pre` names: how text is split before bytes are merged.
pub(super) struct Pre {
    names: &'static [&'static str],
    /// Each splits what those before it have left: what matches, and what lies between, apart.
    splits: &'static [&'static str],
    /// Text is brought to Unicode's form C first.
    nfc: bool,
    /// A piece that is a token as a whole is not put together by merges.
    ignore_merges: bool,
    /// A beginning-of-sequence token comes first unless a key says otherwise.
    pub(super) add_bos: bool,
}

/// Contractions, words and numbers as GPT-2 splits them.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3: numbers in groups of three digits.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2: digit by digit.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's Tekken: words break where a lower-case letter is followed by a capital.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen3.5: a letter keeps the marks on it.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o, and Llama 4: as Tekken, with contractions at the end of words and groups of digits.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Seed-Coder: a line break after punctuation stands alone.
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
/// DeepSeek 3, after digits and Chinese and Japanese are apart.
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

const PLAIN: Pre =
    Pre { names: &[], splits: &[], nfc: false, ignore_merges: false, add_bos: false };

static PRES: [Pre; 13] = [
    Pre { names: &["qwen2"], splits: &[QWEN2], nfc: true, ..PLAIN },
    Pre { names: &["qwen35"], splits: &[QWEN35], nfc: true, ..PLAIN },
    Pre {
        names: &["deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "solar-open"],
        splits: &[QWEN2],
        ..PLAIN
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"],
        splits: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Pre { names: &["smaug-bpe", "dbrx"], splits: &[LLAMA3], ..PLAIN },
    Pre { names: &["tekken"], splits: &[TEKKEN], ignore_merges: true, add_bos: true, ..PLAIN },
    Pre { names: &["gpt-4o", "llama4", "kanana2"], splits: &[GPT4O], ..PLAIN },
    Pre { names: &["seed-coder"], splits: &[SEED_CODER], ..PLAIN },
    Pre {
        names: &["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"],
        splits: &[r"\p{N}", GPT2],
        ..PLAIN
    },
    Pre {
        names: &[
            "gpt-2", "phi-2", "mpt", "olmo", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion",
        ],
        splits: &[GPT2],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-v3", "hunyuan-dense"],
        splits: &[r"\p{N}{1,3}", "[一-龥\u{3040}-ゟ゠-ヿ]+", DEEPSEEK3],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-coder"],
        splits: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u{800}-一가-\u{d7ff}]+", r"\p{N}"],
        ..PLAIN
    },
    // llama.cpp's own, for files whose converter knew no better.
    Pre {
        names: &["default"],
        splits: &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ..PLAIN
    },
];

impl Pre {
    /// The one that the flag `--pretokenizer` names, else the metadata.
    pub(super) fn of(metadata: &Metadata, flag: Option<&str>) -> Result<&'static Self> {
        const FLAG: &str = "--pretokenizer";
        let known = || {
            let names: Vec<&str> = PRES.iter().flat_map(|pre| pre.names).copied().collect();
            names.join(", ")
        };
        let named = |name: &str| PRES.iter().find(|pre| pre.names.contains(&name));
        if let Some(name) = flag {
            let unknown = || Error::flag(FLAG, format!("`{name}` is unknown; known: {}", known()));
            return named(name).ok_or_else(|| unknown().into());
        }
        let Some(name) = metadata.text(PRE)? else {
            let why = format!(
                "is missing, so how text is to be split is unknown; convert the model again, with a \
                 newer llama.cpp, or name it with {FLAG}"
            );
            return Err(metadata.bad(PRE, why));
        };
        named(name).ok_or_else(|| {
            let why = format!("is `{name}`; supported are {}; {FLAG} names one instead", known());
            metadata.bad(PRE, why)
        })
    }

    /// The tokenizer that merges what this has split.
    pub(super) fn tokenizer(
        &self,
        metadata: &Metadata,
        vocabulary: &Vocabulary,
    ) -> Result<Tokenizer> {
        let merges = metadata.texts(MERGES)?.ok_or_else(|| metadata.missing(MERGES))?;
        let known: HashSet<&str> = vocabulary.tokens.iter().copied().collect();
        let pair = |merge: &str| {
            let (a, b) = merge.split_once(' ')?;
            // The library takes it for granted.
            let tokens = [a, b, &[a, b].concat()].iter().all(|token| known.contains(token));
            tokens.then(|| (a.to_string(), b.to_string()))
        };
        let pair = |merge: &str| {
            let why =
                || format!("has the merge `{merge}`, which is no pair of tokens that make one");
            pair(merge).ok_or_else(|| metadata.bad(MERGES, why()))
        };
        let merges = merges.into_iter().map(pair).collect::<Result<_>>()?;
        let build = || -> tokenizers::Result<Tokenizer> {
            let model = vocabulary.merging(merges).ignore_merges(self.ignore_merges).build()?;
            let mut tokenizer = vocabulary.tokenizer(model)?;
            if self.nfc {
                tokenizer.with_normalizer(Some(NFC))?;
            }
            tokenizer.with_pre_tokenizer(Some(self.splits()?));
            tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
            Ok(tokenizer)
        };
        build().map_err(|e| super::unusable(metadata, &e))
    }

    fn splits(&self) -> tokenizers::Result<Sequence> {
        let split = |regex: &&str| -> tokenizers::Result<PreTokenizerWrapper> {
            let pattern = SplitPattern::Regex(regex.to_string());
            Ok(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into())
        };
        let bytes = ByteLevel::new(false, false, false).into();
        let splits: tokenizers::Result<Vec<_>> =
            self.splits.iter().map(split).chain([Ok(bytes)]).collect();
        Ok(Sequence::new(splits?))
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::tokenizer::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    fn pieces(name: &str, text: &str) -> Vec<String> {
        let pre = PRES.iter().find(|pre| pre.names.contains(&name)).unwrap();
        let mut text = PreTokenizedString::from(text);
        pre.splits().unwrap().pre_tokenize(&mut text).unwrap();
        let pieces = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let spaces = |piece: &str| piece.replace('Ġ', " ").replace('Ċ', "\n");
        pieces.into_iter().map(|(piece, ..)| spaces(piece)).collect()
    }

    #[test]
    fn text_is_split_as_the_families_split_it() {
        let text = "I'Ve  1234 ab\n\n x=$9";
        for (name, expected) in [
            (
                "qwen2",
                &["I", "'Ve", " ", " ", "1", "2", "3", "4", " ab", "\n\n", " x", "=$", "9"][..],
            ),
            ("llama-bpe", &["I", "'Ve", " ", " ", "123", "4", " ab", "\n\n", " x", "=$", "9"]),
            ("smollm", &["I", "'", "Ve", "  ", "1", "2", "3", "4", " ab", "\n\n", " x", "=$", "9"]),
            ("gpt-2", &["I", "'", "Ve", " ", " 1234", " ab", "\n\n", " x", "=$", "9"]),
            ("default", &["I", "'", "Ve", " ", " ", "123", "4", " ab", "\n\n", " x", "=$", "9"]),
            ("tekken", &["I", "'Ve", " ", " ", "1", "2", "3", "4", " ab", "\n\n", " x", "=$", "9"]),
        ] {
            assert_eq!(pieces(name, text), expected, "{name}");
        }
        assert_eq!(pieces("tekken", "camelCase"), ["camel", "Case"]);
    }
}
