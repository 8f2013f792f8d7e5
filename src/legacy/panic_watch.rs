//! Reads the guest's console for the words of a kernel in trouble, since most kernels load no pvpanic driver.

/// Longer lines are no kernel's.
const MAX_LINE: usize = 1024;

/// A report that is so many lines old doesn't belong to an oops any more. What comes between them tells which page was
/// looked up, and in what table (`show_fault_oops` of arch/x86/mm/fault.c).
const CLOSE: usize = 8;

/// Puts the console's bytes together to lines and looks for a panic or an oops among them.
#[derive(Default)]
pub(super) struct PanicWatch {
    line: Vec<u8>,
    /// The last line that begins a report, and how many came after it.
    report: Option<(String, usize)>,
    bug: Option<String>,
    trouble: Option<String>,
}

impl PanicWatch {
    /// One more byte; the answer is whether it ends the first line that tells of a panic or an oops.
    pub(super) fn byte(&mut self, byte: u8) -> bool {
        match byte {
            b'\n' => {
                let line = std::mem::take(&mut self.line);
                self.line(String::from_utf8_lossy(&line).trim_end())
            }
            _ if self.line.len() < MAX_LINE => {
                self.line.push(byte);
                false
            }
            _ => false,
        }
    }

    /// What the kernel said of its trouble: the line that tells of it, behind the one that says what it is about
    /// (`WARNING: file:line at function`, `BUG: what`), and with the function if a later line has it.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// The last line that reports a bug which the kernel has survived, if there was none that it hasn't.
    pub(super) fn bug(&self) -> Option<&str> {
        self.bug.as_deref().filter(|_| self.trouble.is_none())
    }

    fn line(&mut self, line: &str) -> bool {
        if without_time(line).starts_with("BUG: ") {
            self.bug = Some(line.to_owned());
        }
        if let Some(trouble) = &mut self.trouble {
            if let Some((_, place)) = line.split_once(" RIP: ").filter(|_| symbol(trouble).is_none()) {
                *trouble += "; RIP: ";
                *trouble += place;
            }
            return false;
        }
        if tells_of_trouble(line) {
            let belongs = |(_, age): &(String, usize)| *age < CLOSE || line.contains("panic_on_warn");
            self.trouble = Some(match self.report.take().filter(belongs) {
                Some((report, _)) => format!("{report}; {}", without_time(line)),
                None => line.to_owned(),
            });
            return true;
        }
        if ["WARNING: ", "BUG: "].iter().any(|word| without_time(line).starts_with(word)) {
            self.report = Some((line.to_owned(), 0));
        } else if let Some((_, age)) = &mut self.report {
            *age += 1;
        }
        false
    }
}

/// A line without the seconds in brackets that it begins with.
fn without_time(line: &str) -> &str {
    let rest = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    rest.map_or(line, |(_, rest)| rest)
}

/// The first function that `text` names the kernel's way: `mana_poll+0x6d7/0x870`, without the function's length.
fn symbol(text: &str) -> Option<&str> {
    text.split(|c: char| c.is_whitespace() || c == ':').find_map(|word| {
        let (place, length) = word.split_once('/')?;
        (place.contains("+0x") && length.starts_with("0x")).then_some(place)
    })
}

/// What a line of trouble is about, the same whenever and on whatever CPU it happens: its first word and the function,
/// or all of it if it names no function.
pub fn what(trouble: &str) -> String {
    let text = without_time(trouble);
    match (text.split_once(':'), symbol(text)) {
        (Some((kind, _)), Some(place)) => format!("{kind} at {place}"),
        _ => text.to_owned(),
    }
}

/// `panic()`'s message, or one of `__die()`, which ends with an error code and the number of the oops:
/// `Oops: 0002 [#1] PREEMPT SMP` (arch/x86/kernel/dumpstack.c, kernel/panic.c).
fn tells_of_trouble(line: &str) -> bool {
    line.contains("Kernel panic - not syncing")
        || line.split(" [#").skip(1).any(starts_with_oops_number) && has_code(line)
}

