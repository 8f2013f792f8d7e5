//! Numbers that a seed decides.

use std::fmt::Write as _;

/// A sequence that is the same for the same seed (SplitMix64).
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// The `stream`-th sequence of `seed`.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut random = Self(seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random.next();
        random
    }
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next().checked_rem(end).unwrap_or(0)
    }
    /// Change one to four bytes; the answer tells which, in words.
    pub fn corrupt(&mut self, bytes: &mut [u8]) -> String {
        let mut changes = String::new();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() as u64) as usize;
            let change = 1 + self.below(0xff) as u8;
            let Some(byte) = bytes.get_mut(at) else { return "no byte to change".into() };
            let comma = if changes.is_empty() { "" } else { ", " };
            let _ = write!(changes, "{comma}byte {at} {byte:#04x} becomes {:#04x}", *byte ^ change);
            *byte ^= change;
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_tells_the_same_lie() {
        let lie = |seed, stream| {
            let mut bytes = [0; 64];
            let words = Random::new(seed, stream).corrupt(&mut bytes);
            (bytes, words)
        };
        assert_eq!(lie(7, 1), lie(7, 1));
        assert_ne!(lie(7, 1), lie(7, 2));
        assert_ne!(lie(7, 1), lie(8, 1));
        assert_ne!(lie(7, 1).0, [0; 64]);
        assert_eq!(Random::new(1, 1).corrupt(&mut []), "no byte to change");
    }
}
