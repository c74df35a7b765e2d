//! What can be known of the shaders without any device: they parse, validate and compile, and agree with their host.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashSet;
use std::mem::offset_of;

use naga::back::spv;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use sparse24::kernel::{Kernel, Params};
use sparse24::{DType, Epilogue, Form};

/// One kernel per shader text: the forms and epilogues of one text differ in overrides alone.
fn modules() -> impl Iterator<Item = Kernel> {
    Kernel::all().filter(|k| k.epilogue() == Epilogue::NONE && k.form() == Form::Linear)
}

fn parse(kernel: &Kernel) -> naga::Module {
    let source = kernel.source().unwrap();
    naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{kernel}: {}", e.emit_to_string(&source)))
}

fn validate(kernel: &Kernel, module: &naga::Module) -> naga::valid::ModuleInfo {
    let capabilities = Capabilities::SHADER_FLOAT16;
    Validator::new(ValidationFlags::all(), capabilities)
        .validate(module)
        .unwrap_or_else(|e| panic!("{kernel}: {}", e.emit_to_string(&kernel.source().unwrap())))
}

/// SPIR-V of a kernel's own overrides, with all of naga's run-time checks or with none.
fn spirv(kernel: &Kernel, checked: bool) -> Vec<u32> {
    let module = parse(kernel);
    let info = validate(kernel, &module);
    let constants: naga::back::PipelineConstants =
        kernel.overrides().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let entry = Some((naga::ShaderStage::Compute, "main"));
    let (module, info) = naga::back::pipeline_constants::process_overrides(&module, &info, entry, &constants).unwrap();
    let policy =
        if checked { naga::proc::BoundsCheckPolicy::Restrict } else { naga::proc::BoundsCheckPolicy::Unchecked };
    let options = spv::Options {
        lang_version: (1, 3),
        force_loop_bounding: checked,
        emit_int_div_checks: checked,
        zero_initialize_workgroup_memory: match checked {
            true => spv::ZeroInitializeWorkgroupMemoryMode::Polyfill,
            false => spv::ZeroInitializeWorkgroupMemoryMode::None,
        },
        bounds_check_policies: naga::proc::BoundsCheckPolicies {
            index: policy,
            buffer: policy,
            image_load: policy,
            binding_array: policy,
        },
        ..Default::default()
    };
    let pipeline = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
    spv::write_vec(&module, &info, &options, Some(&pipeline)).unwrap()
}

#[test]
fn every_shader_validates_and_compiles() {
    let mut ran = 0;
    for kernel in modules() {
        assert!(!spirv(&kernel, false).is_empty(), "{kernel}");
        ran += 1;
    }
    assert!(ran >= 10 * 4, "only {ran} modules are left");
}

/// The defaults in the shader files are one of the registered kernels, so the files are valid as they stand.
#[test]
fn shader_files_are_valid_as_they_stand() {
    let gemm = include_str!("../shaders/shared/gemm.wgsl");
    let dense_tile = include_str!("../shaders/shared/dense_tile.wgsl");
    for parts in [
        [gemm, dense_tile, include_str!("../shaders/gemm_dense.wgsl")].join("\n"),
        [gemm, dense_tile, include_str!("../shaders/gemm_masked.wgsl")].join("\n"),
        [gemm, include_str!("../shaders/gemm_sparse24.wgsl")].join("\n"),
    ] {
        let module = naga::front::wgsl::parse_str(&parts).unwrap();
        Validator::new(ValidationFlags::all(), Capabilities::empty()).validate(&module).unwrap();
        assert!(modules().any(|k| k.source().unwrap() == parts), "no kernel has the shader's defaults");
    }
}

#[test]
fn params_are_laid_out_as_the_host_writes_them() {
    let expected = [
        ("m", offset_of!(Params, m)),
        ("n", offset_of!(Params, n)),
        ("k", offset_of!(Params, k)),
        ("meta_cols", offset_of!(Params, meta_cols)),
    ];
    for kernel in modules() {
        let module = parse(&kernel);
        let (_, params) = module.types.iter().find(|(_, t)| t.name.as_deref() == Some("Params")).unwrap();
        let naga::TypeInner::Struct { members, span } = &params.inner else { panic!("Params is no struct") };
        let found: Vec<_> = members.iter().map(|m| (m.name.as_deref().unwrap(), m.offset as usize)).collect();
        assert_eq!(found, expected, "{kernel}");
        assert_eq!(*span as usize, size_of::<Params>());
    }
}

#[test]
fn workgroup_memory_and_threads_are_what_the_host_thinks() {
    for kernel in modules() {
        let module = parse(&kernel);
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let bytes: u32 = module
            .global_variables
            .iter()
            .filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
            .map(|(_, v)| layouter[v.ty].size)
            .sum();
        assert_eq!(bytes, kernel.workgroup_bytes(), "{kernel}");
        assert_eq!(module.entry_points[0].workgroup_size, [kernel.tile().threads(), 1, 1], "{kernel}");
    }
}

/// wgpu's Vulkan backend compiles a module without overrides before it knows that it is trusted.
#[test]
fn every_shader_has_an_override_and_the_host_sets_them_all() {
    for kernel in modules() {
        let module = parse(&kernel);
        let declared: HashSet<_> = module.overrides.iter().map(|(_, o)| o.name.clone().unwrap()).collect();
        let set: HashSet<_> = kernel.overrides().into_iter().map(|(name, _)| name.to_owned()).collect();
        assert!(!declared.is_empty() && declared == set, "{kernel}: {declared:?} are declared, {set:?} are set");
    }
}

/// What trusted modules leave out, seen in the SPIR-V: loop counters, clamps and zeroing make the checked one longer.
#[test]
fn trusted_spirv_has_no_checks() {
    const OP_ARRAY_LENGTH: u32 = 68;
    let count = |words: &[u32], op: u32| {
        let mut at = 5;
        let mut found = 0;
        while at < words.len() {
            found += usize::from(words[at] & 0xffff == op);
            at += (words[at] >> 16) as usize;
        }
        found
    };
    for kernel in modules() {
        let (trusted, checked) = (spirv(&kernel, false), spirv(&kernel, true));
        assert_eq!(count(&trusted, OP_ARRAY_LENGTH), 0, "{kernel}");
        assert!(count(&checked, OP_ARRAY_LENGTH) > 0, "{kernel}");
        assert!(trusted.len() < checked.len(), "{kernel}");
    }
}

#[test]
fn names_tell_kernels_apart() {
    let names: Vec<_> = Kernel::all().map(|k| k.to_string()).collect();
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
    assert!(names.iter().any(|n| n == "gemm_sparse24-f16f32-v32-128x128x32-bias_gelu"));
    assert!(names.iter().any(|n| n == "gemm_dense-f16f32-64x64x32-none-gemm-out_f32"));
    assert!(Kernel::all().all(|k| k.storage() != DType::Bf16));
}
