//! What several modules' tests share.

/// Numbers that look random and are the same each time (xorshift64).
pub struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self(0x2545_f491_4f6c_dd1d)
    }
}

impl Random {
    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 as usize % end
    }

    /// `sound` with `changes` bits flipped, half of them behind `most`, which is the most of it and checks the least.
    pub fn damaged(&mut self, sound: &[u8], most: usize, changes: usize) -> Vec<u8> {
        let mut bytes = sound.to_vec();
        for _ in 0..changes {
            let begin = [0, most][self.below(2)];
            bytes[begin + self.below(sound.len() - begin)] ^= 1 << self.below(8);
        }
        bytes
    }
}
