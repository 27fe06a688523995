//! PEFT's rules of which modules a name means, over the names that transformers gives a decoder's.

use std::cell::RefCell;

use fancy_regex::Regex;

use crate::config::{ModelConfig, Projection};

/// A module of a decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    /// Its name in transformers: `model.layers.0.self_attn.q_proj`, `lm_head`.
    pub name: String,
    /// Which projection of which layer it is, if it is one.
    pub site: Option<(usize, Projection)>,
}

/// Every module of the model: projections, and all else that a name could mean.
pub(super) fn modules(config: &ModelConfig) -> Vec<Module> {
    let other = |name: String| Module { name, site: None };
    let outside = ["lm_head", "model", "model.embed_tokens", "model.layers", "model.norm"];
    let mut all: Vec<_> = outside.map(|name| other(name.into())).into();
    const INSIDE: [&str; 9] = [
        "self_attn",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "mlp",
        "mlp.act_fn",
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ];
    for layer in 0..config.num_hidden_layers {
        let path = format!("model.layers.{layer}");
        all.extend(INSIDE.map(|part| other(format!("{path}.{part}"))));
        all.extend(Projection::ALL.map(|projection| Module {
            name: format!("{path}.{}.{projection}", projection.parent()),
            site: Some((layer, projection)),
        }));
        all.push(other(path));
    }
    all
}

/// A name, or several, as PEFT's `target_modules` and `exclude_modules` have them.
#[derive(Debug)]
pub(super) enum Names {
    /// `all-linear`: every projection.
    AllLinear,
    /// A pattern of whole names.
    Whole(Pattern),
    /// Ends of names, from a dot on.
    Ends(Vec<String>),
}

impl Names {
    /// Whether `module` is meant.
    pub fn hold(&self, module: &Module) -> Result<bool, String> {
        match self {
            Self::AllLinear => Ok(module.site.is_some()),
            Self::Whole(pattern) => pattern.matches(&module.name),
            Self::Ends(ends) => Ok(ends.iter().any(|end| is_end(&module.name, end))),
        }
    }
}

/// Whether `name` is `end`, or ends with a dot and it.
pub(super) fn is_end(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A regular expression as Python's `re` reads it.
#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    text: String,
}

impl Pattern {
    /// For whole names, as `re.fullmatch`.
    pub fn whole(text: &str) -> Result<Self, String> {
        Self::new(text, &format!("^(?:{text})$"))
    }

    /// For the ends of names from a dot on: PEFT's `(.*\.)?({text})$`.
    pub fn end(text: &str) -> Result<Self, String> {
        Self::new(text, &format!(r"^(.*\.)?({text})$"))
    }

    /// For the number of a layer in a list named so: PEFT's `layers_pattern`. The first number
    /// counts.
    pub fn layer(text: &str) -> Result<Self, String> {
        Self::new(text, &format!(r"^(?:|.*?\.){text}\.(?P<idx>\d+)\."))
    }

    fn new(text: &str, whole: &str) -> Result<Self, String> {
        let regex = Regex::new(whole);
        let regex = regex.map_err(|_| format!("`{text}` is no pattern that this program reads"))?;
        Ok(Self { regex, text: text.into() })
    }

    /// Whether `name` matches.
    pub fn matches(&self, name: &str) -> Result<bool, String> {
        self.regex.is_match(name).map_err(|_| self.too_long())
    }

    /// The layer's number in `name`, if a [`Pattern::layer`] matches.
    pub fn layer_of(&self, name: &str) -> Result<Option<usize>, String> {
        let found = self.regex.captures(name).map_err(|_| self.too_long())?;
        Ok(found.and_then(|found| found.name("idx")?.as_str().parse().ok()))
    }

    fn too_long(&self) -> String {
        format!("`{}` takes too long to match", self.text)
    }
}

/// Values by patterns of names' ends, in the order of the file: the first that matches counts.
#[derive(Debug)]
pub(super) struct ByPattern<T> {
    list: Vec<(Pattern, T)>,
    /// Which of them have counted.
    used: RefCell<Vec<bool>>,
}

impl<T: Copy> ByPattern<T> {
    pub fn new(list: Vec<(Pattern, T)>) -> Self {
        let used = RefCell::new(vec![false; list.len()]);
        Self { list, used }
    }

    /// The value for the module called `name`.
    pub fn of(&self, name: &str) -> Result<Option<T>, String> {
        for (i, (pattern, value)) in self.list.iter().enumerate() {
            if pattern.matches(name)? {
                self.used.borrow_mut()[i] = true;
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// The patterns that never counted.
    pub fn unused(&self) -> Vec<&str> {
        let used = self.used.borrow();
        let unused = self.list.iter().zip(used.iter()).filter(|(_, used)| !**used);
        unused.map(|((pattern, _), _)| pattern.text.as_str()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_matched_as_peft_does() {
        let name = "model.layers.11.self_attn.q_proj";
        let end = |text: &str| Pattern::end(text).unwrap().matches(name).unwrap();
        let whole = |text: &str| Pattern::whole(text).unwrap().matches(name).unwrap();
        // (key of rank_pattern, whether re.match(rf"(.*\.)?({key})$", name) finds it)
        for (text, found) in [
            ("q_proj", true),
            ("k_proj|q_proj", true),
            ("proj", false),
            ("self_attn.q_proj", true),
            ("1.self_attn.q_proj", false),
            ("layers.11.self_attn.q_proj", true),
            ("layers.1.self_attn.q_proj", false),
            (r"layers\.(1[0-3]|2)\.self_attn\..*", true),
            ("^q_proj", false),
        ] {
            assert_eq!(end(text), found, "{text}");
        }
        assert!(whole(r".*\.(q|v)_proj") && whole(r".*(?<!k)_proj") && !whole("q_proj"));
        assert!(is_end(name, "q_proj") && is_end("q_proj", "q_proj") && !is_end(name, "proj"));
        assert!(Pattern::whole("(").unwrap_err().contains("`(` is no pattern"));
        let layer = |text: &str| Pattern::layer(text).unwrap().layer_of(name).unwrap();
        assert_eq!([layer("layers"), layer("h"), layer("[^.]*")], [Some(11), None, Some(11)]);
    }
}
