//! What can be known of the shaders without any device: they parse, validate and compile, and agree with their host.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashSet;

use naga::back::spv;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use sparse24::DType;
use sparse24::kernels::{Binding, BindingAccess, Kernel, Program};

/// One program per shader text: the forms and epilogues of one text differ in overrides alone.
fn modules() -> impl Iterator<Item = Program> {
    Program::all().filter(Program::is_representative)
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
    let capabilities = Capabilities::SHADER_FLOAT16
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | Capabilities::COOPERATIVE_MATRIX
        | Capabilities::SUBGROUP;
    let check = |text: &str| {
        let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(text)));
        Validator::new(ValidationFlags::all(), capabilities).validate(&module).unwrap();
    };
    let texts: HashSet<String> = modules().map(|program| program.files().unwrap()).collect();
    assert!(texts.len() >= 25, "only {} texts are left", texts.len());
    let native = include_str!("../shaders/shared/coop_native.wgsl");
    let quads = include_str!("../shaders/shared/coop_quads.wgsl");
    let others = [
        (native, include_str!("../shaders/shared/coop_scalars.wgsl")),
        (include_str!("../shaders/shared/coop_emulated.wgsl"), quads),
        (include_str!("../shaders/shared/coop_emulated.wgsl"), include_str!("../shaders/shared/coop_scalars.wgsl")),
    ];
    let mut cooperative = 0;
    for text in &texts {
        check(text);
        // Cooperative matrices that are emulated, and tiles that are held as scalars.
        if let Some(rest) = text.strip_prefix(&format!("{native}\n{quads}\n")) {
            others.iter().for_each(|(own, held)| check(&format!("{own}\n{held}\n{rest}")));
            cooperative += 1;
        }
    }
    assert!(cooperative >= 7, "only {cooperative} texts of cooperative matrices are left");
}

/// No loop over registers is left to a driver: private arrays are indexed by constants alone.
#[test]
fn register_arrays_are_indexed_by_constants() {
    for kernel in modules() {
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
    for program in modules() {
        let module = parse(&program);
        let declared = module.types.iter().find(|(_, t)| t.name.as_deref() == Some("Params"));
        let (fields, bytes) = match declared.map(|(_, params)| &params.inner) {
            None => (Vec::new(), 0),
            Some(naga::TypeInner::Struct { members, span }) => {
                let fields = members.iter().map(|m| (m.name.as_deref().unwrap(), m.offset as usize));
                (fields.collect(), *span as usize)
            }
            Some(_) => panic!("{program}: Params is no struct"),
        };
        let host = program.params();
        assert_eq!((fields, bytes), (host.fields.to_vec(), host.bytes), "{program}");
    }
}

/// What a device binds is what the module declares: numbers, names, and what is done with each.
#[test]
fn bindings_are_those_of_the_module() {
    for program in modules() {
        let module = parse(&program);
        let mut declared: Vec<(u32, String, BindingAccess)> = module
            .global_variables
            .iter()
            .filter_map(|(_, variable)| {
                let binding = variable.binding?;
                assert_eq!(binding.group, 0, "{program}");
                let access = match variable.space {
                    naga::AddressSpace::Uniform => BindingAccess::Uniform,
                    naga::AddressSpace::Storage { access } if access.contains(naga::StorageAccess::STORE) => {
                        BindingAccess::Write
                    }
                    naga::AddressSpace::Storage { .. } => BindingAccess::Read,
                    other => panic!("{program}: {other:?}"),
                };
                Some((binding.binding, variable.name.clone().unwrap(), access))
            })
            .collect();
        declared.sort_by_key(|(number, ..)| *number);
        let host = program.bindings().iter().map(|&Binding { number, name, access }| (number, name.to_owned(), access));
        assert_eq!(declared, host.collect::<Vec<_>>(), "{program}");
    }
}

#[test]
fn workgroup_memory_and_threads_are_what_the_host_thinks() {
    for program in modules() {
        let module = parse(&program);
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let bytes: u32 = module
            .global_variables
            .iter()
            .filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
            .map(|(_, v)| layouter[v.ty].size)
            .sum();
        assert_eq!(bytes, program.workgroup_bytes(), "{program}");
        assert_eq!(module.entry_points[0].workgroup_size, [program.threads(), 1, 1], "{program}");
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
    let names: HashSet<_> = Program::all().map(|program| program.to_string()).collect();
    assert_eq!(names.len(), Program::all().count());
    for name in [
        "gemm_sparse24-f16f32-v32-128x128x16-bias_gelu",
        "gemm_dense-f16f32-64x64x16-none-gemm-out_f32",
        "attention-f16f32-64x32x64-d64-quads",
        "sparsify-f16-v4-packed",
    ] {
        assert!(names.contains(name), "{name}");
    }
    assert!(Kernel::all().all(|k| k.storage() != DType::Bf16));
}
