//! Adapters.

use std::{collections::BTreeMap, ops::Range};

use serde::{Deserialize, Serialize};

use super::{Layers, ModelConfig, Modules, Projection};
use crate::error::{Error, Result};

/// Low-rank adapters: y += scaling · B(A x) beside target projections, each of which may have a
/// rank of its own.
///
/// What [`LoraConfig::checked`] gives has one spelling, whichever of several a user chose: two
/// configs are equal if their adapters are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// r: rows of A, columns of B, where `rank_pattern` says nothing else. 0 means no adapter.
    pub rank: usize,
    /// Numerator of the scale, where `alpha_pattern` says nothing else.
    pub alpha: f64,
    /// Adapted projections, sorted, without repeats.
    pub targets: Vec<Modules>,
    /// Layers that carry adapters; none: every layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Ranks of their own. One layer's goes before that of all layers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<Modules, usize>,
    /// Numerators of their own, likewise.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<Modules, f64>,
    /// The scale is alpha / sqrt(rank) in place of alpha / rank.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub use_rslora: bool,
}

/// The adapter beside one projection of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Site {
    /// r.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
}

/// The adapters of one projection in some layers together. What they cost is linear in both: a
/// product with A takes rows·k·r multiply-accumulates, the sum beside it rows·n adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Adapted {
    /// How many of the layers have one.
    pub layers: u128,
    /// Σ r over them.
    pub ranks: u128,
}

impl LoraConfig {
    /// No adapter at all.
    pub const fn none() -> Self {
        Self {
            rank: 0,
            alpha: 1.0,
            targets: vec![],
            layers: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
        }
    }

    /// Adapters of one rank on `targets` in every layer.
    ///
    /// # Errors
    /// As [`LoraConfig::checked`].
    pub fn new(
        config: &ModelConfig,
        rank: usize,
        alpha: f64,
        targets: &[Projection],
    ) -> Result<Self> {
        let targets = targets.iter().copied().map(Modules::from).collect();
        Self { rank, alpha, targets, ..Self::none() }.checked(config)
    }

    /// The same adapters in the one spelling of them.
    ///
    /// # Errors
    /// A rank above a target's smaller width, no target, an alpha that is not finite, a layer that
    /// the model does not have, a pattern for what carries no adapter.
    pub fn checked(&self, config: &ModelConfig) -> Result<Self> {
        if self.rank == 0 && self.rank_pattern.is_empty() {
            return Ok(Self::none());
        }
        if self.rank == 0 {
            return Err(fail("--lora-rank", "0 is no adapter, beside a pattern of ranks"));
        }
        self.check_names(config)?;
        self.of_sites(config, |layer, projection| self.at(layer, projection))
    }

    /// The adapters that `site` gives each projection of each layer of the model. Of `self`, rank
    /// and alpha stand where a site has them, and [`LoraConfig::use_rslora`] is taken.
    ///
    /// # Errors
    /// As [`LoraConfig::checked`].
    pub fn of_sites(
        &self,
        config: &ModelConfig,
        site: impl Fn(usize, Projection) -> Option<Site>,
    ) -> Result<Self> {
        let at = |layer, projection| Some((layer, projection, site(layer, projection)?));
        let sites: Vec<_> = (0..config.num_hidden_layers)
            .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
            .filter_map(|(layer, projection)| at(layer, projection))
            .collect();
        for &(_, projection, site) in &sites {
            self.check_site(config, projection, site)?;
        }
        let Some(&(_, _, first)) = sites.first() else {
            return Err(fail("--lora-targets", "names no projection"));
        };
        let any = |has: &dyn Fn(Site) -> bool| sites.iter().any(|(_, _, site)| has(*site));
        // What stands for all is some adapter's own, so that no rank is told that none has.
        let rank = if any(&|s| s.rank == self.rank) { self.rank } else { first.rank };
        let alpha = if any(&|s| s.alpha == self.alpha) { self.alpha } else { first.alpha };
        let (targets, layers) = placed(&sites, config.num_hidden_layers);
        Ok(Self {
            rank,
            alpha,
            targets,
            layers,
            rank_pattern: pattern(&sites, rank, |site| site.rank),
            alpha_pattern: pattern(&sites, alpha, |site| site.alpha),
            use_rslora: self.use_rslora,
        })
    }

