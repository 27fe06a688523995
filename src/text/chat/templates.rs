//! The templates that a checkpoint brings, by name, and which one is taken.

use std::{
    collections::BTreeMap,
    fs,
    hash::{Hash, Hasher},
    ops::Range,
    path::Path,
};

use serde_json::Value as Json;

use super::{Chat, clock, template::Template};
use crate::{
    error::{Error, Result},
    input::read_text,
    target::Target,
    weights::Metadata,
};

/// The name of the template that is taken where none is asked for.
const DEFAULT: &str = "default";
/// The name of the one that is taken where there are tools.
const TOOLS: &str = "tool_use";
/// The template beside tokenizer.json, and the folder of its named ones.
const FILE: &str = "chat_template.jinja";
const FOLDER: &str = "additional_chat_templates";

/// Templates by name, and the special tokens that they may ask for.
#[derive(Debug, Default)]
pub(in crate::text) struct Templates {
    named: BTreeMap<String, Template>,
    tokens: BTreeMap<String, String>,
    /// The one that was asked for.
    chosen: Option<String>,
}

impl Hash for Templates {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.named, &self.tokens, &self.chosen).hash(state);
        // What a template writes of today is another text tomorrow.
        let dated = self.named.values().any(Template::is_dated);
        dated.then(|| clock::now().date()).hash(state);
    }
}

impl Templates {
    /// Those of a directory whose tokenizer_config.json holds `config`, as transformers finds them:
    /// chat_template.jinja and additional_chat_templates/ take the place of the config's. A
    /// processor's chat_template.json is read where there are no others. `tokens` are the special
    /// tokens by their names, which every template is given.
    ///
    /// # Errors
    /// A file that cannot be read, or that is no template.
    pub(in crate::text) fn from_directory(
        dir: &Path,
        config: &Json,
        tokens: impl Iterator<Item = (String, String)>,
    ) -> Result<Self> {
        let mut sources = files(dir)?;
        if sources.is_empty() {
            sources = listed(config, &dir.join("tokenizer_config.json"))?;
        }
        let processor = dir.join("chat_template.json");
        if sources.is_empty() && processor.is_file() {
            let fail = |why: String| Error::File { file: processor.clone(), why };
            let json: Json = serde_json::from_str(&read(&processor)?)
                .map_err(|e| fail(format!("not valid JSON: {e}")))?;
            sources = listed(&json, &processor)?;
            if sources.is_empty() {
                return Err(fail("has no `chat_template`".into()).into());
            }
        }
        Ok(Self::new(sources, tokens.collect()))
    }

    /// Those of a GGUF: `tokenizer.chat_template`, and `tokenizer.chat_template.NAME`.
    ///
    /// # Errors
    /// A key of another type.
    pub(in crate::text) fn from_gguf(
        metadata: &Metadata,
        tokens: BTreeMap<String, String>,
    ) -> Result<Self> {
        const KEY: &str = "tokenizer.chat_template";
        let mut sources = vec![];
        for key in metadata.keys().filter(|key| key.starts_with(KEY)) {
            let name = match key.strip_prefix(KEY) {
                Some("") => DEFAULT,
                Some(rest) => match rest.strip_prefix('.') {
                    Some(name) => name,
                    None => continue,
                },
                None => continue,
            };
            sources.extend(metadata.text(key)?.map(|text| (name.to_string(), text.to_string())));
        }
        Ok(Self::new(sources, tokens))
    }

    fn new(sources: Vec<(String, String)>, tokens: BTreeMap<String, String>) -> Self {
        let named =
            sources.into_iter().map(|(name, source)| (name, Template::new(source))).collect();
        Self { named, tokens, chosen: None }
    }

    pub(in crate::text) fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Takes the template of this name, else of this file, for every conversation.
    ///
    /// # Errors
    /// Neither a name nor a file that can be read.
    pub(in crate::text) fn choose(&mut self, name: &str) -> Result<()> {
        if !self.named.contains_key(name) {
            let file = Path::new(name);
            if !file.extension().is_some_and(|e| e == "jinja" || e == "j2") && !file.is_file() {
                let why = format!(
                    "the checkpoint has no chat template `{name}`; it has {}. Or give a .jinja file",
                    self.names()
                );
                return Err(Error::flag("--template", why).into());
            }
            self.named.insert(name.into(), Template::new(read(file)?));
        }
        self.chosen = Some(name.into());
        Ok(())
    }

