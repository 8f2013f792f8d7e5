//! Expectations on JSON: a path in it and a value.
//!
//! A path is names and indices with dots between them. `*` stands for every element and gives a list, `len` for the
//! number of elements.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Is `wanted` what `path` leads to?
pub fn check(report: &Value, path: &str, wanted: &toml::Value) -> Result<()> {
    let names: Vec<&str> = path.split('.').collect();
    let found = find(report, &names).with_context(|| format!("there is no {path} in {report}"))?;
    let wanted = serde_json::to_value(wanted)?;
    ensure!(found == wanted, "{path} is {found}, not {wanted}");
    Ok(())
}

fn find(value: &Value, path: &[&str]) -> Option<Value> {
    let Some((name, rest)) = path.split_first() else { return Some(value.clone()) };
    match (*name, value) {
        ("*", Value::Array(values)) => values.iter().map(|value| find(value, rest)).collect(),
        ("*", Value::Object(values)) => values.values().map(|value| find(value, rest)).collect(),
        ("len", Value::Array(values)) => Some(values.len().into()),
        ("len", Value::Object(values)) => Some(values.len().into()),
        (name, Value::Array(values)) => find(values.get(name.parse::<usize>().ok()?)?, rest),
        (name, Value::Object(values)) => find(values.get(name)?, rest),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths() {
        let report = json!({ "vectors": [{ "hint": "0" }, { "hint": "1" }], "ok": true });
        let check = |path: &str, wanted: &str| {
            let wanted: toml::Table = format!("value = {wanted}").parse().unwrap();
            check(&report, path, &wanted["value"])
        };
        check("vectors.*.hint", "['0', '1']").unwrap();
        check("vectors.len", "2").unwrap();
        check("vectors.1.hint", "'1'").unwrap();
        check("ok", "true").unwrap();
        assert_eq!(check("vectors.len", "3").unwrap_err().to_string(), "vectors.len is 2, not 3");
        assert!(check("vectors.2.hint", "'1'").is_err());
        assert!(check("vectors.*.hints", "['0', '1']").is_err());
    }
}
