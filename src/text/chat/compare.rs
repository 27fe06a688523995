//! `<`, `<=`, `>` and `>=` as Python has them: between values of different kinds there is no order.

use std::cmp::Ordering;

use minijinja::{Error, Value, value::ValueKind};

use super::{display::is_unshown, python::fail};

/// `a op b`, where the operator is one of the four.
pub(super) fn compare(op: &str, a: &Value, b: &Value) -> Result<bool, Error> {
    let holds = match op {
        "<" => Ordering::is_lt,
        "<=" => Ordering::is_le,
        ">" => Ordering::is_gt,
        _ => Ordering::is_ge,
    };
    Ok(order(a, b)?.is_some_and(holds))
}

/// Which comes first; `None` of what is no number.
fn order(a: &Value, b: &Value) -> Result<Option<Ordering>, Error> {
    use ValueKind::{Bool, Iterable, Number, Seq, String};
    let list = |value: &Value| !is_unshown(value);
    match (a.kind(), b.kind()) {
        (Number | Bool, Number | Bool) => {
            let number = |value: &Value| match value.kind() {
                Bool => Value::from(i64::from(value.is_true())),
                _ => value.clone(),
            };
            let is_nan = |value: &Value| f64::try_from(value.clone()).is_ok_and(f64::is_nan);
            let (a, b) = (number(a), number(b));
            Ok((!is_nan(&a) && !is_nan(&b)).then(|| a.cmp(&b)))
        }
        (String, String) => Ok(Some(a.as_str().cmp(&b.as_str()))),
        (Seq | Iterable, Seq | Iterable) if list(a) && list(b) && a.is_tuple() == b.is_tuple() => {
            let (a, b): (Vec<Value>, Vec<Value>) =
                (a.try_iter()?.collect(), b.try_iter()?.collect());
            match a.iter().zip(&b).find(|(a, b)| a != b) {
                Some((a, b)) => order(a, b),
                None => Ok(Some(a.len().cmp(&b.len()))),
            }
        }
        (a, b) => fail(format!("Python has no order between a {a} and a {b}")),
    }
}
