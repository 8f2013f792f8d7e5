//! Files read and written straight from and into guest memory, which a guest may change at any time.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

/// Most pieces of memory at once: more than a MANA WQE (`MAX_TX_WQE_SGL_ENTRIES`, gdma.h: 30) or a virtio request has,
/// and no more than Linux takes (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 256;

/// The pieces as the kernel wants them: up to [`MAX_PIECES`], and one in front.
struct Vectors {
    vectors: [libc::iovec; 1 + MAX_PIECES],
    len: usize,
}

impl Vectors {
    fn new(slices: &[VolatileSlice<'_>]) -> io::Result<Self> {
        if slices.len() > MAX_PIECES {
            return Err(ErrorKind::InvalidInput.into());
        }
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let mut vectors = Self { vectors: [none; 1 + MAX_PIECES], len: slices.len() };
        for (vector, slice) in vectors.vectors[1..].iter_mut().zip(slices) {
            *vector = libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
        }
        Ok(vectors)
    }
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Write `head` and then `slices` to `file` in one call; the answer is the bytes taken.
///
/// # Errors
/// The host's, or more than [`MAX_PIECES`].
pub fn write(file: &File, head: &mut [u8], slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut all = Vectors::new(slices)?;
    all.vectors[0] = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() };
    let len = 1 + all.len as libc::c_int;
    // SAFETY: the first vector is `head`, every other a VolatileSlice, which is readable memory for as long as `slices`
    // is borrowed; that the guest may write it meanwhile is as harmless to the kernel as any shared mapping.
    count(unsafe { libc::writev(file.as_raw_fd(), all.vectors.as_ptr(), len) })
}

/// Fill `slices` from `file` at byte `offset`, all of them.
///
/// # Errors
/// The host's, a file that ends before, or more than [`MAX_PIECES`].
pub fn read_all_at(file: &File, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    all_at(slices, offset, ErrorKind::UnexpectedEof, |vectors, len, offset| {
        // SAFETY: every vector is a VolatileSlice, which is writable memory for as long as `slices` is borrowed, and
        // which nobody but the guest and others who know it for volatile looks at.
        unsafe { libc::preadv(file.as_raw_fd(), vectors, len, offset) }
    })
}

/// Write `slices` to `file` at byte `offset`, all of them.
///
/// # Errors
/// The host's, or more than [`MAX_PIECES`].
pub fn write_all_at(file: &File, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    all_at(slices, offset, ErrorKind::WriteZero, |vectors, len, offset| {
        // SAFETY: every vector is a VolatileSlice, which is readable memory for as long as `slices` is borrowed.
        unsafe { libc::pwritev(file.as_raw_fd(), vectors, len, offset) }
    })
}

fn all_at(
    slices: &[VolatileSlice<'_>],
    mut offset: u64,
    at_end: ErrorKind,
    mut transfer: impl FnMut(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    let mut all = Vectors::new(slices)?;
    let mut rest = &mut all.vectors[1..=all.len];
    while !rest.is_empty() {
        let position = libc::off_t::try_from(offset).map_err(|_| ErrorKind::InvalidInput)?;
        let mut done = match count(transfer(rest.as_ptr(), rest.len() as libc::c_int, position)) {
            Ok(0) if rest.iter().any(|vector| vector.iov_len > 0) => return Err(at_end.into()),
            Ok(done) => done,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        offset += done as u64;
        while let Some(first) = rest.first_mut() {
            let now = done.min(first.iov_len);
            done -= now;
            if now < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(now);
                first.iov_len -= now;
                break;
            }
            rest = &mut std::mem::take(&mut rest)[1..];
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_pieces_arrive_in_order_even_empty_ones() {
        let file = tempfile::tempfile().unwrap();
        let mut parts = [vec![1; 10], vec![], vec![2; 5000], vec![3; 1]];
        let slices: Vec<_> = parts.iter_mut().map(|part| VolatileSlice::from(part.as_mut_slice())).collect();
        write_all_at(&file, &slices, 100).unwrap();
        let mut back = vec![0; 5011];
        let (first, second) = back.split_at_mut(4000);
        let slices = [VolatileSlice::from(first), VolatileSlice::from(second)];
        read_all_at(&file, &slices, 100).unwrap();
        let mut seen = [vec![0_u8; 4000], vec![0; 1011]];
        for (slice, seen) in slices.iter().zip(&mut seen) {
            slice.copy_to(seen.as_mut_slice());
        }
        assert!(seen.concat() == [vec![1; 10], vec![2; 5000], vec![3; 1]].concat(), "not what was written");
        assert_eq!(read_all_at(&file, &slices, 101).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(read_all_at(&file, &[], 1 << 40).map_err(|error| error.kind()), Ok(()));
        let many = vec![slices[0]; MAX_PIECES + 1];
        assert_eq!(write_all_at(&file, &many, 0).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
