//! Reports as one HTML page that needs nothing else: style, script and charts are inside.
//!
//! ```text
//! JSON ─> read ─> a section a file: verdicts, figures, charts, tables ─> page.html
//! ```
//!
//! `page.rs` holds what a section is made of; each kind of report has a file that fills one;
//! `page.html` gives it markup and escapes every text.

mod bench;
mod ceiling;
mod chart;
mod evaluation;
mod generation;
mod page;
mod plan;
mod read;
mod reconciliation;
mod run;
mod sweep;
mod training;

pub use read::Input;

use std::io::Write;

use minijinja::{Environment, UndefinedBehavior, syntax::SyntaxConfig, value::Serde};
use serde::Serialize;

use crate::error::Result;
use page::{Section, Tone};
use read::Content;

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// What the template is given.
#[derive(Serialize)]
struct Page {
    title: String,
    sections: Vec<Section>,
    /// One a section.
    tones: Vec<Tone>,
    style: &'static str,
    script: &'static str,
    version: &'static str,
}

/// Writes one page of `inputs`, in their order.
///
/// # Errors
/// What `out` reports.
pub fn write(out: &mut dyn Write, inputs: &[Input]) -> Result<()> {
    let sections: Vec<Section> = inputs.iter().map(section).collect::<Result<_>>()?;
    let title = match sections.as_slice() {
        [one] => format!("{}: {}", one.title, one.model),
        many => format!("{} reports", many.len()),
    };
    let tones = sections.iter().map(Section::tone).collect();
    let version = env!("CARGO_PKG_VERSION");
    let page = Page { title, sections, tones, style: STYLE, script: SCRIPT, version };
    let mut templates = Environment::new();
    templates.set_undefined_behavior(UndefinedBehavior::Strict);
    templates.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    // The name's ending turns escaping on.
    templates.add_template("page.html", TEMPLATE)?;
    let html = templates.get_template("page.html")?.render(Serde(page))?;
    Ok(out.write_all(html.as_bytes())?)
}

fn section(input: &Input) -> Result<Section> {
    match &input.content {
        Content::Run(run) => run::section(&input.file, run),
        Content::Sweep(sweep) => sweep::section(&input.file, sweep),
        Content::Plan(plan) => plan::section(&input.file, plan),
        Content::Bench(report) => bench::section(&input.file, report),
        Content::Ceiling(ceiling) => ceiling::section(&input.file, ceiling),
        Content::Reconciliation(way) => reconciliation::section(&input.file, way),
    }
}
