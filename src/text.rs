//! The text side of a checkpoint: tokenizer, end-of-sequence tokens, chat template.

mod added;
mod chat;
mod framing;
mod gguf;
mod special;
mod stand_in;
mod stream;
mod suggested;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
};

use serde_json::Value as Json;
use tokenizers::Tokenizer;

use crate::{
    error::{Error, Result},
    input::{read_bytes, read_text},
    target::Target,
    weights::Metadata,
};

use self::{chat::Templates, special::Special};
pub use self::{
    chat::{Chat, Message},
    stream::Stream,
    suggested::Suggested,
};

/// Tokens that end a turn or a text, whatever the model: a GGUF has room for fewer than a
/// checkpoint may have.
const END_OF_TURN: [&str; 6] =
    ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>"];

/// Turns text into token ids and back as the checkpoint was trained to.
#[derive(Debug)]
pub struct Text {
    model: Model,
    chat: Templates,
    ends: Ends,
    suggested: Option<Suggested>,
    vocab: usize,
}

/// The tokens that end something.
#[derive(Debug, Default, Hash)]
struct Ends {
    /// Those that end a generation.
    generation: Vec<u32>,
    /// The one that ends a document, as trainers put it: the tokenizer's own `eos_token`.
    document: Option<u32>,
}

#[derive(Debug)]
enum Model {
    Tokenizer(Box<Tokenizer>),
    /// One token a byte: for weights that have no tokenizer.
    Bytes,
}

impl Text {
    /// The stand-in for a model of `vocab` tokens that has no tokenizer: one token a byte (its
    /// value, modulo a `vocab` under 256), no end of sequence, and a chat that is the prompt.
    pub fn bytes(vocab: usize) -> Self {
        let (model, chat) = (Model::Bytes, Templates::default());
        Self { model, chat, ends: Ends::default(), suggested: None, vocab }
    }

    /// Reads tokenizer.json and, where there are any, tokenizer_config.json,
    /// special_tokens_map.json, generation_config.json and chat templates. `vocab` is the model's, in
    /// tokens.
    ///
    /// # Errors
    /// No tokenizer.json, a malformed file, or more tokens than the model has.
    pub fn from_directory(dir: &Path, vocab: usize) -> Result<Self> {
        let file = dir.join("tokenizer.json");
        let fail = |why: String| Error::File { file: file.clone(), why };
        if !file.is_file() {
            return Err(fail("no such file; the model has no tokenizer without it".into()).into());
        }
        let bytes = read_bytes(&file).map_err(|e| fail(e.to_string()))?;
        let mut tokenizer = Tokenizer::from_bytes(bytes)
            .map_err(|e| fail(format!("not a tokenizer: {}", first_line(&e))))?;
        // Lengths are ours to decide.
        let _ = tokenizer.with_truncation(None);
        tokenizer.with_padding(None);

        let config_file = dir.join("tokenizer_config.json");
        let mut config = read_json(&config_file)?.unwrap_or_default();
        special::merge_map(dir, &mut config)?;
        let special = Special::of(&config)
            .and_then(|special| {
                added::recognise(&mut tokenizer, &config, &special)?;
                framing::complete(&mut tokenizer, &config)?;
                Ok(special)
            })
            .map_err(|why| Error::File { file: config_file, why })?;
        let eos_token = config.get("eos_token").and_then(token_text);
        let document = eos_token.and_then(|token| tokenizer.token_to_id(token));
        let generation = eos_ids(dir)?.unwrap_or_else(|| document.into_iter().collect());
        let ends = Ends { generation, document };
        let chat = Templates::from_directory(dir, &config, special.texts())?;
        let suggested = Suggested::of_directory(dir)?;
        Ok(Self { chat, suggested, ..Self::new(tokenizer, ends, vocab, &file)? })
    }

    /// Builds the tokenizer from a GGUF's metadata; `pretokenizer` says how text is split first, by
    /// llama.cpp's names, in place of the metadata.
    ///
    /// # Errors
    /// Metadata that does not describe a tokenizer that is supported, or more tokens than the
    /// model has.
    pub(crate) fn from_gguf(
        metadata: &Metadata,
        pretokenizer: Option<&str>,
        vocab: usize,
    ) -> Result<Self> {
        let (tokenizer, roles) = gguf::tokenizer(metadata, pretokenizer)?;
        // A file says which token ends a text, but not always which end a turn.
        let turns = ["eot", "eom"].map(|role| gguf::token_id(metadata, role));
        let named = END_OF_TURN.map(|token| tokenizer.token_to_id(token));
        let mut generation = vec![];
        for id in [Ok(roles.eos)].into_iter().chain(turns).chain(named.map(Ok)) {
            generation.extend(id?.filter(|id| !generation.contains(id)));
        }
        let chat = Templates::from_gguf(metadata, gguf::special(metadata, &tokenizer, &roles)?)?;
        let suggested = Suggested::of_gguf(metadata)?;
        let ends = Ends { generation, document: roles.eos };
        Ok(Self { chat, suggested, ..Self::new(tokenizer, ends, vocab, metadata.file())? })
    }