fn starts_with_oops_number(rest: &str) -> bool {
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    digits > 0 && rest[digits..].starts_with(']')
}

/// Four hexadecimal digits before the number.
fn has_code(line: &str) -> bool {
    let code = line.split(" [#").next().and_then(|before| before.rsplit(' ').next());
    code.is_some_and(|code| code.len() == 4 && code.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(text: &str) -> Option<String> {
        let mut watch = PanicWatch::default();
        let told = text.bytes().filter(|&byte| watch.byte(byte)).count();
        assert_eq!(told, usize::from(watch.trouble().is_some()), "{text}");
        watch.trouble().map(str::to_owned)
    }

    #[test]
    fn kernels_words_are_known() {
        for line in [
            "[    1.5] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
            "[    1.5] Oops: 0002 [#1] PREEMPT SMP NOPTI",
            "[    1.5] Oops: Oops: 0002 [#1] SMP NOPTI",
            "[    1.5] general protection fault, probably for non-canonical address 0xdead: 0000 [#2] PREEMPT SMP",
            "[    1.5] invalid opcode: 0000 [#13] PREEMPT SMP",
        ] {
            assert_eq!(trouble(&format!("ok\r\n{line}\r\nrest")).as_deref(), Some(line));
        }
    }

    #[test]
    fn other_words_are_no_trouble() {
        let text =
            "issue [#1] is fixed\nOops, I said\n[#1]\n[    0.1] Linux version 6.1 (x [#2\n 0000 [#x]\n";
        assert_eq!(trouble(text), None);
        assert_eq!(trouble("[    1.5] Kernel panic - not syncing"), None);
        assert_eq!(trouble("[    1.5] WARNING: CPU: 0 PID: 0 at a.c:1 f+0x1/0x2 [mana]\n"), None);
    }

    #[test]
    fn trouble_says_what_it_is_about() {
        let warning =
            "[    1.5] WARNING: drivers/net/a.c:925 at mana_poll+0x2b6/0x2d0 [mana], CPU#0: swapper/0/0";
        let panic = "Kernel panic - not syncing: kernel: panic_on_warn set ...";
        let more = "[ 1.5] line\n".repeat(50);
        let said = trouble(&format!("{warning}\n{more}[    1.6] {panic}\n[ 1.6] RIP: 0010:other+0x1/0x2\n"))
            .unwrap();
        assert_eq!(said, format!("{warning}; {panic}"));
        assert_eq!(what(&said), "WARNING at mana_poll+0x2b6");

        let oops = "[    2.5] BUG: kernel NULL pointer dereference, address: 0000000000000008\n\
            [    2.5] #PF: supervisor read access in kernel mode\n\
            [    2.5] Oops: Oops: 0000 [#1] SMP NOPTI\n\
            [    2.5] RIP: 0010:mana_rx+0x1f/0x80 [mana]\n";
        let said = trouble(oops).unwrap();
        assert!(
            said.contains("address: 0000000000000008; Oops: Oops: 0000 [#1] SMP NOPTI; RIP: 0010:mana_rx"),
            "{said}"
        );
        assert_eq!(what(&said), "BUG at mana_rx+0x1f");

        let late =
            trouble(&format!("{warning}\n{more}[ 9.9] Kernel panic - not syncing: no init\n")).unwrap();
        assert_eq!(
            what(&late),
            "Kernel panic - not syncing: no init",
            "an old report has nothing to do with it"
        );
    }

    #[test]
    fn endless_lines_take_no_endless_memory() {
        let mut watch = PanicWatch::default();
        for _ in 0..100_000 {
            assert!(!watch.byte(b'x'));
        }
        assert!(watch.line.capacity() <= 2 * MAX_LINE);
    }
}