    fn check_site(&self, config: &ModelConfig, projection: Projection, site: Site) -> Result<()> {
        let flag = |own: bool, plain: &str| match own {
            true => format!("{plain}-pattern"),
            false => plain.into(),
        };
        let Site { rank, alpha } = site;
        if !alpha.is_finite() {
            let flag = flag(alpha.to_bits() != self.alpha.to_bits(), "--lora-alpha");
            return Err(fail(&flag, format!("{alpha} is not a finite number")));
        }
        let (k, n) = projection.widths(config);
        let flag = flag(rank != self.rank, "--lora-rank");
        if rank == 0 {
            return Err(fail(&flag, format!("0 is no rank for {projection}")));
        }
        if rank > k.min(n) {
            let why = format!("{rank} is above {}, the smaller width of {projection}", k.min(n));
            return Err(fail(&flag, why));
        }
        Ok(())
    }

    /// Every layer is the model's, and every pattern is for an adapter.
    fn check_names(&self, config: &ModelConfig) -> Result<()> {
        let all = config.num_hidden_layers;
        let named = |flag: &str, layer: Option<usize>| match layer.filter(|layer| *layer >= all) {
            Some(layer) => Err(fail(flag, format!("no layer {layer}: the model has {all}"))),
            None => Ok(()),
        };
        for target in &self.targets {
            named("--lora-targets", target.layer)?;
        }
        for layer in self.layers.iter().flat_map(|layers| &layers.0) {
            named("--lora-layers", Some(*layer))?;
        }
        let ranks = self.rank_pattern.keys().map(|key| ("--lora-rank-pattern", key));
        let alphas = self.alpha_pattern.keys().map(|key| ("--lora-alpha-pattern", key));
        for (flag, key) in ranks.chain(alphas) {
            named(flag, key.layer)?;
            let layers = key.layer.map_or(0..all, |layer| layer..layer + 1);
            if self.adapted(key.projection, layers).layers == 0 {
                return Err(fail(flag, format!("{key} carries no adapter")));
            }
        }
        Ok(())
    }

    /// The adapter of `projection` in `layer`, if there is one.
    pub fn at(&self, layer: usize, projection: Projection) -> Option<Site> {
        let targeted = self.rank > 0
            && self.targets.iter().any(|target| target.hold(layer, projection))
            && self.layers.as_ref().is_none_or(|layers| layers.0.contains(&layer));
        let (one, all) = (Modules { layer: Some(layer), projection }, projection.into());
        let of = |of: &BTreeMap<Modules, usize>| of.get(&one).or_else(|| of.get(&all)).copied();
        let rank = of(&self.rank_pattern).unwrap_or(self.rank);
        let own = self.alpha_pattern.get(&one).or_else(|| self.alpha_pattern.get(&all));
        targeted.then_some(Site { rank, alpha: own.copied().unwrap_or(self.alpha) })
    }

    /// Every adapter of the model, layer by layer.
    pub fn sites(&self, config: &ModelConfig) -> impl Iterator<Item = (usize, Projection, Site)> {
        let all = (0..config.num_hidden_layers)
            .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)));
        all.filter_map(|(layer, projection)| Some((layer, projection, self.at(layer, projection)?)))
    }

    /// Whether `layer` carries an adapter.
    pub fn carries(&self, layer: usize) -> bool {
        Projection::ALL.into_iter().any(|projection| self.at(layer, projection).is_some())
    }

    /// The adapters of `projection` in `layers` together.
    pub fn adapted(&self, projection: Projection, layers: Range<usize>) -> Adapted {
        let sites = layers.filter_map(|layer| self.at(layer, projection));
        sites.fold(Adapted::default(), |sum, site| Adapted {
            layers: sum.layers + 1,
            ranks: sum.ranks + site.rank as u128,
        })
    }

    /// The factor on B(A x) of an adapter: alpha / rank, or alpha / sqrt(rank).
    pub fn scaling(&self, site: Site) -> f64 {
        let rank = site.rank as f64;
        site.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// Trainable parameters: r·(in + out) of each adapter.
    pub fn parameters(&self, config: &ModelConfig) -> u128 {
        let of = |projection: Projection| {
            let (k, n) = projection.widths(config);
            self.adapted(projection, 0..config.num_hidden_layers).ranks * (k + n) as u128
        };
        Projection::ALL.into_iter().map(of).sum()
    }

    /// The ranks that there are: `8`, or `8 (4 to 16)`.
    pub fn ranks(&self) -> String {
        let all = || self.rank_pattern.values().copied().chain([self.rank]);
        match (all().min(), all().max()) {
            (Some(least), Some(most)) if least < most => {
                format!("{} ({least} to {most})", self.rank)
            }
            _ => self.rank.to_string(),
        }
    }

    /// Where adapters are, in words: `q_proj,v_proj`, `q_proj of layers 0-3`.
    pub fn place(&self) -> String {
        let targeted = |p: &Projection| self.targets.iter().any(|t| t.projection == *p);
        let names: Vec<_> =
            Projection::ALL.into_iter().filter(targeted).map(Projection::name).collect();
        let some = match &self.layers {
            Some(layers) if layers.0.len() == 1 => format!(" of layer {layers}"),
            Some(layers) => format!(" of layers {layers}"),
            None if self.targets.iter().all(|target| target.layer.is_none()) => String::new(),
            None => " of some layers each".into(),
        };
        names.join(",") + &some
    }
}