    fn new(tokenizer: Tokenizer, ends: Ends, vocab: usize, file: &Path) -> Result<Self> {
        // Tokens beyond the model's may be added to a vocabulary that it covers, for other models.
        let tokens = tokenizer.get_vocab_size(false);
        if tokens > vocab {
            let why = format!("has {tokens} tokens, the model only {vocab}");
            return Err(Error::File { file: file.into(), why }.into());
        }
        let model = Model::Tokenizer(Box::new(tokenizer));
        Ok(Self { model, chat: Templates::default(), ends, suggested: None, vocab })
    }

    /// Writes tokenizer.json and what else [`Text::from_directory`] reads to `dir`; nothing for a
    /// stand-in of fewer tokens than there are bytes.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let json = match &self.model {
            Model::Tokenizer(tokenizer) => {
                tokenizer.to_string(false).map_err(|e| anyhow::anyhow!("tokenizer: {e}"))?
            }
            Model::Bytes => match stand_in::tokenizer_json(self.vocab) {
                Some(json) => json,
                None => return Ok(()),
            },
        };
        let write = |name: &str, text: String| {
            Target::open(&dir.join(name))?.write_with(|out| Ok(out.write_all(text.as_bytes())?))
        };
        write("tokenizer.json", json)?;
        let mut suggested = self.suggested.as_ref().map(|s| s.values.clone()).unwrap_or_default();
        suggested.insert("eos_token_id".into(), self.ends.generation.clone().into());
        write("generation_config.json", Json::from(suggested).to_string())?;
        // What goes around a text is in tokenizer.json's post-processor.
        self.chat.save(dir)
    }

    /// Token ids of `text`, a part of a text such as what a chat template makes. Special tokens
    /// spelt out in it are recognised; nothing is added.
    ///
    /// # Errors
    /// Text that the tokenizer cannot take, or with a token that the model does not have.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokens(text, false)
    }

    /// Token ids of `text`, a text of its own: between the tokens that the checkpoint puts around
    /// one, such as the beginning of the sequence.
    ///
    /// # Errors
    /// As [`Text::encode`].
    pub fn encode_raw(&self, text: &str) -> Result<Vec<u32>> {
        self.tokens(text, true)
    }

    /// The same for one document of several: it ends with the tokenizer's end-of-sequence token,
    /// else the first that ends a generation, if there is one.
    ///
    /// # Errors
    /// As [`Text::encode`].
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokens(text, true)?;
        let end = self.ends.document.or(self.ends.generation.first().copied());
        if let Some(end) = end.filter(|end| ids.last() != Some(end)) {
            self.check(end, "ends with")?;
            ids.push(end);
        }
        Ok(ids)
    }

    fn tokens(&self, text: &str, framed: bool) -> Result<Vec<u32>> {
        match &self.model {
            Model::Tokenizer(tokenizer) => {
                let encoding = tokenizer.encode_fast(text, framed).map_err(|e| {
                    Error::Prompt(format!("cannot be tokenized: {}", first_line(&e)))
                })?;
                let ids = encoding.get_ids();
                ids.iter().try_for_each(|id| self.check(*id, "holds"))?;
                Ok(ids.to_vec())
            }
            Model::Bytes => {
                let fold = |byte| (usize::from(byte) % self.vocab.max(1)) as u32;
                Ok(text.bytes().map(fold).collect())
            }
        }
    }

    /// Refuses a token that the model does not have, in a text that `has` it.
    fn check(&self, id: u32, has: &str) -> Result<()> {
        if (id as usize) < self.vocab {
            return Ok(());
        }
        let token = match &self.model {
            Model::Tokenizer(tokenizer) => tokenizer.id_to_token(id),
            Model::Bytes => None,
        };
        let token = token.unwrap_or_else(|| id.to_string());
        let why = format!("{has} `{token}`, a token that the model does not have");
        Err(Error::Prompt(why).into())
    }

    /// Text of `ids`; what is no valid UTF-8 becomes U+FFFD, an id without a token nothing.
    /// `skip_special` leaves out special tokens such as `<|im_end|>`.
    ///
    /// # Errors
    /// A decoder that fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        match &self.model {
            Model::Tokenizer(tokenizer) => tokenizer
                .decode(ids, skip_special)
                .map_err(|e| anyhow::anyhow!("decoding tokens: {}", first_line(&e))),
            Model::Bytes => {
                let mut bytes = vec![];
                for &id in ids {
                    match u8::try_from(id) {
                        Ok(byte) => bytes.push(byte),
                        Err(_) => bytes.extend(format!("<{id}>").into_bytes()),
                    }
                }
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }

    /// Decodes token by token, for output as it is generated.
    pub fn stream(&self, skip_special: bool) -> Stream<'_> {
        Stream::new(self, skip_special)
    }

    /// The checkpoint's chat template applied to one user message, up to where the assistant's
    /// answer begins. Without a `system` message the template's own default applies, if it has
    /// one; a checkpoint without a template gives the message alone (and `system` before it).
    ///
    /// # Errors
    /// A template that is malformed or refuses the messages.
    pub fn chat(&self, system: Option<&str>, user: &str) -> Result<String> {
        if !self.has_chat_template() {
            return Ok(system.map_or(user.into(), |system| format!("{system}\n{user}")));
        }
        let system = system.map(|text| Message::new("system", text));
        let messages: Vec<Message> =
            system.into_iter().chain([Message::new("user", user)]).collect();
        self.render(&Chat::new(messages), true)
    }

    /// The checkpoint's chat template applied to a conversation; with `generation_prompt`, up to
    /// where the assistant's next answer begins.
    ///
    /// # Errors
    /// No template, or one that is malformed or refuses the conversation.
    pub fn render(&self, chat: &Chat, generation_prompt: bool) -> Result<String> {
        self.chat.render(chat, generation_prompt)
    }

    /// Where in the text of a whole conversation, in bytes, what its template's generation blocks give
    /// lies; `None` if the template has no such blocks.
    ///
    /// # Errors
    /// As [`render`](Self::render), and a template that works on what such a block gives.
    pub fn generated(&self, chat: &Chat) -> Result<Option<Vec<std::ops::Range<usize>>>> {
        self.chat.generated(chat)
    }

    /// Takes another chat template than conversations would get: the checkpoint's of this name,
    /// else that in the file of this name.
    ///
    /// # Errors
    /// Neither a name nor a file that can be read.
    pub fn choose_template(&mut self, name: &str) -> Result<()> {
        self.chat.choose(name)
    }

    /// Whether there is a chat template.
    pub fn has_chat_template(&self) -> bool {
        !self.chat.is_empty()
    }

    /// The tokens that end a generation.
    pub fn eos_ids(&self) -> &[u32] {
        &self.ends.generation
    }

    /// What the checkpoint suggests for choosing tokens, if it says anything.
    pub fn suggested(&self) -> Option<&Suggested> {
        self.suggested.as_ref()
    }

    /// A number that tells checkpoints apart whose tokens of some text, or of some conversation,
    /// may differ. The same from run to run of one build.
    ///
    /// # Errors
    /// A tokenizer that cannot be written down.
    pub fn fingerprint(&self) -> Result<u64> {
        let tokenizer = match &self.model {
            Model::Tokenizer(tokenizer) => Some(
                tokenizer
                    .to_string(false)
                    .map_err(|e| anyhow::anyhow!("writing the tokenizer: {}", first_line(&e)))?,
            ),
            Model::Bytes => None,
        };
        let mut hasher = DefaultHasher::new();
        (tokenizer, &self.chat, &self.ends, self.vocab).hash(&mut hasher);
        Ok(hasher.finish())
    }

    /// What the reports call it: the checkpoint's tokenizer, or the byte-level stand-in.
    pub fn is_stand_in(&self) -> bool {
        matches!(self.model, Model::Bytes)
    }
}

