//! Byte layouts of what the driver and the card exchange in memory, a file a layer.
//!
//! Layouts only: little-endian, sizes and offsets asserted, each field with its source. Bit fields are methods
//! on the word that holds them.

/// Check at compile time where the fields of a message lie. Offsets and the size count from the message's start, as
/// in the driver's headers and in the interface sheet; the structs hold the part after the header.
macro_rules! layout {
    ($header:ty, $body:ty = $size:literal { $($field:ident: $offset:literal),* $(,)? }) => {
        const _: () = assert!(size_of::<$header>() + size_of::<$body>() == $size);
        $(const _: () = assert!(size_of::<$header>() + std::mem::offset_of!($body, $field) == $offset);)*
    };
}

/// A struct that lies in memory as it is written here.
macro_rules! wire {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* $field:ident: $ty:ty,)* })+) => {
        $(
            $(#[$meta])*
            #[derive(
                Clone, Copy, Debug, PartialEq, Eq, zerocopy::FromBytes, zerocopy::IntoBytes,
                zerocopy::Immutable, zerocopy::KnownLayout, zerocopy::Unaligned,
            )]
            #[repr(C)]
            pub struct $name { $($(#[$field_meta])* pub $field: $ty,)* }

            impl $name {
                /// Name and bytes of each field.
                pub const FIELDS: $crate::wire::FieldMap = &[$((stringify!($field), {
                    let start = std::mem::offset_of!($name, $field);
                    start..start + size_of::<$ty>()
                }),)*];
            }

            impl Default for $name {
                fn default() -> Self {
                    zerocopy::FromZeros::new_zeroed()
                }
            }
        )+
    };
}

/// Fields of a message: the name and the bytes of each, from where it begins.
pub type FieldMap = &'static [(&'static str, std::ops::Range<usize>)];

pub mod gdma;
pub mod hwc;
pub mod mana;
pub mod queue;
pub mod rx;
pub mod smc;
pub mod tx;
