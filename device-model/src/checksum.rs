//! The Internet checksum (RFC 1071).

use crate::packet::{Ip, IpVersion, Protocol};

/// From how many bytes on it pays to add in lanes.
const LONG: usize = 128;

/// Bytes of a block, see [`add_blocks`].
const BLOCK: usize = 32;
/// Bytes after which the lanes of [`add_blocks`] could overflow, and more.
const MOST: usize = 1 << 20;

/// The sum of the 16-bit words of `blocks`, at most [`MOST`] bytes. Independent lanes, so that there are no carries to
/// chase and the compiler makes vector code of it.
fn add_blocks(blocks: &[[u8; BLOCK]]) -> u64 {
    // A lane adds 32-bit words, which wraps, and their upper halves, which does not: both together tell the sum of the
    // lower halves. That is one operation less than to split each word.
    let (mut whole, mut upper) = ([0u32; BLOCK / 4], [0u32; BLOCK / 4]);
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for ((whole, upper), word) in whole.iter_mut().zip(&mut upper).zip(words) {
            let word = u32::from_le_bytes(*word);
            *whole = whole.wrapping_add(word);
            *upper = upper.wrapping_add(word >> 16);
        }
    }
    let lower = whole.iter().zip(&upper).map(|(whole, upper)| whole.wrapping_sub(upper << 16));
    lower.chain(upper).map(u64::from).sum()
}

/// A running ones' complement sum of 16-bit words.
///
/// Kept in the byte order of memory (little-endian), which RFC 1071 allows: only the folded result is put in order.
#[derive(Clone, Copy, Debug, Default)]
#[must_use]
pub struct Sum(u64);

impl Sum {
    /// Add `bytes`, which start at an even offset of what is summed; an odd last byte is padded with zero.
    #[inline]
    pub fn add_bytes(self, bytes: &[u8]) -> Self {
        let (long, rest) = match bytes.len() {
            0..LONG => (0, bytes),
            _ => {
                let (blocks, rest) = bytes.as_chunks();
                (blocks.chunks(MOST / BLOCK).map(add_blocks).sum(), rest)
            }
        };
        let (words, rest) = rest.as_chunks::<4>();
        let sum = words.iter().fold(long, |sum, word| sum + u64::from(u32::from_le_bytes(*word)));
        let mut tail = [0; 4];
        for (to, from) in tail.iter_mut().zip(rest) {
            *to = *from;
        }
        self.plus(sum + u64::from(u32::from_le_bytes(tail)))
    }
    /// Add one word, given as a number.
    #[inline]
    pub fn add_word(self, word: u16) -> Self {
        self.plus(u64::from(word.swap_bytes()))
    }
    /// Add a 32-bit number as its two words.
    #[inline]
    pub fn add_long(self, long: u32) -> Self {
        self.plus(u64::from(long.swap_bytes()))
    }
    /// The sum in 16 bits.
    #[inline]
    pub fn fold(self) -> u16 {
        let mut sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum = (sum >> 16) + (sum & 0xffff);
        (sum as u16).swap_bytes()
    }
    /// The checksum: the complement of the sum.
    #[inline]
    pub fn checksum(self) -> u16 {
        !self.fold()
    }
    /// What was summed included its checksum, and that was right.
    #[inline]
    pub fn is_valid(self) -> bool {
        self.fold() == 0xffff
    }
    /// End-around carry.
    #[inline]
    fn plus(self, value: u64) -> Self {
        let (sum, carry) = self.0.overflowing_add(value);
        Self(sum + u64::from(carry))
    }
}

/// The pseudo-header of `ip` in `frame`: addresses, protocol and length of transport header and payload
/// (RFC 9293, 3.1; RFC 8200, 8.1). `None` if the addresses lie outside the frame.
#[inline]
pub fn pseudo_header(frame: &[u8], ip: &Ip, protocol: Protocol, transport_len: usize) -> Option<Sum> {
    let addresses = match ip.version {
        IpVersion::V4 => frame.get(ip.offset + 12..ip.offset + 20)?,
        IpVersion::V6 => frame.get(ip.offset + 8..ip.offset + 40)?,
    };
    let sum = Sum::default().add_bytes(addresses).add_word(u16::from(protocol.number()));
    Some(sum.add_long(u32::try_from(transport_len).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn example_of_rfc_1071() {
        let sum = Sum::default().add_bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.fold(), 0xddf2);
        assert_eq!(sum.checksum(), 0x220d);
    }

    #[test]
    fn lanes_do_not_overflow() {
        let bytes = vec![0xff; 3 * MOST + 2];
        assert!(Sum::default().add_bytes(&bytes).is_valid());
        let sum = Sum::default().add_bytes(&[0xff, 0xfe].repeat(MOST));
        // MOST words of 0xfffe are MOST times -1.
        assert_eq!(sum.fold(), 0xffff - (MOST % 0xffff) as u16);
    }

    proptest! {
        #[test]
        fn agrees_with_etherparse(bytes in proptest::collection::vec(any::<u8>(), 0..5000), at in any::<usize>()) {
            let whole = etherparse::checksum::Sum16BitWords::new().add_slice(&bytes).ones_complement().to_be();
            prop_assert_eq!(Sum::default().add_bytes(&bytes).checksum(), whole);
            let (head, tail) = bytes.split_at((at % (bytes.len() + 1)) & !1);
            prop_assert_eq!(Sum::default().add_bytes(head).add_bytes(tail).checksum(), whole);
        }
    }
}
