//! Indices on a device: ids of rows, and lengths of sequences.
//!
//! Invariant: as many indices as it was made for lie in memory of its own; what they may be is checked where they are
//! used.

use std::sync::{Arc, RwLock};

use super::{Device, Inner, other_device};
use crate::cpu::{SharedIndices, read, write};
use crate::error::{Result, checked_mul, expect_len};
use crate::gpu::BufferRange;

/// A vector of u32 on a device: ids of rows, or lengths of sequences. Cloning gives another handle to the same memory.
#[derive(Clone, Debug)]
pub struct Indices {
    device: Device,
    len: usize,
    store: IndexStore,
}

#[derive(Clone, Debug)]
enum IndexStore {
    Gpu(wgpu::Buffer),
    Cpu(SharedIndices),
}

impl Indices {
    /// Number of indices.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn bytes(&self) -> u64 {
        // The product was checked when the vector was made.
        4 * self.len as u64
    }

    /// As they lie on the CPU device.
    pub(crate) fn on_cpu(&self) -> Result<SharedIndices> {
        match &self.store {
            IndexStore::Cpu(indices) => Ok(Arc::clone(indices)),
            IndexStore::Gpu(_) => Err(other_device("indices")),
        }
    }

    /// All of them on a GPU.
    pub(crate) fn on_gpu(&self) -> Option<BufferRange<'_>> {
        let IndexStore::Gpu(buffer) = &self.store else { return None };
        Some(BufferRange { buffer, offset: 0, bytes: self.bytes() })
    }

    pub(crate) fn same_memory(&self, other: &Self) -> bool {
        match (&self.store, &other.store) {
            (IndexStore::Gpu(a), IndexStore::Gpu(b)) => a == b,
            (IndexStore::Cpu(a), IndexStore::Cpu(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl Device {
    /// A vector of so many indices, all zero.
    pub fn indices(&self, len: usize) -> Result<Indices> {
        let bytes = checked_mul("index bytes", len, 4)?;
        let store = match &self.0 {
            Inner::Gpu(gpu) => IndexStore::Gpu(gpu.buffer("indices", bytes, None)?),
            Inner::Cpu(_) => IndexStore::Cpu(Arc::new(RwLock::new(vec![0; len]))),
        };
        Ok(Indices { device: self.clone(), len, store })
    }

    /// Overwrites indices. An error if there are more or fewer of them.
    ///
    /// ```
    /// use sparse24::Device;
    /// let device = Device::cpu()?;
    /// let lengths = device.indices(2)?;
    /// device.write_indices(&lengths, &[7, 3])?;
    /// assert!(device.write_indices(&lengths, &[7]).is_err());
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn write_indices(&self, indices: &Indices, data: &[u32]) -> Result<()> {
        self.check_owner("indices", &indices.device)?;
        expect_len("data", data.len(), indices.len)?;
        match (&self.0, &indices.store) {
            (Inner::Gpu(gpu), IndexStore::Gpu(buffer)) => gpu.write(buffer, bytemuck::cast_slice(data)),
            (Inner::Cpu(cpu), IndexStore::Cpu(own)) => cpu.exclusively(|| {
                write(own).copy_from_slice(data);
            }),
            _ => Err(other_device("indices")),
        }
    }

    /// Copies indices back, after everything that was submitted before.
    pub fn read_indices(&self, indices: &Indices) -> Result<Vec<u32>> {
        self.check_owner("indices", &indices.device)?;
        match (&self.0, &indices.store) {
            (Inner::Gpu(gpu), IndexStore::Gpu(buffer)) => {
                Ok(bytemuck::pod_collect_to_vec(&pollster::block_on(gpu.read(buffer, 4 * indices.len))?))
            }
            (Inner::Cpu(_), IndexStore::Cpu(own)) => Ok(read(own).clone()),
            _ => Err(other_device("indices")),
        }
    }
}
