//! llama-bench's JSON (`-o json`, `-o jsonl`).
//!
//! Source: `test_prompt`, `test_gen` and `json_printer` in tools/llama-bench/llama-bench.cpp of
//! ggml-org/llama.cpp, and its README. It states tokens and times, and no FLOPs: a test is matched
//! with the workload, whose FLOPs by its time are a rate.

use serde::Deserialize;

use super::Told;
use crate::{
    analytic::Structure,
    prices::Prices,
    workload::{Logits, Task, Workload},
};

/// One test: a prompt fed in parts of `n_ubatch` at `n_depth`, tokens fed one by one after it.
#[derive(Debug, Deserialize)]
pub(super) struct Test {
    n_prompt: u64,
    n_gen: u64,
    #[serde(default)]
    n_depth: u64,
    n_ubatch: Option<u64>,
    model_n_params: Option<u64>,
    avg_ns: u64,
}

/// All tests of a file.
#[derive(Debug)]
pub(super) struct Tests(Vec<Test>);

impl Tests {
    pub(super) fn read(objects: &[serde_json::Value]) -> Result<Self, String> {
        let tests = objects.iter().enumerate().map(|(index, json)| {
            let test: Test = serde_path_to_error::deserialize(json)
                .map_err(|e| format!("test {}: {e}", index + 1))?;
            match (test.avg_ns, test.n_prompt, test.n_gen) {
                (0, ..) => Err(format!("test {}: `avg_ns` is 0", index + 1)),
                (_, 0, 0) => Err(format!("test {}: runs no token", index + 1)),
                _ => Ok(test),
            }
        });
        Ok(Self(tests.collect::<Result<_, _>>()?))
    }

    pub(super) fn told(&self, workload: &Workload) -> Result<Told, String> {
        let shapes: Vec<[u64; 3]> = match workload.task {
            Task::Forward { batch: 1, seq, past, logits: Logits::Last, sequences: None } => {
                vec![[seq, 0, past]]
            }
            // A generation's last token is never fed; llama-bench feeds all of n_gen.
            Task::Generate {
                batch: 1,
                past: 0,
                prompt_tokens,
                new_tokens,
                kv_cache: true,
                ref then,
                ..
            } if then.is_empty() => {
                let alone = (prompt_tokens == 1).then_some([0, new_tokens, 0]);
                alone.into_iter().chain([[prompt_tokens, new_tokens - 1, 0]]).collect()
            }
            Task::Forward { .. }
            | Task::Generate { .. }
            | Task::Verify { .. }
            | Task::Evaluate { .. }
            | Task::Train { .. } => vec![],
        };
        let found: Vec<&Test> = self.0.iter().filter(|t| shapes.contains(&t.shape())).collect();
        let test = match found[..] {
            [test] => test,
            [] => {
                let mut known: Vec<String> = self.0.iter().map(Test::command).collect();
                known.dedup();
                return Err(format!("has no test of this workload; it has {}", known.join(", ")));
            }
            [..] => return Err(format!("has {} tests of this workload; keep one", found.len())),
        };
        let mut notes = vec![format!("{}: {} ns, and no FLOPs stated", test.name(), test.avg_ns)];
        let parameters = workload.model.parameters();
        if let Some(stated) = test.model_n_params.filter(|n| u128::from(*n) != parameters) {
            let differs = format!("its model has {stated} parameters, the workload's {parameters}");
            // A file may store its head apart, though the model ties it to the embedding.
            let table = workload.model.vocab_size as u128 * workload.model.hidden_size as u128;
            if u128::from(stated) != parameters + table {
                return Err(differs);
            }
            notes.push(differs);
        }
        if let Some(part) = test.n_ubatch.filter(|part| *part < test.n_prompt) {
            notes.push(format!(
                "it feeds the prompt {part} tokens at a time, which score fewer keys than counted"
            ));
        }
        Ok(Told {
            structures: &[Structure::Torch],
            prices: Prices::matmul(),
            stated: None,
            seconds: Some(test.avg_ns as f64 / 1e9),
            facts: vec![],
            notes,
        })
    }
}

impl Test {
    fn shape(&self) -> [u64; 3] {
        [self.n_prompt, self.n_gen, self.n_depth]
    }

    /// As llama-bench names it.
    fn name(&self) -> String {
        let depth = if self.n_depth > 0 { format!(" @ d{}", self.n_depth) } else { String::new() };
        match (self.n_prompt, self.n_gen) {
            (prompt, 0) => format!("pp{prompt}{depth}"),
            (0, generated) => format!("tg{generated}{depth}"),
            (prompt, generated) => format!("pp{prompt}+tg{generated}{depth}"),
        }
    }

    /// The workload that it is, where there is one.
    fn command(&self) -> String {
        let as_flags = match self.shape() {
            [prompt, 0, 0] => format!("forward --seq {prompt} --logits last"),
            [prompt, 0, past] => format!("forward --seq {prompt} --past {past} --logits last"),
            [0, n, 0] => format!("generate --prompt-tokens 1 --new-tokens {n}"),
            [prompt, n, 0] => {
                format!("generate --prompt-tokens {prompt} --new-tokens {}", n.saturating_add(1))
            }
            [_, _, _] => return self.name(),
        };
        format!("{} (`{as_flags}`)", self.name())
    }
}
