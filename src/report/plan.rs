//! The account of a plan, for people.

use std::io::{IsTerminal, Write};

use super::{
    figures::{Figures, digits, percent},
    table::{BAD, FAINT, GOOD, align, describe, list, new_table},
    time::{amount, dollars, time_lines},
};
use crate::{
    error::Result,
    plan::{Account, Balance, Budget, NextOver, Row, RowBalance, Solved, Unit},
    rate::{Rate, Time},
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
    let Account { file, model, parameters, balance, structure, prices, .. } = account;
    let budget = balance.budget;
    writeln!(out, "plan      {}", file.display())?;
    writeln!(out, "model     {model}, {} parameters", digits(*parameters))?;
    match budget.unit {
        Unit::Flops => writeln!(out, "budget    {}", style.flop(budget.amount))?,
        Unit::Tokens | Unit::GpuHours | Unit::Dollars => {
            writeln!(out, "budget    {}", said(&budget, budget.amount))?;
        }
    }
    writeln!(out, "counted   structure {structure}, prices {}", prices.name)?;
    for line in experiments(account) {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "\n{}\n", costs(account, style, unicode).trim_fmt())?;
    if let (Some(rate), Some(time)) = (&account.rate, &account.time) {
        writeln!(out, "{}\n", times(account, rate, time, unicode).trim_fmt())?;
        time_lines(out, rate, time, *structure)?;
    }
    for note in notes(account) {
        writeln!(out, "{FAINT}{note}{FAINT:#}")?;
    }
    if let Some(solved) = &account.solved {
        writeln!(out, "{}", solution(solved, account))?;
    }
    let (yes, no) = if unicode { ("✔ ", "✘ ") } else { ("", "") };
    match &account.over_budget {
        None => {
            let left = said(&budget, balance.left);
            Ok(writeln!(out, "{GOOD}{yes}within the budget{GOOD:#}: {left} left")?)
        }
        Some(broken) => {
            let missing = said(&budget, broken.lack.needed - broken.lack.left);
            let name = &broken.name;
            Ok(writeln!(out, "{BAD}{no}over the budget{BAD:#}: `{name}` lacks {missing}")?)
        }
    }
}

/// What each row runs, in words.
fn experiments(account: &Account) -> Vec<String> {
    let name = name_width(account);
    let each = |row: &Row| {
        let runs = (row.runs != 1).then(|| format!("{} runs of it", row.runs));
        let parts = row.workload.iter().map(describe).collect::<Vec<_>>().join(", and ");
        let parts: Vec<String> = parts.split(", ").map(String::from).chain(runs).collect();
        list(&format!("  {:<name$}  ", row.name), &parts)
    };
    account.experiments.iter().map(each).collect()
}

fn name_width(account: &Account) -> usize {
    account.experiments.iter().map(|row| row.name.chars().count()).max().unwrap_or(0)
}

fn costs(account: &Account, style: Figures, unicode: bool) -> comfy_table::Table {
    let budget = account.balance.budget;
    let other = budget.unit != Unit::Flops;
    let mut table = new_table(unicode);
    let mut head: Vec<String> = ["experiment", "runs", "FLOPs"].map(String::from).into();
    let unit = if budget.unit == Unit::Dollars { "cost" } else { budget.unit.name() };
    head.extend(other.then(|| unit.to_string()));
    head.extend(["share", "so far", "left"].map(String::from));
    head.extend(account.beside.iter().map(|b| format!("under {}", b.structure)));
    table.set_header(head);
    let mut line = |name: String, runs: u128, flops, cost, running, beside: Option<u128>| {
        let mut cells = vec![name, digits(runs), style.count(flops)];
        cells.extend(other.then(|| short(&budget, style, cost)));
        cells.push(percent(cost as f64 / budget.amount as f64));
        cells.extend([short(&budget, style, running), left(&budget, style, running)]);
        let beside = beside.map_or("-".into(), |flops| style.count(flops));
        cells.extend(account.beside.iter().map(|_| beside.clone()));
        table.add_row(cells);
    };
    let mut running = 0;
    for run in &account.spent {
        running += run.cost;
        line(format!("spent: {}", run.file.display()), 1, run.flops, run.cost, running, None);
    }
    for row in &account.experiments {
        let RowBalance { cost, running, .. } = row.balance;
        line(row.name.clone(), row.runs, row.flops, cost, running, row.beside_flops);
    }
    let Balance { spent, spent_flops, total, total_flops, .. } = account.balance;
    let all = spent + total;
    let runs =
        account.spent.len() as u128 + account.experiments.iter().map(|r| r.runs).sum::<u128>();
    let beside = account.beside.as_ref().and_then(|b| b.total_flops);
    line("total".into(), runs, spent_flops + total_flops, all, all, beside);
    align(&mut table, 1);
    table
}

