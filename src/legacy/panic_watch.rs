//! Reads the guest's console for the words of a kernel in trouble, since most kernels load no pvpanic driver.

/// Longer lines are no kernel's.
const MAX_LINE: usize = 1024;

/// Puts the console's bytes together to lines and looks for a panic or an oops among them.
#[derive(Default)]
pub(super) struct PanicWatch {
    line: Vec<u8>,
}

impl PanicWatch {
    /// One more byte; the answer is a whole line that tells of a panic or an oops.
    pub(super) fn byte(&mut self, byte: u8) -> Option<String> {
        match byte {
            b'\n' => {
                let line = std::mem::take(&mut self.line);
                let line = String::from_utf8_lossy(&line);
                tells_of_trouble(&line).then(|| line.trim_end().to_owned())
            }
            _ if self.line.len() < MAX_LINE => {
                self.line.push(byte);
                None
            }
            _ => None,
        }
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

    fn troubles(text: &str) -> Vec<String> {
        let mut watch = PanicWatch::default();
        text.bytes().filter_map(|byte| watch.byte(byte)).collect()
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
            assert_eq!(troubles(&format!("ok\r\n{line}\r\nrest")), [line]);
        }
    }

    #[test]
    fn other_words_are_no_trouble() {
        let text =
            "issue [#1] is fixed\nOops, I said\n[#1]\n[    0.1] Linux version 6.1 (x [#2\n 0000 [#x]\n";
        assert_eq!(troubles(text), Vec::<String>::new());
        assert_eq!(troubles("[    1.5] Kernel panic - not syncing"), Vec::<String>::new());
    }

    #[test]
    fn endless_lines_take_no_endless_memory() {
        let mut watch = PanicWatch::default();
        for _ in 0..100_000 {
            assert_eq!(watch.byte(b'x'), None);
        }
        assert!(watch.line.capacity() <= 2 * MAX_LINE);
    }
}