    /// What there is, for a message.
    fn names(&self) -> String {
        let names: Vec<String> = self.named.keys().map(|name| format!("`{name}`")).collect();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    }

    /// The text of `chat`; with `generation_prompt`, up to where the next answer begins.
    ///
    /// # Errors
    /// No template for it, or one that is malformed or refuses it.
    pub(in crate::text) fn render(&self, chat: &Chat, generation_prompt: bool) -> Result<String> {
        self.template(chat.tools.is_some())?.render(chat, &self.tokens, generation_prompt)
    }

    /// Where in the text of `chat` its template's generation blocks are, if it has any.
    ///
    /// # Errors
    /// As [`render`](Self::render), and a template that works on what such a block gives.
    pub(in crate::text) fn generated(&self, chat: &Chat) -> Result<Option<Vec<Range<usize>>>> {
        self.template(chat.tools.is_some())?.generated(chat, &self.tokens)
    }

    /// The one that was chosen; where there are tools the one for them; the default.
    fn template(&self, tools: bool) -> Result<&Template> {
        if self.named.is_empty() {
            return Err(Error::Prompt("the model has no chat template".into()).into());
        }
        let chosen = self.chosen.as_ref().and_then(|name| self.named.get(name));
        let of_tools = || self.named.get(TOOLS).filter(|_| tools);
        chosen.or_else(of_tools).or_else(|| self.named.get(DEFAULT)).ok_or_else(|| {
            let why =
                format!("none of the chat templates is the default: give one of {}", self.names());
            Error::flag("--template", why).into()
        })
    }

    /// Writes what [`from_directory`](Self::from_directory) reads.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub(in crate::text) fn save(&self, dir: &Path) -> Result<()> {
        let write = |name: &Path, text: &str| {
            Target::open(&dir.join(name))?.write_with(|out| Ok(out.write_all(text.as_bytes())?))
        };
        let tokens = serde_json::to_string(&self.tokens)?;
        write(Path::new("tokenizer_config.json"), &tokens)?;
        for (name, template) in &self.named {
            // A file that was chosen stays where it is.
            let bad = name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.');
            if name == DEFAULT {
                write(Path::new(FILE), &template.source)?;
            } else if !bad {
                let folder = dir.join(FOLDER);
                fs::create_dir_all(&folder)
                    .map_err(|e| Error::File { file: folder.clone(), why: e.to_string() })?;
                write(&Path::new(FOLDER).join(format!("{name}.jinja")), &template.source)?;
            }
        }
        Ok(())
    }
}

/// The template files of a directory, by name.
fn files(dir: &Path) -> Result<Vec<(String, String)>> {
    let mut sources = vec![];
    if dir.join(FILE).is_file() {
        sources.push((DEFAULT.to_string(), read(&dir.join(FILE))?));
    }
    let folder = dir.join(FOLDER);
    if !folder.is_dir() {
        return Ok(sources);
    }
    let fail = |e: std::io::Error| Error::File { file: folder.clone(), why: e.to_string() };
    for entry in fs::read_dir(&folder).map_err(fail)? {
        let file = entry.map_err(fail)?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(name) = name.strip_suffix(".jinja") {
            sources.push((name.to_string(), read(&file)?));
        }
    }
    Ok(sources)
}

/// What a JSON file's `chat_template` holds: a template, a list of named ones, or an object of them.
fn listed(json: &Json, file: &Path) -> Result<Vec<(String, String)>> {
    let fail = |what: &str| {
        let why = format!("`chat_template`{what} is no template: a string");
        Error::File { file: file.into(), why }
    };
    let text =
        |json: &Json, what: &str| json.as_str().map(str::to_string).ok_or_else(|| fail(what));
    match json.get("chat_template") {
        None | Some(Json::Null) => Ok(vec![]),
        Some(Json::Array(list)) => {
            let named = list.iter().enumerate().map(|(index, entry)| {
                let part = |key: &str| {
                    let what = format!("[{index}].{key}");
                    text(entry.get(key).unwrap_or(&Json::Null), &what)
                };
                Ok((part("name")?, part("template")?))
            });
            named.collect()
        }
        Some(Json::Object(named)) => named
            .iter()
            .map(|(name, source)| Ok((name.clone(), text(source, &format!(".{name}"))?)))
            .collect(),
        Some(one) => Ok(vec![(DEFAULT.into(), text(one, "")?)]),
    }
}

/// A template file's text.
fn read(file: &Path) -> Result<String> {
    read_text(file).map_err(|e| Error::File { file: file.into(), why: e.to_string() }.into())
}
