//! What can be known of the shaders without any device: they parse, validate and compile, and agree with their host.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashSet;
use std::mem::offset_of;

use naga::back::spv;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use sparse24::kernels::glue::{Glue, GlueParams};
use sparse24::kernels::sparsify::{Conversion, ConversionParams};
use sparse24::kernels::{Kernel, Params, Program};
use sparse24::{DType, Epilogue, Form};

/// One kernel per shader text: the forms and epilogues of one text differ in overrides alone.
fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::all().filter(Kernel::is_plain)
}

/// One program per shader text: the kernels, and what runs beside them.
fn modules() -> impl Iterator<Item = Program> {
    let plain = |program: &Program| match program {
        Program::Reduce { form, epilogue, .. } => *form == Form::Linear && *epilogue == Epilogue::NONE,
        Program::Pack { form, .. } => *form == Form::Linear,
        _ => true,
    };
    kernels().map(Program::Gemm).chain(Program::helpers().filter(plain))
}

fn parse(kernel: &Program) -> naga::Module {
    let source = kernel.source().unwrap();
    naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{kernel}: {}", e.emit_to_string(&source)))
}

fn validate(kernel: &Program, module: &naga::Module) -> naga::valid::ModuleInfo {
    let capabilities = Capabilities::SHADER_FLOAT16
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | Capabilities::COOPERATIVE_MATRIX
        | Capabilities::SUBGROUP;
    Validator::new(ValidationFlags::all(), capabilities)
        .validate(module)
        .unwrap_or_else(|e| panic!("{kernel}: {}", e.emit_to_string(&kernel.source().unwrap())))
}

