//! What operations are given: tensors, indices and weights, each by the name that errors use.
//!
//! Whatever is true of the operands of all operations is checked here, once: they belong to the device, it computes on
//! their type, and nothing that is written shares its memory. Invariant: an operand names memory of one device.

use super::{Device, Indices, Tensor, Weights};
use crate::error::{Error, Result};
use crate::matrix::DType;

/// An operand of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// Its name in errors.
    pub name: &'static str,
    /// Where its elements are.
    pub value: OperandValue<'a>,
    /// Whether the operation writes it.
    pub written: bool,
}

/// What an operand can be.
#[derive(Clone, Copy, Debug)]
pub enum OperandValue<'a> {
    /// A matrix.
    Tensor(&'a Tensor),
    /// Ids of rows, or lengths of sequences.
    Indices(&'a Indices),
    /// Weights in the layout of a GEMM.
    Weights(&'a Weights),
}

impl<'a> Operand<'a> {
    /// One that is read.
    pub fn read(name: &'static str, value: impl Into<OperandValue<'a>>) -> Self {
        Self { name, value: value.into(), written: false }
    }

    /// One that is written.
    pub fn write(name: &'static str, value: impl Into<OperandValue<'a>>) -> Self {
        Self { name, value: value.into(), written: true }
    }

    fn device(&self) -> &'a Device {
        match self.value {
            OperandValue::Tensor(tensor) => tensor.device(),
            OperandValue::Indices(indices) => indices.device(),
            OperandValue::Weights(weights) => weights.device(),
        }
    }

    /// Weights share no memory with operands of another kind, and no operation has two of them.
    fn shares_memory(&self, other: &Self) -> bool {
        match (self.value, other.value) {
            (OperandValue::Tensor(a), OperandValue::Tensor(b)) => a.same_memory(b),
            (OperandValue::Indices(a), OperandValue::Indices(b)) => a.same_memory(b),
            _ => false,
        }
    }

    /// Bytes that it takes on its device.
    pub(crate) fn bytes(&self) -> u64 {
        match self.value {
            OperandValue::Tensor(tensor) => tensor.bytes(),
            OperandValue::Indices(indices) => indices.bytes(),
            OperandValue::Weights(weights) => weights.bytes() as u64,
        }
    }
}

/// Whether operands are of this device, and of types that kernels compute on.
pub(crate) fn check_devices(device: &Device, operands: &[Operand<'_>]) -> Result<()> {
    for operand in operands {
        device.check_owner(operand.name, operand.device())?;
        if let OperandValue::Tensor(tensor) = operand.value
            && tensor.dtype() == DType::Bf16
        {
            return Err(Error::dtype(operand.name, DType::Bf16, DType::F32));
        }
    }
    Ok(())
}

/// Whether what is written shares its memory with nothing else.
pub(crate) fn check_memory(operands: &[Operand<'_>]) -> Result<()> {
    for (i, written) in operands.iter().enumerate().filter(|(_, operand)| operand.written) {
        let mut others = operands.iter().enumerate().filter(|&(j, _)| j != i);
        if let Some((_, other)) = others.find(|(_, other)| written.shares_memory(other)) {
            return Err(Error::invalid(format!("{} shares its memory with {}", written.name, other.name)));
        }
    }
    Ok(())
}

impl<'a> From<&'a Tensor> for OperandValue<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl<'a> From<&'a Indices> for OperandValue<'a> {
    fn from(indices: &'a Indices) -> Self {
        Self::Indices(indices)
    }
}

impl<'a> From<&'a Weights> for OperandValue<'a> {
    fn from(weights: &'a Weights) -> Self {
        Self::Weights(weights)
    }
}
