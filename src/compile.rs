//! What a GPU's compiler and memories make of the kernels, found without a GPU.

pub mod banks;
pub mod trace;

use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

use crate::error::{Error, Result};
use crate::kernel::Program;

/// The module of a program as a driver gets it: parsed, validated, its overrides replaced by their values.
pub(crate) fn module(program: &Program) -> Result<(naga::Module, ModuleInfo)> {
    let source = program.source()?;
    let invalid = |what: String| Error::Invalid(format!("{program}: {what}"));
    let module = naga::front::wgsl::parse_str(&source).map_err(|e| invalid(e.emit_to_string(&source)))?;
    let capabilities =
        Capabilities::SHADER_FLOAT16 | Capabilities::SHADER_FLOAT16_IN_FLOAT32 | Capabilities::COOPERATIVE_MATRIX;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .map_err(|e| invalid(e.emit_to_string(&source)))?;
    let constants: naga::back::PipelineConstants =
        program.overrides().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let entry = Some((naga::ShaderStage::Compute, "main"));
    let (module, info) = naga::back::pipeline_constants::process_overrides(&module, &info, entry, &constants)
        .map_err(|e| invalid(e.to_string()))?;
    Ok((module.into_owned(), info.into_owned()))
}
