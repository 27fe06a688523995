//! The account of a plan, for people.

use std::io::{IsTerminal, Write};

use super::{
    figures::{Figures, digits, percent},
    table::{BAD, FAINT, GOOD, align, describe, list, new_table},
};
use crate::{
    error::Result,
    plan::{Account, Row, Solved},
};

/// Prints `account` to standard output.
///
/// # Errors
/// A closed pipe.
pub fn print_plan(account: &Account, style: Figures) -> Result<()> {
    let unicode = std::io::stdout().is_terminal();
    render(&mut anstream::stdout().lock(), account, style, unicode)
}

fn render(out: &mut impl Write, account: &Account, style: Figures, unicode: bool) -> Result<()> {
    let Account { file, model, parameters, budget_flops, structure, prices, .. } = account;
    writeln!(out, "plan      {}", file.display())?;
    writeln!(out, "model     {model}, {} parameters", digits(*parameters))?;
    writeln!(out, "budget    {}", style.flop(*budget_flops))?;
    writeln!(out, "counted   structure {structure}, prices {}", prices.name)?;
    for line in experiments(account) {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "\n{}\n", costs(account, style, unicode).trim_fmt())?;
    for note in notes(account) {
        writeln!(out, "{FAINT}{note}{FAINT:#}")?;
    }
    if let Some(solved) = &account.solved {
        writeln!(out, "{}", solution(solved, account))?;
    }
    let (yes, no) = if unicode { ("✔ ", "✘ ") } else { ("", "") };
    match &account.over_budget {
        None => {
            let left = digits(account.left_flops);
            Ok(writeln!(out, "{GOOD}{yes}within the budget{GOOD:#}: {left} FLOPs left")?)
        }
        Some(broken) => {
            let missing = broken.needed_flops - broken.left_flops;
            Ok(writeln!(
                out,
                "{BAD}{no}over the budget{BAD:#}: `{}` lacks {} FLOPs",
                broken.name,
                digits(missing)
            )?)
        }
    }
}

/// What each row runs, in words.
fn experiments(account: &Account) -> Vec<String> {
    let name = name_width(account);
    let each = |row: &Row| {
        let runs = (row.runs != 1).then(|| format!("{} runs of it", row.runs));
        let parts = describe(&row.workload);
        let parts: Vec<String> = parts.split(", ").map(String::from).chain(runs).collect();
        list(&format!("  {:<name$}  ", row.name), &parts)
    };
    account.experiments.iter().map(each).collect()
}

fn name_width(account: &Account) -> usize {
    account.experiments.iter().map(|row| row.name.chars().count()).max().unwrap_or(0)
}

fn costs(account: &Account, style: Figures, unicode: bool) -> comfy_table::Table {
    let budget = account.budget_flops as f64;
    let mut table = new_table(unicode);
    let mut head: Vec<String> =
        ["experiment", "runs", "FLOPs", "share", "so far", "left"].map(String::from).into();
    head.extend(account.beside.iter().map(|b| format!("under {}", b.structure)));
    table.set_header(head);
    let beside = |flops: Option<u128>| {
        let cell = flops.map_or("-".into(), |flops| style.count(flops));
        account.beside.iter().map(move |_| cell.clone())
    };
    let mut running = 0;
    for run in &account.spent {
        running += run.flops;
        let mut cells = vec![format!("spent: {}", run.file.display()), "1".into()];
        cells.extend(figures(style, run.flops, budget));
        cells.extend([style.count(running), left(style, account.budget_flops, running)]);
        cells.extend(beside(None));
        table.add_row(cells);
    }
    for row in &account.experiments {
        let mut cells = vec![row.name.clone(), digits(row.runs)];
        cells.extend(figures(style, row.flops, budget));
        cells.extend([
            style.count(row.running_flops),
            left(style, account.budget_flops, row.running_flops),
        ]);
        cells.extend(beside(row.beside_flops));
        table.add_row(cells);
    }
    let all = account.spent_flops + account.total_flops;
    let runs =
        account.spent.len() as u128 + account.experiments.iter().map(|r| r.runs).sum::<u128>();
    let mut cells = vec!["total".into(), digits(runs)];
    cells.extend(figures(style, all, budget));
    cells.extend([style.count(all), left(style, account.budget_flops, all)]);
    cells.extend(beside(account.beside.as_ref().and_then(|b| b.total_flops)));
    table.add_row(cells);
    align(&mut table, 1);
    table
}

fn figures(style: Figures, flops: u128, budget: f64) -> [String; 2] {
    [style.count(flops), percent(flops as f64 / budget)]
}

/// What is left of the budget; with a minus sign where it is passed.
fn left(style: Figures, budget: u128, running: u128) -> String {
    match budget.checked_sub(running) {
        Some(left) => style.count(left),
        None => format!("-{}", style.count(running - budget)),
    }
}

fn notes(account: &Account) -> Vec<String> {
    let repriced = account.spent.iter().filter_map(|run| {
        let (file, prices) = (run.file.display(), run.repriced_from.as_ref()?);
        Some(format!("{file} was priced under {prices}; priced anew under {}", account.prices.name))
    });
    let unaudited = account.spent.iter().filter(|run| !run.audited);
    let unaudited = unaudited.map(|run| format!("{} was not audited", run.file.display()));
    let longest = |row: &Row| match row.workload.context() {
        context if context > row.workload.model.max_position_embeddings as u64 => Some(format!(
            "{}: a context of {} tokens is longer than the model was made for, {}",
            row.name,
            digits(context.into()),
            digits(row.workload.model.max_position_embeddings as u128)
        )),
        _ => None,
    };
    // What follows a semicolon is advice for the command line.
    let reason = |why: &String| format!("-: {}", why.split(';').next().unwrap_or_default());
    let uncounted = account.beside.iter().flat_map(|b| b.uncounted.iter()).map(reason);
    let longest = account.experiments.iter().filter_map(longest);
    repriced.chain(unaudited).chain(longest).chain(uncounted).collect()
}

fn solution(solved: &Solved, account: &Account) -> String {
    let Solved { experiment, key, value, next_over_flops, beside_value } = solved;
    let fits = format!("{experiment}: {key} = {} fits", digits((*value).into()));
    let next = match next_over_flops {
        Some(over) => {
            format!(", {} is {} FLOPs over", digits(u128::from(*value) + 1), digits(*over))
        }
        None => ", the largest that can be counted".into(),
    };
    let beside = match (&account.beside, beside_value) {
        (Some(beside), Some(n)) => {
            format!("; under {} {}", beside.structure, digits((*n).into()))
        }
        _ => String::new(),
    };
    fits + &next + &beside
}
