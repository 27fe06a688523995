//! What an evaluation adds: its loss.

use super::{
    page::{Block, Figure, Notes, Section},
    read::Run,
};
use crate::report::{EvaluationReport, digits, figures::per_second};

/// Adds loss and speed to `section`.
pub fn add(section: &mut Section, run: &Run, e: &EvaluationReport) {
    let tokens = format!("{} tokens count", digits(e.tokens.scored.unwrap_or_default()));
    let seconds = format!("{:.2} s in all", e.seconds);
    section.figures.extend([
        Figure::new("Loss", format!("{:.4}", e.loss), "nats a token", tokens),
        Figure::new("Perplexity", format!("{:.3}", e.perplexity), "", "e to the loss"),
        Figure::new("Speed", per_second(e.tokens_per_s), "tokens/s", seconds),
    ]);
    if e.seconds > 0.0 {
        let note = format!("prices {}", run.prices.name);
        let rate = run.total_flops as f64 / e.seconds;
        section.figures.push(Figure::large("Rate", rate, "FLOP/s", note));
    }
    if let Some(adapter) = &e.adapter {
        let notes = vec![("folder".to_string(), adapter.clone())];
        section.blocks.push(Block::Notes(Notes { title: "Adapter".into(), notes }));
    }
}
