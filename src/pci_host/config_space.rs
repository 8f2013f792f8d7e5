//! Configuration registers of the functions that belong to the host (bridges, root ports) and of virtio's.

/// Bytes of registers and capabilities; the extended space behind them is empty.
const SIZE: usize = 256;

/// Registers, each bit read-only or writable.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    values: [u8; SIZE],
    writable: [u8; SIZE],
}

impl Default for ConfigSpace {
    fn default() -> Self {
        Self::new()
    }
}

impl ConfigSpace {
    /// All zero and read-only.
    pub fn new() -> Self {
        Self { values: [0; SIZE], writable: [0; SIZE] }
    }

    /// Set a register to `value`.
    pub fn set_u16(&mut self, register: usize, value: u16) {
        self.values[register..register + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Set a register to `value`.
    pub fn set_u32(&mut self, register: usize, value: u32) {
        self.values[register..register + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Let the guest write the bits of `mask`.
    pub fn allow_u16(&mut self, register: usize, mask: u16) {
        self.writable[register..register + 2].copy_from_slice(&mask.to_le_bytes());
    }

    /// Let the guest write the bits of `mask`.
    pub fn allow_u32(&mut self, register: usize, mask: u32) {
        self.writable[register..register + 4].copy_from_slice(&mask.to_le_bytes());
    }

    /// A register's value.
    pub fn u8(&self, register: usize) -> u8 {
        self.values[register]
    }

    /// A register's value.
    pub fn u16(&self, register: usize) -> u16 {
        u16::from_le_bytes([self.values[register], self.values[register + 1]])
    }

    /// A register's value.
    pub fn u32(&self, register: usize) -> u32 {
        u32::from(self.u16(register)) | u32::from(self.u16(register + 2)) << 16
    }

    /// What is kept.
    pub fn save(&self) -> Vec<u8> {
        self.values.to_vec()
    }

    /// Become what was saved, as far as the guest may write it.
    ///
    /// # Errors
    /// It is of another function.
    pub fn load(&mut self, saved: &[u8]) -> anyhow::Result<()> {
        let mut loaded = self.clone();
        loaded.write(0, saved);
        anyhow::ensure!(loaded.values == *saved, "a configuration space that no guest can have written");
        *self = loaded;
        Ok(())
    }

    /// A guest's read of any length.
    pub fn read(&self, register: u16, data: &mut [u8]) {
        let values = self.values.iter().skip(register.into()).copied().chain(std::iter::repeat(0));
        data.iter_mut().zip(values).for_each(|(byte, value)| *byte = value);
    }

    /// A guest's write of any length.
    pub fn write(&mut self, register: u16, data: &[u8]) {
        let registers = self.values.iter_mut().zip(&self.writable).skip(register.into());
        for ((value, mask), byte) in registers.zip(data) {
            *value = *value & !mask | byte & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_allowed_bits_change() {
        let mut config = ConfigSpace::new();
        config.set_u16(4, 0x1000);
        config.allow_u16(4, 0x0106);
        config.write(4, &[0xff, 0xff]);
        assert_eq!(config.u16(4), 0x1106);
        config.write(5, &[0]);
        assert_eq!(config.u16(4), 0x1006);
    }

    #[test]
    fn extended_space_is_empty() {
        let mut config = ConfigSpace::new();
        config.write(0xffe, &[1; 4]);
        let mut data = [0xaa; 4];
        config.read(0xfe, &mut data);
        assert_eq!(data, [0; 4]);
        config.read(0xffe, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