/// The end-of-sequence ids that generation_config.json, else config.json, names.
fn eos_ids(dir: &Path) -> Result<Option<Vec<u32>>> {
    for name in ["generation_config.json", "config.json"] {
        let file = dir.join(name);
        let Some(json) = read_json(&file)? else { continue };
        let ids = match json.get("eos_token_id") {
            None | Some(Json::Null) => continue,
            Some(Json::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
        };
        let ids = ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
        let why = || "`eos_token_id` is neither a token id nor a list of them".to_string();
        let ids: Option<Vec<u32>> = ids.collect();
        return ids.map(Some).ok_or_else(|| Error::File { file, why: why() }.into());
    }
    Ok(None)
}

/// A JSON file's value; `None` if there is no such file.
fn read_json(file: &Path) -> Result<Option<Json>> {
    let fail = |why: String| Error::File { file: file.into(), why };
    if !file.is_file() {
        return Ok(None);
    }
    let text = read_text(file).map_err(|e| fail(e.to_string()))?;
    let json = serde_json::from_str(&text).map_err(|e| fail(format!("not valid JSON: {e}")))?;
    Ok(Some(json))
}

/// A token as tokenizer_config.json spells it: a string, or an object with its content.
fn token_text(json: &Json) -> Option<&str> {
    json.as_str().or_else(|| json.get("content")?.as_str())
}

/// A library's message, cut to one line.
fn first_line(error: &impl ToString) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}
