//! What a generation adds: its speed, and the text.

use super::{
    page::{Block, Cell, Figure, Section, Table, Text},
    read::Run,
};
use crate::{
    report::{Timings, bytes, digits, figures::per_second},
    traffic::Traffic,
};

/// Adds speeds to `section`.
pub fn add(section: &mut Section, run: &Run, timings: &Timings) {
    let new: usize = run.sequences.iter().map(|s| s.token_ids.len()).sum();
    let prompt: usize = run.sequences.iter().fold(0, |sum, s| sum.saturating_add(s.prompt_tokens));
    let prices = format!("prices {}", run.prices.name);
    let first = timings.time_to_first_token_s;
    let figures = &mut section.figures;
    if let Some(rate) = timings.decode_tokens_per_s {
        let note = format!("{} new in {:.2} s", digits(new as u128), timings.decode_s);
        figures.push(Figure::new("Decode speed", per_second(rate), "tokens/s", note));
    }
    let note = format!("{} tokens of prompt", digits(prompt as u128));
    figures.push(Figure::new("First token after", format!("{first:.3}"), "s", note));
    let rate = timings.prefill_flops_per_s;
    figures.push(Figure::large("Prefill rate", rate, "FLOP/s", &prices));
    if let Some(rate) = timings.decode_flops_per_s {
        figures.push(Figure::large("Decode rate", rate, "FLOP/s", &prices));
    }
    let read = run.bytes_per_decoded_token.as_ref().zip(timings.decode_tokens_per_s);
    if let Some((Traffic { weights, kv_cache, .. }, rate)) = read {
        let per_token = weights.saturating_add(*kv_cache) as f64;
        let note = format!("{} of weights and cache a token", bytes(per_token));
        figures.push(Figure::large("Read in decoding", rate * per_token, "B/s", note));
    }
}

/// The first texts, with how they ended.
pub fn texts(run: &Run) -> Vec<Block> {
    const MOST: usize = 32;
    let one = run.sequences.len() == 1;
    let texts = run.sequences.iter().take(MOST).enumerate().map(|(i, sequence)| {
        let title = if one { "Text".into() } else { format!("Text {}", i + 1) };
        let ended = if sequence.stopped { "the model ended it" } else { "the limit ended it" };
        let (prompt, new) = (sequence.prompt_tokens, sequence.token_ids.len());
        let note = format!("{new} new tokens after {prompt} of prompt; {ended}");
        Block::Text(Text { title, note, text: sequence.text.clone() })
    });
    texts.collect()
}

/// Seconds of each part.
pub fn times(t: &Timings) -> Block {
    let mut table = Table::new("Time", 1, ["part", "seconds", "tokens/s"]);
    let seconds = |s: f64| Cell::figure(s, format!("{s:.3}"), "s");
    let rate =
        |r: Option<f64>| r.map_or(Cell::none(), |r| Cell::figure(r, per_second(r), "tokens/s"));
    table.rows = vec![
        vec![Cell::word("loading the weights"), seconds(t.load_s), Cell::none()],
        vec![
            Cell::word("to the first token"),
            seconds(t.time_to_first_token_s),
            rate(Some(t.prefill_tokens_per_s)),
        ],
        vec![Cell::word("later tokens"), seconds(t.decode_s), rate(t.decode_tokens_per_s)],
    ];
    Block::Table(table)
}
