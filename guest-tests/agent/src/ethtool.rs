//! ethtool's requests (SIOCETHTOOL, and netlink for what came after it), with the numbers and layouts of linux/ethtool.h.
//!
//! An error is the kernel's own, so that what a driver doesn't know can be told from what it refuses.

use std::ffi::CStr;

use anyhow::{Context, Result, ensure};

use crate::net;
use crate::netlink::{self, Family, NESTED, attribute};

const GCOALESCE: u32 = 0x0e;
const SCOALESCE: u32 = 0x0f;
const GRINGPARAM: u32 = 0x10;
const SRINGPARAM: u32 = 0x11;
const GSTRINGS: u32 = 0x1b;
const GSSET_INFO: u32 = 0x37;
const GFEATURES: u32 = 0x3a;
const SFEATURES: u32 = 0x3b;
const GCHANNELS: u32 = 0x3c;
const SCHANNELS: u32 = 0x3d;
const GRSSH: u32 = 0x46;
const SRSSH: u32 = 0x47;

const SS_FEATURES: u32 = 4;
/// ETH_GSTRING_LEN.
const STRING: usize = 32;
/// ETHTOOL_F_UNSUPPORTED: a bit that can't be changed was to be.
const UNSUPPORTED: i32 = 1;
/// ETH_RXFH_INDIR_NO_CHANGE.
const TABLE_AS_IT_IS: u32 = u32::MAX;
/// 32-bit words of struct ethtool_rxfh before its table.
const RSS_HEADER: usize = 6;

/// A structure that is nothing but 32-bit numbers: the requests that read and write it, and what each number is.
#[derive(Debug)]
pub struct Numbers {
    get: u32,
    set: u32,
    /// Names of the words after the request's number, as the tool's options call them; nameless ones are read only
    /// or of no interest.
    names: &'static [&'static str],
}

/// struct ethtool_channels.
pub const CHANNELS: Numbers = Numbers {
    get: GCHANNELS,
    set: SCHANNELS,
    names: &["max-rx", "max-tx", "max-other", "max-combined", "rx", "tx", "other", "combined"],
};
/// struct ethtool_ringparam.
pub const RINGS: Numbers = Numbers {
    get: GRINGPARAM,
    set: SRINGPARAM,
    names: &["max-rx", "max-rx-mini", "max-rx-jumbo", "max-tx", "rx", "rx-mini", "rx-jumbo", "tx"],
};
/// struct ethtool_coalesce.
pub const COALESCE: Numbers = Numbers {
    get: GCOALESCE,
    set: SCOALESCE,
    names: &[
        "rx-usecs",
        "rx-frames",
        "rx-usecs-irq",
        "rx-frames-irq",
        "tx-usecs",
        "tx-frames",
        "tx-usecs-irq",
        "tx-frames-irq",
        "stats-block-usecs",
        "adaptive-rx",
        "adaptive-tx",
        "pkt-rate-low",
        "rx-usecs-low",
        "rx-frame-low",
        "tx-usecs-low",
        "tx-frame-low",
        "pkt-rate-high",
        "rx-usecs-high",
        "rx-frame-high",
        "tx-usecs-high",
        "tx-frame-high",
        "sample-interval",
    ],
};

impl Numbers {
    /// Each number by its name.
    pub fn get(&self, interface: &str) -> Result<Vec<(&'static str, u32)>> {
        let mut words = self.words(self.get);
        call(interface, &mut words)?;
        Ok(self.names.iter().copied().zip(words.into_iter().skip(1)).collect())
    }

    /// Changes the numbers that are named and leaves the others as they are.
    pub fn set(&self, interface: &str, changes: &[(String, u32)]) -> Result<()> {
        let mut words = self.words(self.get);
        call(interface, &mut words)?;
        for (name, value) in changes {
            let found = self.names.iter().position(|known| known == name);
            let index =
                found.with_context(|| format!("there is no '{name}', but {}", self.names.join(", ")))?;
            words[1 + index] = *value;
        }
        words[0] = self.set;
        call(interface, &mut words).map(drop)
    }

    fn words(&self, request: u32) -> Vec<u32> {
        let mut words = vec![0; 1 + self.names.len()];
        words[0] = request;
        words
    }
}

// linux/ethtool_netlink_generated.h
const MSG_COALESCE_GET: u8 = 19;
const MSG_COALESCE_SET: u8 = 20;
const A_HEADER: u16 = 1;
const A_HEADER_DEV_NAME: u16 = 2;
const A_COALESCE_RX_CQE_FRAMES: u16 = 31;

/// Packets that may share a receive completion. Only netlink tells, and only where kernel and driver know of it.
pub fn rx_cqe_frames(interface: &str) -> Result<Option<u32>> {
    let answer = Family::find("ethtool")?.get(MSG_COALESCE_GET, &header(interface));
    let answer = answer.with_context(|| interface.to_owned())?;
    let value =
        netlink::find(&answer, A_COALESCE_RX_CQE_FRAMES).and_then(|value| value.first_chunk().copied());
    Ok(value.map(u32::from_ne_bytes))
}

/// Changes [`rx_cqe_frames`].
pub fn set_rx_cqe_frames(interface: &str, frames: u32) -> Result<()> {
    let attributes = [header(interface), attribute(A_COALESCE_RX_CQE_FRAMES, &frames.to_ne_bytes())].concat();
    Family::find("ethtool")?.set(MSG_COALESCE_SET, &attributes).with_context(|| interface.to_owned())
}

