//! The two countings of what is executed: the closed form is the sum of the predicted ledger,
//! component by component, and both are what a hand computes.

mod random;

use flopaudit_count::{
    analytic::{Structure, closed_form, count, predict},
    audit::Audit,
    prices::Prices,
    workload::Task,
};
use proptest::prelude::*;
use random::{BLOCKS, LARGE, SMALL, workloads};

/// Every source of one side of the two.
fn sources(files: &[&str]) -> String {
    let analytic = concat!(env!("CARGO_MANIFEST_DIR"), "/src/analytic");
    let read = |file: &&str| std::fs::read_to_string(format!("{analytic}/{file}")).unwrap();
    files.iter().map(read).collect()
}

#[test]
fn the_two_share_no_derivation() {
    let listed =
        sources(&["predict/mod.rs", "predict/flow.rs", "predict/blocks.rs", "predict/training.rs"]);
    let closed =
        sources(&["closed_form.rs", "training.rs", "moments.rs", "blocked.rs", "pieces.rs"]);
    let imports = |source: &str| -> Vec<String> {
        source.split("use ").skip(1).map(|rest| rest.split(';').next().unwrap().into()).collect()
    };
    for import in imports(&listed) {
        let other = ["closed_form", "moments", "blocked", "pieces"]
            .iter()
            .any(|side| import.contains(side));
        assert!(!other && !import.contains("super::super"), "{import}");
    }
    for import in imports(&closed) {
        assert!(!import.contains("predict") && !import.contains("ledger::Op"), "{import}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn the_closed_form_is_the_sum_of_the_predicted_ledger(workload in workloads(SMALL)) {
        let ledger = predict(&workload).unwrap();
        let audit = Audit::new(std::slice::from_ref(&workload), &ledger).unwrap();
        prop_assert!(audit.balanced(), "{:#?}", audit.sum_differences);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn lengths_of_a_few_blocks_too(workload in workloads(BLOCKS)) {
        let ledger = predict(&workload).unwrap();
        let audit = Audit::new(std::slice::from_ref(&workload), &ledger).unwrap();
        prop_assert!(audit.balanced(), "{:#?}", audit.sum_differences);
    }

    #[test]
    fn large_models_too(workload in workloads(LARGE)) {
        // A long generation lists every token of every layer; the other tasks are short lists.
        let workload = workload.with_new_tokens(1);
        let ledger = predict(&workload).unwrap();
        let audit = Audit::new(std::slice::from_ref(&workload), &ledger).unwrap();
        prop_assert!(audit.balanced(), "{:#?}", audit.sum_differences);
    }

    #[test]
    fn torch_dispatches_every_product_that_runs(workload in workloads(LARGE)) {
        prop_assume!(!matches!(workload.task, Task::Train { recompute: true, .. }));
        let torch = count(Structure::Torch, &workload).unwrap().sum(|_, _| true).unwrap();
        let exact = closed_form(&workload.dense()).unwrap().sum(|_, _| true).unwrap();
        prop_assert_eq!(torch.macs, exact.macs);
        prop_assert_eq!(Prices::coursework().flops(&torch).unwrap(), 2 * exact.macs);
    }
}
