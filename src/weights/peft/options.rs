//! adapter_config.json, read as PEFT reads it.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Map, Value};

use super::{
    keys::{Fate, fate},
    modules::{ByPattern, Module, Names, Pattern, is_end, modules},
};
use crate::{
    config::{Ignored, LoraConfig, ModelConfig, Projection, Site},
    error::{Error, Result},
};

/// The file's keys, checked one by one.
pub(super) struct Options {
    file: PathBuf,
    json: Map<String, Value>,
    ranks: Vec<(String, Value)>,
    alphas: Vec<(String, Value)>,
    /// What is in the file and changes nothing, each with its reason.
    pub ignored: Vec<Ignored>,
}

/// Keys of which the order counts.
#[derive(Deserialize)]
struct Ordered {
    #[serde(default)]
    rank_pattern: Option<Pairs>,
    #[serde(default)]
    alpha_pattern: Option<Pairs>,
}

/// An object in the file's order.
#[derive(Default)]
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of names and numbers")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Pairs, A::Error> {
                let mut pairs = vec![];
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

impl Options {
    /// Reads the file and refuses what this program does not compute.
    pub fn read(file: &Path) -> Result<Self> {
        let fail = |why: String| Error::File { file: file.into(), why };
        let text = crate::input::read_text(file).map_err(|e| fail(e.to_string()))?;
        let json: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| fail(format!("not valid JSON: {e}")))?;
        let ordered = serde_json::from_str(&text);
        let Ordered { rank_pattern, alpha_pattern } =
            ordered.map_err(|e| fail(format!("`rank_pattern` or `alpha_pattern`: {e}")))?;
        let [ranks, alphas] =
            [rank_pattern, alpha_pattern].map(|pairs| pairs.unwrap_or_default().0);
        let mut options = Self { file: file.into(), json, ranks, alphas, ignored: vec![] };
        options.check_kind()?;
        let mut ignored = vec![];
        for (key, value) in &options.json {
            match fate(key, value) {
                Fate::Honoured => {}
                Fate::Ignored(why) => ignored.push(options.without_effect(key, why)),
                Fate::Refused(why) => return Err(options.fail(why)),
            }
        }
        options.ignored = ignored;
        Ok(options)
    }

    fn without_effect(&self, key: &str, why: &str) -> Ignored {
        Ignored::new(self.file.display().to_string(), key, why)
    }

    fn check_kind(&self) -> Result<()> {
        match self.get("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => {}
            Some(other) => return Err(self.fail(format!("`peft_type` is {other}, not LORA"))),
            None => return Err(self.fail("has no `peft_type`")),
        }
        match self.get("task_type") {
            None => Ok(()),
            Some(Value::String(task)) if task == "CAUSAL_LM" => Ok(()),
            Some(other) => Err(self.fail(format!("`task_type` is {other}, not CAUSAL_LM"))),
        }
    }

    /// The adapters of a model of `config`.
    pub fn lora(&mut self, config: &ModelConfig) -> Result<LoraConfig> {
        let plain = LoraConfig {
            rank: self.rank("r", self.json.get("r"))?,
            alpha: self.alpha("lora_alpha", self.json.get("lora_alpha"))?,
            use_rslora: self.flag("use_rslora")?,
            ..LoraConfig::none()
        };
        let ranks = self.by_pattern("rank_pattern", &self.ranks, Self::rank)?;
        let alphas = self.by_pattern("alpha_pattern", &self.alphas, Self::alpha)?;
        let targets = self.targets(config)?;
        let mut sites = vec![];
        for (name, at) in targets {
            let own = |key: &str, found: std::result::Result<_, String>| {
                found.map_err(|why| self.fail(format!("`{key}`: {why}")))
            };
            let rank = own("rank_pattern", ranks.of(&name).map(|r| r.unwrap_or(plain.rank)))?;
            let alpha =
                alphas.of(&name).map_err(|why| self.fail(format!("`alpha_pattern`: {why}")))?;
            sites.push((at, Site { rank, alpha: alpha.unwrap_or(plain.alpha) }));
        }
        for (key, unused) in [("rank_pattern", ranks.unused()), ("alpha_pattern", alphas.unused())]
        {
            let each = unused
                .into_iter()
                .map(|name| self.without_effect(&format!("{key}.{name}"), "counts for no adapter"));
            let each: Vec<_> = each.collect();
            self.ignored.extend(each);
        }
        let site = |layer, p| sites.iter().find(|(at, _)| *at == (layer, p)).map(|(_, site)| *site);
        plain.of_sites(config, site).map_err(|error| self.in_its_words(error))
    }

    /// An error of a flag as one of the key that it stands for here.
    fn in_its_words(&self, error: anyhow::Error) -> anyhow::Error {
        let Some(Error::Flag { flag, why }) = error.downcast_ref() else { return error };
        let key = match flag.as_str() {
            "--lora-rank" => "r",
            "--lora-rank-pattern" => "rank_pattern",
            "--lora-alpha" => "lora_alpha",
            "--lora-alpha-pattern" => "alpha_pattern",
            other => other,
        };
        self.fail(format!("`{key}`: {why}"))
    }

    /// Names of the adapted projections and where they are.
    fn targets(&mut self, config: &ModelConfig) -> Result<Vec<(String, (usize, Projection))>> {
        let Some(targets) = self.names("target_modules")? else {
            return Err(self.fail("`target_modules` is missing: a list of names, or a pattern"));
        };
        let (exclude, layers) = (self.names("exclude_modules")?, self.layers(&targets)?);
        let all = modules(config);
        let mut found = vec![];
        for module in &all {
            let holds = |key: &str, names: &Names| {
                names.hold(module).map_err(|why| self.fail(format!("`{key}`: {why}")))
            };
            let excluded = match &exclude {
                Some(names) => holds("exclude_modules", names)?,
                None => false,
            };
            if excluded
                || !holds("target_modules", &targets)?
                || !self.of_layers(&layers, module)?
            {
                continue;
            }
            let Module { name, site } = module;
            let Some(site) = site else {
                let why = format!(
                    "`target_modules` takes in `{name}`, which is no projection of a layer"
                );
                return Err(self.fail(why));
            };
            found.push((name.clone(), *site));
        }
        if found.is_empty() {
            return Err(self.fail("`target_modules` takes in no projection of this model's layers"));
        }
        if let Names::Ends(ends) = &targets {
            let nobody = |end: &&String| !all.iter().any(|module| is_end(&module.name, end));
            let why = |end: &String| {
                self.without_effect(
                    &format!("target_modules.{end}"),
                    "names no module of this model",
                )
            };
            let each: Vec<_> = ends.iter().filter(nobody).map(why).collect();
            self.ignored.extend(each);
        }
        for layer in layers.beyond(config.num_hidden_layers) {
            let key = format!("layers_to_transform.{layer}");
            self.ignored.push(self.without_effect(&key, "is no layer of this model"));
        }
        Ok(found)
    }

    fn of_layers(&self, layers: &LayerChoice, module: &Module) -> Result<bool> {
        layers.hold(&module.name).map_err(|why| self.fail(format!("`layers_pattern`: {why}")))
    }

    /// A list of ends of names, or a pattern of whole ones.
    fn names(&self, key: &str) -> Result<Option<Names>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(all))
                if all.eq_ignore_ascii_case("all-linear") && key == "target_modules" =>
            {
                Ok(Some(Names::AllLinear))
            }
            Some(Value::String(text)) => {
                let pattern = Pattern::whole(text);
                Ok(Some(Names::Whole(pattern.map_err(|why| self.fail(format!("`{key}`: {why}")))?)))
            }
            Some(Value::Array(_)) => Ok(Some(Names::Ends(self.strings(key)?))),
            Some(_) => Err(self.fail(format!("`{key}` is neither a list nor a string"))),
        }
    }

    /// `layers_to_transform`, found in names by `layers_pattern`.
    fn layers(&self, targets: &Names) -> Result<LayerChoice> {
        let number = |value: &Value| {
            let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
            number
                .ok_or_else(|| self.fail(format!("`layers_to_transform` holds {value}, no layer")))
        };
        let layers = match self.get("layers_to_transform") {
            None => None,
            Some(Value::Array(list)) if list.is_empty() => None,
            Some(Value::Array(list)) => Some(list.iter().map(number).collect::<Result<Vec<_>>>()?),
            Some(one) => Some(vec![number(one)?]),
        };
        let patterns = self.strings("layers_pattern")?;
        let Some(layers) = layers else {
            return match patterns.is_empty() {
                true => Ok(LayerChoice::All),
                false => Err(self.fail("`layers_pattern` stands without `layers_to_transform`")),
            };
        };
        if !matches!(targets, Names::Ends(_)) {
            let why = "`layers_to_transform` stands beside a `target_modules` that is no list";
            return Err(self.fail(why));
        }
        let patterns = if patterns.is_empty() { vec!["[^.]*".into()] } else { patterns };
        let patterns = patterns.iter().map(|text| Pattern::layer(text)).collect::<Result<_, _>>();
        let patterns = patterns.map_err(|why| self.fail(format!("`layers_pattern`: {why}")))?;
        Ok(LayerChoice::Some { layers, patterns })
    }

    /// A list of strings, or one string; an empty one is none.
    fn strings(&self, key: &str) -> Result<Vec<String>> {
        let string = |value: &Value| {
            let text = value.as_str().map(String::from);
            text.ok_or_else(|| self.fail(format!("`{key}` holds {value}, no string")))
        };
        match self.get(key) {
            None => Ok(vec![]),
            Some(Value::Array(list)) => list.iter().map(string).collect(),
            Some(one) => {
                Ok(vec![string(one)?].into_iter().filter(|text| !text.is_empty()).collect())
            }
        }
    }

    fn by_pattern<T: Copy>(
        &self,
        key: &str,
        pairs: &[(String, Value)],
        read: impl Fn(&Self, &str, Option<&Value>) -> Result<T>,
    ) -> Result<ByPattern<T>> {
        let one = |(name, value): &(String, Value)| {
            let pattern = Pattern::end(name).map_err(|why| self.fail(format!("`{key}`: {why}")))?;
            Ok((pattern, read(self, &format!("{key}.{name}"), Some(value))?))
        };
        Ok(ByPattern::new(pairs.iter().map(one).collect::<Result<_>>()?))
    }

    pub fn fail(&self, why: impl Into<String>) -> anyhow::Error {
        Error::File { file: self.file.clone(), why: why.into() }.into()
    }

    /// A value that is present and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(value) => {
                value.as_bool().ok_or_else(|| self.fail(format!("`{key}` is {value}, no boolean")))
            }
        }
    }

    fn rank(&self, key: &str, value: Option<&Value>) -> Result<usize> {
        let rank = value.and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok());
        rank.filter(|r| *r > 0)
            .ok_or_else(|| self.fail(format!("`{key}` is not a positive integer")))
    }

    fn alpha(&self, key: &str, value: Option<&Value>) -> Result<f64> {
        let alpha = value.and_then(Value::as_f64);
        alpha.ok_or_else(|| self.fail(format!("`{key}` is not a number")))
    }
}

/// The layers that targets are taken from.
enum LayerChoice {
    All,
    Some { layers: Vec<usize>, patterns: Vec<Pattern> },
}

impl LayerChoice {
    /// Whether a module called so is in one of them.
    fn hold(&self, name: &str) -> std::result::Result<bool, String> {
        let Self::Some { layers, patterns } = self else { return Ok(true) };
        for pattern in patterns {
            if let Some(layer) = pattern.layer_of(name)? {
                return Ok(layers.contains(&layer));
            }
        }
        Ok(false)
    }

    /// Those that a model of `all` layers does not have.
    fn beyond(&self, all: usize) -> Vec<usize> {
        match self {
            Self::All => vec![],
            Self::Some { layers, .. } => layers.iter().copied().filter(|n| *n >= all).collect(),
        }
    }
}