/// SPIR-V of a kernel's own overrides, with all of naga's run-time checks or with none.
fn spirv(kernel: &Program, checked: bool) -> Vec<u32> {
    let module = parse(kernel);
    let info = validate(kernel, &module);
    let constants: naga::back::PipelineConstants =
        kernel.overrides().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let entry = Some((naga::ShaderStage::Compute, "main"));
    let (module, info) = naga::back::pipeline_constants::process_overrides(&module, &info, entry, &constants).unwrap();
    let policy =
        if checked { naga::proc::BoundsCheckPolicy::Restrict } else { naga::proc::BoundsCheckPolicy::Unchecked };
    let options = spv::Options {
        lang_version: (1, 6),
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

/// The shader files are valid as they stand: replacing their constants and unrolling their loops changes no meaning.
#[test]
fn shader_files_are_valid_as_they_stand() {
    let gemm = include_str!("../shaders/shared/gemm.wgsl");
    let words = include_str!("../shaders/shared/words.wgsl");
    let tile = include_str!("../shaders/shared/tile.wgsl");
    let tile_dense = include_str!("../shaders/shared/tile_dense.wgsl");
    let tokens = include_str!("../shaders/shared/tokens1.wgsl");
    let gemv = include_str!("../shaders/shared/gemv.wgsl");
    let coop = include_str!("../shaders/shared/coop_native.wgsl");
    let coop_quads = include_str!("../shaders/shared/coop_quads.wgsl");
    let coop_scalars = include_str!("../shaders/shared/coop_scalars.wgsl");
    let emulated = include_str!("../shaders/shared/coop_emulated.wgsl");
    let coop_main = include_str!("../shaders/shared/coop.wgsl");
    let coop_dense = include_str!("../shaders/shared/coop_dense.wgsl");
    let glue = include_str!("../shaders/shared/glue.wgsl");
    let quads = include_str!("../shaders/shared/quads.wgsl");
    let scalars = include_str!("../shaders/shared/scalars.wgsl");
    let attention = include_str!("../shaders/shared/attention.wgsl");
    let sparse24 = include_str!("../shaders/shared/sparse24.wgsl");
    for parts in [
        &[gemm, tile, tile_dense, include_str!("../shaders/gemm_dense.wgsl")][..],
        &[gemm, words, tile, tile_dense, include_str!("../shaders/gemm_masked.wgsl")],
        &[gemm, words, tile, include_str!("../shaders/gemm_sparse24.wgsl")],
        &[gemm, words, tile, tile_dense, include_str!("../shaders/gemm_sparse24_expand.wgsl")],
        &[gemm, include_str!("../shaders/shared/tokens4.wgsl"), gemv, include_str!("../shaders/gemv_dense.wgsl")],
        &[gemm, tokens, gemv, include_str!("../shaders/gemv_dense.wgsl")],
        &[gemm, words, tokens, gemv, include_str!("../shaders/gemv_masked.wgsl")],
        &[gemm, words, tokens, gemv, include_str!("../shaders/gemv_sparse24.wgsl")],
        &[gemm, include_str!("../shaders/pack_x.wgsl")],
        &[gemm, include_str!("../shaders/reduce.wgsl")],
        &[gemm, include_str!("../shaders/probe_fma.wgsl")],
        &[include_str!("../shaders/probe_copy.wgsl")],
        &[coop, coop_quads, include_str!("../shaders/probe_coop.wgsl")],
        &[coop, coop_quads, include_str!("../shaders/coop_check.wgsl")],
        &[glue, include_str!("../shaders/embed.wgsl")],
        &[glue, quads, include_str!("../shaders/layer_norm.wgsl")],
        &[glue, scalars, include_str!("../shaders/layer_norm.wgsl")],
        &[glue, quads, attention, include_str!("../shaders/attention.wgsl")],
        &[glue, scalars, attention, include_str!("../shaders/attention.wgsl")],
        &[coop, coop_quads, glue, quads, attention, include_str!("../shaders/attention_coop.wgsl")],
        &[emulated, coop_scalars, glue, quads, attention, include_str!("../shaders/attention_coop.wgsl")],
        &[glue, quads, include_str!("../shaders/pool.wgsl")],
        &[glue, scalars, include_str!("../shaders/pool.wgsl")],
        &[sparse24, include_str!("../shaders/sparsify.wgsl")],
        &[sparse24, include_str!("../shaders/densify.wgsl")],
        &[coop, coop_quads, gemm, words, coop_main, coop_dense, include_str!("../shaders/gemm_dense_coop.wgsl")],
        &[coop, coop_quads, gemm, words, coop_main, coop_dense, include_str!("../shaders/gemm_masked_coop.wgsl")],
        &[coop, coop_quads, gemm, words, coop_main, include_str!("../shaders/gemm_sparse24_coop.wgsl")],
        &[coop, coop_scalars, gemm, words, coop_main, include_str!("../shaders/gemm_sparse24_coop.wgsl")],
        &[emulated, coop_quads, gemm, words, coop_main, include_str!("../shaders/gemm_sparse24_coop.wgsl")],
        &[
            coop,
            coop_quads,
            gemm,
            words,
            coop_main,
            coop_dense,
            include_str!("../shaders/gemm_sparse24_coop_expand.wgsl"),
        ],
    ] {
        let text = parts.join("\n");
        let module = naga::front::wgsl::parse_str(&text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&text)));
        let capabilities = Capabilities::SHADER_FLOAT16
            | Capabilities::SHADER_FLOAT16_IN_FLOAT32
            | Capabilities::COOPERATIVE_MATRIX
            | Capabilities::SUBGROUP;
        Validator::new(ValidationFlags::all(), capabilities).validate(&module).unwrap();
    }
}

/// No loop over registers is left to a driver: private arrays are indexed by constants alone.
#[test]
fn register_arrays_are_indexed_by_constants() {
    let others = Glue::all().map(Program::Glue).chain(Conversion::all().map(Program::Conversion));
    for kernel in kernels().map(Program::Gemm).chain(others) {
        let source = kernel.source().unwrap();
        assert!(!source.contains("// unroll"), "{kernel}");
        let module = parse(&kernel);
        let functions = module.functions.iter().map(|(_, f)| f).chain([&module.entry_points[0].function]);
        for function in functions {
            for (_, expression) in function.expressions.iter() {
                let naga::Expression::Access { mut base, .. } = *expression else { continue };
                let root = loop {
                    match function.expressions[base] {
                        naga::Expression::Access { base: next, .. }
                        | naga::Expression::AccessIndex { base: next, .. } => base = next,
                        ref root => break root,
                    }
                };
                let private = match *root {
                    naga::Expression::LocalVariable(_) => true,
                    naga::Expression::FunctionArgument(at) => {
                        let ty = function.arguments[at as usize].ty;
                        matches!(module.types[ty].inner, naga::TypeInner::Pointer { .. })
                    }
                    _ => false,
                };
                assert!(!private, "{kernel}: {:?} indexes a register array", function.name);
            }
        }
    }
}