type Placed = (usize, Projection, Site);

/// Targets and layers that stand for `sites`, of a model of `all` layers: projections and the
/// layers of all of them, or, where these differ, each projection with its own.
fn placed(sites: &[Placed], all: usize) -> (Vec<Modules>, Option<Layers>) {
    let of = |projection| {
        let own = sites.iter().filter(move |(_, p, _)| *p == projection);
        (projection, own.map(|(layer, ..)| *layer).collect::<Vec<_>>())
    };
    let each: Vec<_> = Projection::ALL.into_iter().map(of).filter(|(_, l)| !l.is_empty()).collect();
    let first = each.first().map(|(_, layers)| layers.clone()).unwrap_or_default();
    if each.iter().all(|(_, layers)| *layers == first) {
        let targets = each.into_iter().map(|(projection, _)| projection.into()).collect();
        return (targets, (first.len() < all).then_some(Layers(first)));
    }
    let mut targets: Vec<_> = each
        .into_iter()
        .flat_map(|(projection, layers)| match layers.len() == all {
            true => vec![projection.into()],
            false => {
                let one = |layer| Modules { layer: Some(layer), projection };
                layers.into_iter().map(one).collect()
            }
        })
        .collect();
    targets.sort();
    (targets, None)
}

/// What differs from `plain`: of a projection that has one value everywhere, once; else by layer.
fn pattern<T: PartialEq + Copy>(
    sites: &[Placed],
    plain: T,
    value: impl Fn(Site) -> T,
) -> BTreeMap<Modules, T> {
    let mut found = BTreeMap::new();
    for projection in Projection::ALL {
        let own = sites.iter().filter(|(_, p, _)| *p == projection);
        let own: Vec<_> = own.map(|(layer, _, site)| (*layer, value(*site))).collect();
        let uniform = own.iter().all(|(_, value)| *value == own[0].1);
        for (layer, value) in own.into_iter().filter(|(_, value)| *value != plain) {
            let layer = (!uniform).then_some(layer);
            found.insert(Modules { layer, projection }, value);
        }
    }
    found
}