/// What each row takes, and all of them.
fn times(account: &Account, rate: &Rate, all: &Time, unicode: bool) -> comfy_table::Table {
    let mut table = new_table(unicode);
    let (cost, energy) = (all.dollars.map(|_| "cost"), all.kwh.map(|_| "kWh"));
    let head = ["experiment", "hours", rate.device_hours()];
    table.set_header(head.into_iter().chain(cost).chain(energy));
    let rows = account.experiments.iter().map(|row| (row.name.as_str(), row.time));
    for (name, time) in rows.chain([("total", Some(*all))]) {
        let Some(time) = time else { continue };
        let figures = [amount(time.hours), amount(time.gpu_hours)].into_iter();
        let figures = figures.chain(time.dollars.map(dollars)).chain(time.kwh.map(amount));
        table.add_row([name.to_string()].into_iter().chain(figures));
    }
    align(&mut table, 1);
    table
}

/// An amount of the budget's unit in a sentence: every digit of FLOPs and tokens.
fn said(budget: &Budget, quantity: u128) -> String {
    match budget.unit {
        Unit::Flops | Unit::Tokens => format!("{} {}", digits(quantity), budget.unit.name()),
        Unit::GpuHours => format!("{} {}", amount(budget.shown(quantity)), budget.unit.name()),
        Unit::Dollars => dollars(budget.shown(quantity)),
    }
}

/// The same in a table.
fn short(budget: &Budget, style: Figures, quantity: u128) -> String {
    match budget.unit {
        Unit::Flops | Unit::Tokens => style.count(quantity),
        Unit::GpuHours => amount(budget.shown(quantity)),
        Unit::Dollars => dollars(budget.shown(quantity)),
    }
}

/// What is left of the budget; with a minus sign where it is passed.
fn left(budget: &Budget, style: Figures, running: u128) -> String {
    match budget.amount.checked_sub(running) {
        Some(left) => short(budget, style, left),
        None => format!("-{}", short(budget, style, running - budget.amount)),
    }
}

fn notes(account: &Account) -> Vec<String> {
    let repriced = account.spent.iter().filter_map(|run| {
        let (file, prices) = (run.file.display(), run.repriced_from.as_ref()?);
        Some(format!("{file} was priced under {prices}; priced anew under {}", account.prices.name))
    });
    let unaudited = account.spent.iter().filter(|run| !run.audited);
    let unaudited = unaudited.map(|run| format!("{} was not audited", run.file.display()));
    let longest = |row: &Row| {
        let longest = row.workload.iter().max_by_key(|workload| workload.context())?;
        let (context, most) = (longest.context(), longest.model.max_position_embeddings as u64);
        (context > most).then(|| {
            format!(
                "{}: a context of {} tokens is longer than the model was made for, {}",
                row.name,
                digits(context.into()),
                digits(most.into())
            )
        })
    };
    // What follows a semicolon is advice for the command line.
    let reason = |why: &String| format!("-: {}", why.split(';').next().unwrap_or_default());
    let uncounted = account.beside.iter().flat_map(|b| b.uncounted.iter()).map(reason);
    let longest = account.experiments.iter().filter_map(longest);
    repriced.chain(unaudited).chain(longest).chain(uncounted).collect()
}

fn solution(solved: &Solved, account: &Account) -> String {
    let Solved { experiment, key, value, next_over, beside_value } = solved;
    let NextOver(budget, next_over) = next_over;
    let fits = format!("{experiment}: {key} = {} fits", digits((*value).into()));
    let next = match next_over {
        Some(over) => {
            format!(", {} is {} over", digits(u128::from(*value) + 1), said(budget, *over))
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
