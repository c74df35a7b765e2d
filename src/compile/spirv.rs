//! WGSL to naga's module, and to the SPIR-V that wgpu hands to a Vulkan driver.
//!
//! Invariant: the options are those of wgpu's Vulkan backend for a [trusted](crate::kernels::ShaderChecks::Trusted)
//! module, so that what is compiled here is what runs.

use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

use crate::error::{Error, Result};
use crate::kernels::Program;

/// A program's WGSL as naga's module, its overrides set.
pub(crate) fn module(program: &Program) -> Result<(naga::Module, ModuleInfo)> {
    let fail = |e: String| Error::gpu(format!("compile {program}"), e);
    let source = program.source()?;
    let module = naga::front::wgsl::parse_str(&source).map_err(|e| fail(e.emit_to_string(&source)))?;
    let capabilities = Capabilities::SHADER_FLOAT16
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | Capabilities::COOPERATIVE_MATRIX
        | Capabilities::SUBGROUP;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .map_err(|e| fail(e.emit_to_string(&source)))?;
    let constants = program.overrides().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let entry = Some((naga::ShaderStage::Compute, "main"));
    let (module, info) = naga::back::pipeline_constants::process_overrides(&module, &info, entry, &constants)
        .map_err(|e| fail(e.to_string()))?;
    Ok((module.into_owned(), info.into_owned()))
}

/// A program as a driver gets it.
pub(super) struct Lowered {
    pub(super) words: Vec<u32>,
    /// Invocations of a workgroup.
    pub(super) threads: u32,
    /// Bytes of workgroup memory that it declares.
    pub(super) workgroup_bytes: u32,
}

/// A program's SPIR-V, for a driver of this version of Vulkan, such as `(1, 3)`.
pub fn spirv(program: &Program, vulkan: (u32, u32)) -> Result<Vec<u32>> {
    Ok(lower(program, vulkan)?.words)
}

/// A program's SPIR-V, and what its module says of a workgroup.
pub(super) fn lower(program: &Program, vulkan: (u32, u32)) -> Result<Lowered> {
    let fail = |reason: String| Error::gpu(format!("compile {program}"), reason);
    let (module, info) = module(program)?;
    let unchecked = BoundsCheckPolicy::Unchecked;
    let options = spv::Options {
        lang_version: match vulkan {
            (1, 0) => (1, 0),
            (1, 1) => (1, 3),
            (1, 2) => (1, 5),
            _ => (1, 6),
        },
        flags: spv::WriterFlags::LABEL_VARYINGS | spv::WriterFlags::FORCE_POINT_SIZE,
        force_loop_bounding: false,
        emit_int_div_checks: false,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        bounds_check_policies: BoundsCheckPolicies {
            index: unchecked,
            buffer: unchecked,
            image_load: unchecked,
            binding_array: unchecked,
        },
        ..Default::default()
    };
    let pipeline = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
    let words = spv::write_vec(&module, &info, &options, Some(&pipeline)).map_err(|e| fail(e.to_string()))?;
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).map_err(|e| fail(e.to_string()))?;
    let shared = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
    let workgroup_bytes = shared.map(|(_, v)| layouter[v.ty].size).sum();
    let threads = module.entry_points.first().map_or(0, |entry| entry.workgroup_size.iter().product());
    Ok(Lowered { words, threads, workgroup_bytes })
}
