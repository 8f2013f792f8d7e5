//! The kernel's last words on its console.

/// Lines that begin a report of the kernel about itself.
const BEGINNINGS: [&str; 8] = [
    "BUG: ",
    "Oops: ",
    "general protection fault",
    "[ cut here ]",
    "WARNING: possible ",
    "WARNING: CPU",
    "INFO: task ",
    "Kernel panic - not syncing",
];
/// Lines of a report that are shown.
const LONGEST: usize = 60;

/// The first report on `console`, from what is wrong to the end of its call trace.
pub fn report(console: &str) -> Option<String> {
    let lines: Vec<&str> = console.lines().map(without_time).collect();
    let start = lines.iter().position(|line| BEGINNINGS.iter().any(|text| line.contains(text)))?;
    let is_end = |line: &&str| line.contains("end trace") || line.contains("</TASK>");
    let end = lines[start..].iter().position(is_end).map_or(lines.len(), |end| start + end + 1);
    let end = end.min(start + LONGEST);
    Some(lines[start..end].join("\n"))
}

/// What is wrong and where, in a line: the message and the function in which it happened.
pub fn summary(report: &str) -> String {
    let mut lines = report.lines().filter(|line| !line.contains("[ cut here ]"));
    let message = lines.next().unwrap_or_default().trim();
    let place = report.lines().find_map(|line| line.trim().strip_prefix("RIP: ")?.split_once(':'));
    match place {
        Some((_, place)) => format!("{message} in {}", place.trim()),
        None => message.to_owned(),
    }
}

/// A line without `[    1.234567]`, which the console has and the log's reader may put after `<4>`.
fn without_time(line: &str) -> &str {
    let line = line.trim_end();
    match line.split_once("] ") {
        Some((time, rest)) if time.trim_start().starts_with('[') => rest,
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_null_dereference() {
        let console = "[    1.0] mana: up\r\n[    2.0] BUG: kernel NULL pointer dereference, address: 0\r\n\
                       [    2.1] Oops: Oops: 0000 [#1] SMP\r\n[    2.1] RIP: 0010:mana_gd_setup+0x1d3/0x620 [mana]\r\n\
                       [    2.2] Call Trace:\r\n[    2.2]  <TASK>\r\n[    2.2]  mana_gd_probe+0x1/0x2\r\n\
                       [    2.2]  </TASK>\r\n[    2.3] Modules linked in: mana\r\n";
        let report = report(console).unwrap();
        assert!(report.ends_with("</TASK>") && report.starts_with("BUG: "));
        assert_eq!(
            summary(&report),
            "BUG: kernel NULL pointer dereference, address: 0 in mana_gd_setup+0x1d3/0x620 [mana]"
        );
        assert_eq!(super::report("[    1.0] all is well\n"), None);
    }
}