#[test]
fn params_are_laid_out_as_the_host_writes_them() {
    let expected = [
        ("m", offset_of!(Params, m)),
        ("n", offset_of!(Params, n)),
        ("k", offset_of!(Params, k)),
        ("k_split", offset_of!(Params, k_split)),
        ("features", offset_of!(Params, features)),
        ("feature0", offset_of!(Params, feature0)),
        ("tiles_m", offset_of!(Params, tiles_m)),
        ("tiles_n", offset_of!(Params, tiles_n)),
        ("k_given", offset_of!(Params, k_given)),
    ];
    // The copy declares the two that it reads, and the probes of cooperative matrices none.
    let others = |p: &Program| {
        matches!(
            p,
            Program::ProbeCopy
                | Program::ProbeCoop(_)
                | Program::CoopCheck { .. }
                | Program::Glue(_)
                | Program::Conversion(_)
        )
    };
    for kernel in modules().filter(|p| !others(p)) {
        assert_eq!(params_of(&kernel), (named(&expected), size_of::<Params>()), "{kernel}");
    }
    let expected = [
        ("tokens", offset_of!(GlueParams, tokens)),
        ("width", offset_of!(GlueParams, width)),
        ("seq", offset_of!(GlueParams, seq)),
        ("heads", offset_of!(GlueParams, heads)),
        ("scale", offset_of!(GlueParams, scale)),
        ("epsilon", offset_of!(GlueParams, epsilon)),
        ("rows0", offset_of!(GlueParams, rows0)),
        ("rows1", offset_of!(GlueParams, rows1)),
        ("rows2", offset_of!(GlueParams, rows2)),
    ];
    for kernel in Glue::all().map(Program::Glue) {
        assert_eq!(params_of(&kernel), (named(&expected), size_of::<GlueParams>()), "{kernel}");
    }
    let expected = [
        ("rows", offset_of!(ConversionParams, rows)),
        ("cols", offset_of!(ConversionParams, cols)),
        ("row0", offset_of!(ConversionParams, row0)),
    ];
    for kernel in Conversion::all().map(Program::Conversion) {
        assert_eq!(params_of(&kernel), (named(&expected), size_of::<ConversionParams>()), "{kernel}");
    }
}

fn named(members: &[(&str, usize)]) -> Vec<(String, usize)> {
    members.iter().map(|&(name, offset)| (name.to_owned(), offset)).collect()
}

/// Members of a shader's `Params` with their offsets, and its size.
fn params_of(kernel: &Program) -> (Vec<(String, usize)>, usize) {
    let module = parse(kernel);
    let (_, params) = module.types.iter().find(|(_, t)| t.name.as_deref() == Some("Params")).unwrap();
    let naga::TypeInner::Struct { members, span } = &params.inner else { panic!("Params is no struct") };
    (members.iter().map(|m| (m.name.clone().unwrap(), m.offset as usize)).collect(), *span as usize)
}

#[test]
fn workgroup_memory_and_threads_are_what_the_host_thinks() {
    let gemms = kernels().map(|k| (Program::Gemm(k), k.workgroup_bytes(), k.schedule().threads()));
    let glue = Glue::all().map(|g| (Program::Glue(g), g.workgroup_bytes(), g.threads()));
    let conversions = Conversion::all().map(|c| (Program::Conversion(c), c.workgroup_bytes(), c.threads()));
    for (kernel, expected, threads) in gemms.chain(glue).chain(conversions) {
        let module = parse(&kernel);
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let bytes: u32 = module
            .global_variables
            .iter()
            .filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
            .map(|(_, v)| layouter[v.ty].size)
            .sum();
        assert_eq!(bytes, expected, "{kernel}");
        assert_eq!(module.entry_points[0].workgroup_size, [threads, 1, 1], "{kernel}");
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
    assert!(names.iter().any(|n| n == "gemm_sparse24-f16f32-v32-128x128x16-bias_gelu"));
    assert!(names.iter().any(|n| n == "gemm_dense-f16f32-64x64x16-none-gemm-out_f32"));
    assert!(Kernel::all().all(|k| k.storage() != DType::Bf16));
    let names: Vec<_> = Glue::all().map(|g| g.to_string()).collect();
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
    assert!(names.iter().any(|n| n == "attention-f16f32-64x32x64-d64-quads"), "{names:?}");
    let names: Vec<_> = Conversion::all().map(|c| c.to_string()).collect();
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
    assert!(names.iter().any(|n| n == "sparsify-f16-v4-packed"), "{names:?}");
}
