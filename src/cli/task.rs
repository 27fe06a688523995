//! Flags of workloads, made from the one vocabulary of their dimensions.

use clap::{
    Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, error::ErrorKind,
    parser::ValueSource,
};

use crate::workload::{Form, Key, Kind, Task, Value};

macro_rules! tasks {
    ($($(#[$doc:meta])* $name:ident: $kind:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $name(Task);

        impl $name {
            /// The task.
            pub fn task(&self) -> Task {
                self.0.clone()
            }
        }

        impl Args for $name {
            fn augment_args(command: Command) -> Command {
                with_flags(command, Kind::$kind)
            }

            fn augment_args_for_update(command: Command) -> Command {
                with_flags(command, Kind::$kind)
            }
        }

        impl FromArgMatches for $name {
            fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
                read(Kind::$kind, matches).map(Self)
            }

            fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
                self.0 = read(Kind::$kind, matches)?;
                Ok(())
            }
        }
    )*};
}

tasks! {
    /// The dimensions of a forward pass.
    ForwardArgs: Forward;
    /// The dimensions of a generation.
    GenerationArgs: Generate;
    /// The dimensions of rounds of verification.
    VerificationArgs: Verify;
    /// The dimensions of a training.
    TrainingArgs: Train;
    /// The dimensions of an evaluation.
    EvaluationArgs: Evaluate;
}

/// Dimensions that stand on the command line, and are no defaults.
#[derive(Debug, Clone)]
pub struct Given(pub Vec<Key>);

impl Args for Given {
    fn augment_args(command: Command) -> Command {
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        command
    }
}

impl FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |key: &Key| {
            let id = id(*key);
            matches.try_contains_id(&id).is_ok()
                && matches.value_source(&id) == Some(ValueSource::CommandLine)
        };
        Ok(Self(Key::ALL.into_iter().filter(given).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A key's name in clap.
fn id(key: Key) -> String {
    key.name().replace('-', "_")
}

fn with_flags(command: Command, kind: Kind) -> Command {
    let command = kind.keys().fold(command, |command, key| command.arg(flag(key, kind)));
    // Flags of lengths are added after these, so they are hidden when all are known.
    match kind {
        Kind::Forward | Kind::Generate => command.defer(|command| without(command, &OF_DATA)),
        Kind::Verify => command.defer(|command| {
            without(without(command, &OF_DATA), &["lengths", "layout", "packing"])
        }),
        Kind::Train | Kind::Evaluate => command,
    }
}

/// Flags that text alone needs.
const OF_DATA: [&str; 4] = ["data", "mask_prompt", "seed", "template"];

/// The command with these flags of lengths not offered: they are refused by name.
fn without(command: Command, flags: &[&str]) -> Command {
    let has_lengths = command.get_arguments().any(|arg| arg.get_id() == "lengths");
    command.mut_args(|arg| {
        let hide = has_lengths && flags.contains(&arg.get_id().as_str());
        if hide { arg.hide(true) } else { arg }
    })
}

fn flag(key: Key, kind: Kind) -> Arg {
    let heading = if key.is_sampling() { "Sampling" } else { "Workload" };
    let arg = Arg::new(id(key)).help(key.help()).help_heading(heading);
    let form = key.form();
    let valued = || {
        let arg = arg.clone().long(key.name()).value_name(key.value_name());
        let arg = arg.value_parser(move |text: &str| form.parse(text)).allow_negative_numbers(true);
        match key.get(&kind.task()) {
            Some(value) => arg.default_value(value.to_string()),
            None => arg,
        }
    };
    match form {
        Form::Switch => arg.long(key.name()).action(ArgAction::SetTrue),
        Form::Off => arg.long(format!("no-{}", key.name())).action(ArgAction::SetTrue),
        Form::Turns => valued().action(ArgAction::Append),
        Form::Count | Form::Natural | Form::Real | Form::Logits | Form::Moments => valued(),
    }
}

fn read(kind: Kind, matches: &ArgMatches) -> Result<Task, clap::Error> {
    let mut task = kind.task();
    for key in kind.keys() {
        let id = id(key);
        let values: Vec<Value> = match key.form() {
            Form::Switch => vec![Value::Switch(matches.get_flag(&id))],
            Form::Off => vec![Value::Switch(!matches.get_flag(&id))],
            Form::Count
            | Form::Natural
            | Form::Real
            | Form::Logits
            | Form::Moments
            | Form::Turns => matches.get_many(&id).into_iter().flatten().cloned().collect(),
        };
        for value in values {
            let wrong = |why| {
                let why = format!("--{}: {why}", key.name());
                clap::Error::raw(ErrorKind::ValueValidation, why)
            };
            key.set(&mut task, &value).map_err(wrong)?;
        }
    }
    Ok(task)
}