fn fail(flag: &str, why: impl Into<String>) -> anyhow::Error {
    Error::flag(flag, why).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use Projection::{DownProj, QProj, VProj};

    fn tiny() -> ModelConfig {
        ModelConfig::preset("tiny").unwrap()
    }

    /// q and v of tiny's three layers, rank 4 and alpha 8, changed by `change`.
    fn changed(change: impl Fn(&mut LoraConfig)) -> Result<LoraConfig> {
        let mut lora = LoraConfig::new(&tiny(), 4, 8.0, &[QProj, VProj]).unwrap();
        change(&mut lora);
        lora.checked(&tiny())
    }

    fn at(text: &str) -> Modules {
        text.parse().unwrap()
    }

    #[test]
    fn lora_rank_is_bounded_by_the_narrower_side() {
        let config = ModelConfig::preset("qwen2.5-0.5b").unwrap();
        let targets = [VProj, QProj, QProj];
        let lora = LoraConfig::new(&config, 8, 16.0, &targets).unwrap();
        assert_eq!(lora.targets, [QProj, VProj].map(Modules::from));
        assert_eq!(lora.parameters(&config), 24 * 8 * (896 + 896 + 896 + 128));
        let error = LoraConfig::new(&config, 129, 16.0, &targets).unwrap_err().to_string();
        assert!(error.contains("129 is above 128"), "{error}");
    }

    #[test]
    fn patterns_and_layers_say_what_each_site_has() {
        let lora = changed(|lora| {
            lora.layers = Some(Layers(vec![2, 0]));
            lora.rank_pattern = [(at("q_proj"), 8), (at("layers.2.self_attn.q_proj"), 2)].into();
            lora.alpha_pattern = [(at("v_proj"), 3.0)].into();
        });
        let lora = lora.unwrap();
        let site = |layer, p| lora.at(layer, p).map(|site| (site.rank, site.alpha));
        assert_eq!([0, 1, 2].map(|l| site(l, QProj)), [Some((8, 8.0)), None, Some((2, 8.0))]);
        assert_eq!([0, 1, 2].map(|l| site(l, VProj)), [Some((4, 3.0)), None, Some((4, 3.0))]);
        assert_eq!(site(0, DownProj), None);
        assert_eq!(lora.adapted(QProj, 0..3), Adapted { layers: 2, ranks: 10 });
        assert_eq!(lora.adapted(QProj, 1..3), Adapted { layers: 1, ranks: 2 });
        assert_eq!(lora.parameters(&tiny()), 10 * 64 + 8 * 48);
        assert_eq!(
            (lora.ranks(), lora.place()),
            ("4 (2 to 8)".into(), "q_proj,v_proj of layers 0,2".into())
        );
        let mut rooted = lora.clone();
        rooted.use_rslora = true;
        let site = lora.at(0, QProj).unwrap();
        assert_eq!((lora.scaling(site), rooted.scaling(site)), (1.0, 8.0 / 8f64.sqrt()));
    }

    #[test]
    fn there_is_one_spelling() {
        let all = LoraConfig::new(&tiny(), 4, 8.0, &[QProj, VProj]).unwrap();
        let spelled = [
            changed(|lora| lora.layers = Some(Layers(vec![0, 2, 1]))),
            changed(|lora| lora.rank_pattern = [(at("q_proj"), 4)].into()),
            changed(|lora| {
                lora.rank = 9;
                lora.rank_pattern = [(at("q_proj"), 4), (at("v_proj"), 4)].into();
            }),
            changed(|lora| {
                let of = |layer| Modules { layer: Some(layer), projection: QProj };
                lora.targets = vec![of(2), at("v_proj"), of(0), of(1), at("q_proj")];
            }),
        ];
        for lora in spelled {
            assert_eq!(lora.unwrap(), all);
        }
        let uneven = changed(|lora| lora.targets[0].layer = Some(1)).unwrap();
        assert_eq!(uneven.targets, [at("v_proj"), at("layers.1.self_attn.q_proj")]);
        let json = serde_json::to_value(&uneven).unwrap();
        assert_eq!(json["targets"], serde_json::json!(["v_proj", "layers.1.self_attn.q_proj"]));
        assert_eq!(serde_json::from_value::<LoraConfig>(json).unwrap(), uneven);
        let plain = serde_json::json!({"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]});
        assert_eq!(serde_json::to_value(&all).unwrap(), plain);
    }

    #[test]
    fn what_names_no_adapter_is_refused() {
        type Change = fn(&mut LoraConfig);
        let cases: [(Change, &str); 7] = [
            (|l| l.layers = Some(Layers(vec![3])), "--lora-layers: no layer 3: the model has 3"),
            (|l| l.layers = Some(Layers(vec![])), "--lora-targets: names no projection"),
            (|l| l.targets[0].layer = Some(7), "--lora-targets: no layer 7"),
            (
                |l| l.rank_pattern = [(DownProj.into(), 2)].into(),
                "--lora-rank-pattern: down_proj carries no adapter",
            ),
            (
                |l| l.rank_pattern = [(VProj.into(), 17)].into(),
                "--lora-rank-pattern: 17 is above 16",
            ),
            (|l| l.rank_pattern = [(VProj.into(), 0)].into(), "--lora-rank-pattern: 0 is no rank"),
            (
                |l| l.alpha_pattern = [(VProj.into(), f64::NAN)].into(),
                "--lora-alpha-pattern: NaN is not a finite",
            ),
        ];
        for (change, message) in cases {
            let error = changed(change).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