fn header(interface: &str) -> Vec<u8> {
    attribute(A_HEADER | NESTED, &attribute(A_HEADER_DEV_NAME, format!("{interface}\0").as_bytes()))
}

/// What an interface can do, and whether it does (struct ethtool_get_features_block).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// `tx-checksum-ipv4`.
    pub name: String,
    /// It is on.
    pub active: bool,
    /// It can be changed.
    pub changeable: bool,
}

/// All features that the kernel knows.
pub fn features(interface: &str) -> Result<Vec<Feature>> {
    const BLOCK: usize = 4;
    let names = strings(interface, SS_FEATURES)?;
    let blocks = names.len().div_ceil(32);
    let mut words = vec![0; 2 + blocks * BLOCK];
    (words[0], words[1]) = (GFEATURES, blocks as u32);
    call(interface, &mut words)?;
    let feature = |(index, name): (usize, String)| {
        let block = &words[2 + index / 32 * BLOCK..];
        let has = |word: u32| word >> (index % 32) & 1 == 1;
        Feature { name, active: has(block[2]), changeable: has(block[0]) && !has(block[3]) }
    };
    Ok(names.into_iter().enumerate().map(feature).filter(|feature| !feature.name.is_empty()).collect())
}

/// Turns features on or off, all at once.
pub fn set_features(interface: &str, changes: &[(String, bool)]) -> Result<()> {
    let names = strings(interface, SS_FEATURES)?;
    let blocks = names.len().div_ceil(32);
    // struct ethtool_set_features_block: valid, requested.
    let mut words = vec![0; 2 + blocks * 2];
    (words[0], words[1]) = (SFEATURES, blocks as u32);
    for (name, on) in changes {
        let index = names.iter().position(|known| known == name);
        let index = index.with_context(|| format!("the kernel knows no feature '{name}'"))?;
        words[2 + index / 32 * 2] |= 1 << (index % 32);
        words[3 + index / 32 * 2] |= u32::from(*on) << (index % 32);
    }
    let answer = call(interface, &mut words)?;
    let texts: Vec<&str> = changes.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(answer & UNSUPPORTED == 0, "{interface} does not let {} be changed", texts.join(", "));
    Ok(())
}

/// Receive side scaling: where a hash leads, and the key that it is made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rss {
    /// Queue for each value of the hash's low bits.
    pub table: Vec<u32>,
    /// Toeplitz key.
    pub key: Vec<u8>,
}

/// The table and key in force.
pub fn rss(interface: &str) -> Result<Rss> {
    let mut header = vec![0; RSS_HEADER];
    header[0] = GRSSH;
    call(interface, &mut header)?;
    let (entries, key) = (header[2] as usize, header[3] as usize);
    let mut words = header;
    words.resize(RSS_HEADER + entries + key.div_ceil(4), 0);
    call(interface, &mut words)?;
    let bytes = words[RSS_HEADER + entries..].iter().flat_map(|word| word.to_ne_bytes());
    Ok(Rss { table: words[RSS_HEADER..RSS_HEADER + entries].to_vec(), key: bytes.take(key).collect() })
}

/// Another table or key or both; an empty table is the kernel's default one.
pub fn set_rss(interface: &str, table: Option<&[u32]>, key: Option<&[u8]>) -> Result<()> {
    let mut words = vec![0; RSS_HEADER];
    words[0] = SRSSH;
    words[2] = table.map_or(TABLE_AS_IT_IS, |table| table.len() as u32);
    words.extend(table.unwrap_or_default());
    if let Some(key) = key {
        words[3] = key.len() as u32;
        let word = |bytes: &[u8]| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u32::from_ne_bytes(word)
        };
        words.extend(key.chunks(4).map(word));
    }
    call(interface, &mut words).map(drop)
}

/// A set of names.
fn strings(interface: &str, set: u32) -> Result<Vec<String>> {
    // struct ethtool_sset_info: number, reserved, a 64-bit mask, then a count for each bit.
    let mut info = vec![GSSET_INFO, 0, 1 << set, 0, 0];
    call(interface, &mut info)?;
    let count = info[4] as usize;
    let mut words = vec![0; 3 + count * STRING / 4];
    (words[0], words[1], words[2]) = (GSTRINGS, set, count as u32);
    call(interface, &mut words)?;
    let bytes: Vec<u8> = words[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let name =
        |bytes: &[u8]| CStr::from_bytes_until_nul(bytes).unwrap_or_default().to_string_lossy().into_owned();
    Ok(bytes.chunks_exact(STRING).map(name).collect())
}

/// One request; its number is the first word, and the answer comes back in the same place.
fn call(interface: &str, words: &mut [u32]) -> Result<i32> {
    // The kernel reads and writes 64-bit numbers in some of them.
    let mut buffer = vec![0_u64; words.len().div_ceil(2)];
    for (index, word) in words.iter().enumerate() {
        buffer[index / 2] |= u64::from(*word) << (index % 2 * 32);
    }
    let mut request = net::request(interface);
    request.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
    let answer = net::ioctl(libc::SIOCETHTOOL, &mut request).with_context(|| interface.to_owned())?;
    for (index, word) in words.iter_mut().enumerate() {
        *word = (buffer[index / 2] >> (index % 2 * 32)) as u32;
    }
    Ok(answer)
}
