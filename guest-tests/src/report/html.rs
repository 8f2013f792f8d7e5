//! The report for people: `report.html`, one page that needs nothing else.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use super::record::Record;

const PAGE: &str = include_str!("html/page.html");
const STYLE: &str = include_str!("html/style.css");
const SCRIPT: &str = include_str!("html/script.js");

/// Writes `report.html` into `folder`, headed with `line`.
pub fn write(folder: &Path, records: &[Record], line: &str) -> Result<()> {
    let file = folder.join("report.html");
    // A "</script>" in a log must not end the script.
    let data = json!({ "line": line, "runs": records }).to_string().replace('<', "\\u003c");
    let page = PAGE.replace("{{style}}", STYLE).replace("{{script}}", SCRIPT).replace("{{data}}", &data);
    fs::write(&file, page).with_context(|| file.display().to_string())
}
