//! A Vulkan driver, asked for what it compiles to: `VK_KHR_pipeline_executable_properties`, which wgpu does not reach.
//!
//! Devices are opened as wgpu opens them (its features that matter to a compiler: buffer accesses that stay within
//! their bindings, f16, the Vulkan memory model), pipelines are made with wgpu's flags, and nothing is ever run: so a
//! pretended device serves as well as a real one. Invariant: every handle lives as long as the [`Compiler`] that owns
//! it, and is destroyed once.

#![allow(unsafe_code, reason = "Vulkan is called through ash, whose functions are all unsafe")]

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Mutex, PoisonError};

use ash::vk;
use spirv::Capability;

use super::reflect::{Entry, Module};
use super::spirv::{Lowered, lower};
use crate::error::{Error, Result};
use crate::kernels::{Binding, BindingAccess, Caps, CoopCheck, CoopShape, Program, Rates};

const EXECUTABLES: &CStr = ash::khr::pipeline_executable_properties::NAME;
const COOPERATIVE: &CStr = ash::khr::cooperative_matrix::NAME;
const ROBUSTNESS: &CStr = ash::ext::robustness2::NAME;

/// A driver that tells what it compiles to, on a device that may be real or pretended.
pub struct Compiler {
    device: ash::Device,
    executables: ash::khr::pipeline_executable_properties::Device,
    layouts: Mutex<HashMap<&'static [Binding], Layout>>,
    name: String,
    driver: String,
    version: (u32, u32),
    caps: Caps,
    limits: vk::PhysicalDeviceLimits,
    /// What shaders may ask for: the device was opened with it.
    capabilities: Vec<Capability>,
    /// Whether the driver prints machine code on stdout, as Mesa's for Apple's GPUs does if it is told to.
    prints_code: bool,
    // Fields are dropped in order, after the device was destroyed: the instance last.
    _loaded: Loaded,
}

/// The loader and an instance of it.
struct Loaded {
    instance: ash::Instance,
    // Dropped after what it has loaded.
    _entry: ash::Entry,
}

/// What a driver says of one compiled pipeline.
#[derive(Clone, Debug, Default)]
pub(super) struct Executable {
    /// Invocations of a subgroup, as compiled.
    pub(super) subgroup: u32,
    /// The driver's statistics, by its own names.
    pub(super) statistics: Vec<(String, f64)>,
    /// Its intermediate representations and machine code, by its own names.
    pub(super) representations: Vec<(String, String)>,
}

fn failed<T>(what: &str) -> impl Fn(T) -> Error + '_
where
    T: std::fmt::Display,
{
    move |e| Error::gpu(what, e.to_string())
}

impl Loaded {
    fn new() -> Result<Self> {
        let fail = |reason: String| Error::gpu("load Vulkan", reason);
        // SAFETY: the system's Vulkan loader runs code of its own when it is loaded, as it does for every program that
        // draws. Gain: what wgpu does not tell.
        let entry = unsafe { ash::Entry::load() }.map_err(|e| fail(e.to_string()))?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
        let info = vk::InstanceCreateInfo::default().application_info(&application);
        // SAFETY: `info` and what it points to live until the call returns; no extension is asked for. Gain: as above.
        let instance = unsafe { entry.create_instance(&info, None) }.map_err(|e| fail(e.to_string()))?;
        Ok(Self { instance, _entry: entry })
    }

    fn devices(&self) -> Result<Vec<(vk::PhysicalDevice, String)>> {
        // SAFETY: the instance is alive, and so are devices that it lists. Gain: names to choose by.
        let devices = unsafe { self.instance.enumerate_physical_devices() }.map_err(failed("list Vulkan devices"))?;
        let name = |device| {
            // SAFETY: as above. Gain: as above.
            let properties = unsafe { self.instance.get_physical_device_properties(device) };
            text(&properties.device_name)
        };
        Ok(devices.into_iter().map(|device| (device, name(device))).collect())
    }
}

/// What a pipeline is told of its bindings.
struct Layout {
    sets: Vec<vk::DescriptorSetLayout>,
    pipeline: vk::PipelineLayout,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: the instance was made once, and what was made of it was destroyed by its owner before. Gain: as
        // above.
        unsafe { self.instance.destroy_instance(None) };
    }
}

/// Text of a fixed field of Vulkan's, up to its end.
fn text(field: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = field.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

impl Compiler {
    /// Names of the devices that Vulkan drivers of this machine offer, pretended ones as well as real ones. An error if
    /// there is no Vulkan loader.
    pub fn devices() -> Result<Vec<String>> {
        Ok(Loaded::new()?.devices()?.into_iter().map(|(_, name)| name).collect())
    }

    /// Opens the first device whose name has this part, whatever the case; without a name, the first of all. An error
    /// if there is none, or if its driver does not tell what it compiles to.
    pub fn open(name: Option<&str>) -> Result<Self> {
        let entry = Loaded::new()?;
        let devices = entry.devices()?;
        let wanted = name.unwrap_or_default().to_lowercase();
        let Some((physical, name)) = devices.iter().find(|(_, name)| name.to_lowercase().contains(&wanted)).cloned()
        else {
            let available = devices.into_iter().map(|(_, name)| name).collect();
            return Err(Error::unknown_device(wanted, available));
        };
        Self::on(entry, physical, name)
    }

    fn on(entry: Loaded, physical: vk::PhysicalDevice, name: String) -> Result<Self> {
        let instance = &entry.instance;
        // SAFETY: the physical device is one of this living instance. Gain: structures of Vulkan 1.3 are used below.
        let version = unsafe { instance.get_physical_device_properties(physical) }.api_version;
        if version < vk::API_VERSION_1_3 {
            return Err(Error::missing_feature(name, "Vulkan 1.3"));
        }
        // SAFETY: as above. Gain: which extensions can be asked for.
        let extensions = unsafe { instance.enumerate_device_extension_properties(physical) }
            .map_err(failed("list Vulkan extensions"))?;
        let has =
            |wanted: &CStr| extensions.iter().any(|e| e.extension_name_as_c_str().is_ok_and(|name| name == wanted));
        if !has(EXECUTABLES) {
            let feature = format!(
                "{}: Mesa's drivers for GPUs and others have it, those that compute on the processor do not",
                EXECUTABLES.to_string_lossy()
            );
            return Err(Error::missing_feature(name, feature));
        }
        let (cooperative, robustness) = (has(COOPERATIVE), has(ROBUSTNESS));

        // What the device has.
        let mut storage16 = vk::PhysicalDevice16BitStorageFeatures::default();
        let mut float16 = vk::PhysicalDeviceShaderFloat16Int8Features::default();
        let mut memory = vk::PhysicalDeviceVulkanMemoryModelFeatures::default();
        let mut subgroups = vk::PhysicalDeviceSubgroupSizeControlFeatures::default();
        let mut robust = vk::PhysicalDeviceRobustness2FeaturesEXT::default();
        let mut matrices = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default();
        let mut storage8 = vk::PhysicalDevice8BitStorageFeatures::default();
        let mut pointers = vk::PhysicalDeviceVariablePointersFeatures::default();
        let mut dots = vk::PhysicalDeviceShaderIntegerDotProductFeatures::default();
        let mut features = vk::PhysicalDeviceFeatures2::default()
            .push_next(&mut storage8)
            .push_next(&mut pointers)
            .push_next(&mut dots)
            .push_next(&mut storage16)
            .push_next(&mut float16)
            .push_next(&mut memory)
            .push_next(&mut subgroups);
        if robustness {
            features = features.push_next(&mut robust);
        }
        if cooperative {
            features = features.push_next(&mut matrices);
        }
        // SAFETY: every structure of the chain lives until the call returns, and each belongs to Vulkan 1.3 or to an
        // extension that the device lists. Gain: only what there is can be asked for.
        unsafe { instance.get_physical_device_features2(physical, &mut features) };
        let core = features.features;

        // What a compiler heeds, as wgpu asks for it.
        let f16 = float16.shader_float16 == vk::TRUE && storage16.storage_buffer16_bit_access == vk::TRUE;
        let cooperative = cooperative && matrices.cooperative_matrix == vk::TRUE;
        let mut names = vec![EXECUTABLES.as_ptr()];
        let mut executables =
            vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
        let core = vk::PhysicalDeviceFeatures::default()
            .robust_buffer_access(core.robust_buffer_access == vk::TRUE)
            .shader_float64(core.shader_float64 == vk::TRUE)
            .shader_int64(core.shader_int64 == vk::TRUE)
            .shader_int16(core.shader_int16 == vk::TRUE);
        let mut storage16 = vk::PhysicalDevice16BitStorageFeatures::default()
            .storage_buffer16_bit_access(f16)
            .uniform_and_storage_buffer16_bit_access(
                f16 && storage16.uniform_and_storage_buffer16_bit_access == vk::TRUE,
            );
        let mut storage8 = vk::PhysicalDevice8BitStorageFeatures::default()
            .storage_buffer8_bit_access(storage8.storage_buffer8_bit_access == vk::TRUE)
            .uniform_and_storage_buffer8_bit_access(storage8.uniform_and_storage_buffer8_bit_access == vk::TRUE);
        let mut pointers = vk::PhysicalDeviceVariablePointersFeatures::default()
            .variable_pointers_storage_buffer(pointers.variable_pointers_storage_buffer == vk::TRUE)
            .variable_pointers(pointers.variable_pointers == vk::TRUE);
        let mut dots = vk::PhysicalDeviceShaderIntegerDotProductFeatures::default()
            .shader_integer_dot_product(dots.shader_integer_dot_product == vk::TRUE);
        let mut float16 = vk::PhysicalDeviceShaderFloat16Int8Features::default()
            .shader_float16(f16)
            .shader_int8(float16.shader_int8 == vk::TRUE);
        let memory_model = memory.vulkan_memory_model == vk::TRUE;
        let mut memory = vk::PhysicalDeviceVulkanMemoryModelFeatures::default()
            .vulkan_memory_model(memory_model)
            .vulkan_memory_model_device_scope(memory_model && memory.vulkan_memory_model_device_scope == vk::TRUE);
        let varying = subgroups.subgroup_size_control == vk::TRUE;
        let mut subgroups = vk::PhysicalDeviceSubgroupSizeControlFeatures::default().subgroup_size_control(varying);
        let mut robust = vk::PhysicalDeviceRobustness2FeaturesEXT::default()
            .robust_buffer_access2(robust.robust_buffer_access2 == vk::TRUE);
        let mut matrices = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default().cooperative_matrix(true);
        let asked: [(vk::Bool32, &[Capability]); 15] = [
            (vk::TRUE, &[Capability::Matrix, Capability::Shader]),
            (core.shader_float64, &[Capability::Float64]),
            (core.shader_int64, &[Capability::Int64]),
            (core.shader_int16, &[Capability::Int16]),
            (float16.shader_float16, &[Capability::Float16]),
            (float16.shader_int8, &[Capability::Int8]),
            (storage16.storage_buffer16_bit_access, &[Capability::StorageBuffer16BitAccess]),
            (storage16.uniform_and_storage_buffer16_bit_access, &[Capability::UniformAndStorageBuffer16BitAccess]),
            (storage8.storage_buffer8_bit_access, &[Capability::StorageBuffer8BitAccess]),
            (storage8.uniform_and_storage_buffer8_bit_access, &[Capability::UniformAndStorageBuffer8BitAccess]),
            (pointers.variable_pointers_storage_buffer, &[Capability::VariablePointersStorageBuffer]),
            (pointers.variable_pointers, &[Capability::VariablePointers]),
            (
                dots.shader_integer_dot_product,
                &[
                    Capability::DotProduct,
                    Capability::DotProductInputAll,
                    Capability::DotProductInput4x8Bit,
                    Capability::DotProductInput4x8BitPacked,
                ],
            ),
            (memory.vulkan_memory_model, &[Capability::VulkanMemoryModel]),
            (memory.vulkan_memory_model_device_scope, &[Capability::VulkanMemoryModelDeviceScope]),
        ];
        let mut capabilities: Vec<Capability> =
            asked.into_iter().filter(|(has, _)| *has == vk::TRUE).flat_map(|(_, names)| names).copied().collect();
        if cooperative {
            capabilities.push(Capability::CooperativeMatrixKHR);
        }
        capabilities.extend(of_subgroups(instance, physical));
        let priorities = [1.0];
        let queues = [vk::DeviceQueueCreateInfo::default().queue_family_index(0).queue_priorities(&priorities)];
        if robustness {
            names.push(ROBUSTNESS.as_ptr());
        }
        if cooperative {
            names.push(COOPERATIVE.as_ptr());
        }
        let mut info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&names)
            .enabled_features(&core)
            .push_next(&mut executables)
            .push_next(&mut storage8)
            .push_next(&mut pointers)
            .push_next(&mut dots)
            .push_next(&mut storage16)
            .push_next(&mut float16)
            .push_next(&mut memory)
            .push_next(&mut subgroups);
        if robustness {
            info = info.push_next(&mut robust);
        }
        if cooperative {
            info = info.push_next(&mut matrices);
        }
        // SAFETY: all structures live until the call returns; features and extensions are among those that the device
        // has. Every device has a queue family 0. Gain: pipelines need a device.
        let device =
            unsafe { instance.create_device(physical, &info, None) }.map_err(failed(&format!("open {name}")))?;
        let executables = ash::khr::pipeline_executable_properties::Device::new(instance, &device);

        let (driver, version, mut caps) = describe(&entry, physical, f16, cooperative);
        if !varying {
            caps.subgroups = None;
        }
        let prints_code = driver.contains("Honeykrisp")
            && std::env::var("AGX_MESA_DEBUG").is_ok_and(|options| options.split(',').any(|o| o == "shaders"));
        // SAFETY: the physical device is one of the living instance. Gain: what modules of others have to keep to.
        let limits = unsafe { entry.instance.get_physical_device_properties(physical) }.limits;
        let mut compiler = Self {
            device,
            executables,
            layouts: Mutex::default(),
            name,
            driver,
            version,
            caps,
            limits,
            capabilities,
            prints_code,
            _loaded: entry,
        };
        compiler.look_at_cooperative();
        Ok(compiler)
    }

    /// The layout of a program's pipeline: one for each list of bindings.
    fn layout_of(&self, program: &Program) -> Result<vk::PipelineLayout> {
        let list = program.bindings();
        let mut layouts = self.layouts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layout) = layouts.get(list) {
            return Ok(layout.pipeline);
        }
        let entries = list.iter().map(|binding| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(binding.number)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
                .descriptor_type(match binding.access {
                    BindingAccess::Uniform => vk::DescriptorType::UNIFORM_BUFFER,
                    BindingAccess::Read | BindingAccess::Write => vk::DescriptorType::STORAGE_BUFFER,
                })
        });
        let layout = self.lay_out(&[entries.collect()], 0)?;
        let pipeline = layout.pipeline;
        layouts.insert(list, layout);
        Ok(pipeline)
    }

    /// A pipeline's layout, to be [given back](Self::destroy_layout): the bindings of each set, and bytes of push
    /// constants.
    fn lay_out(&self, sets: &[Vec<vk::DescriptorSetLayoutBinding<'_>>], push_constants: u32) -> Result<Layout> {
        let mut layout = Layout { sets: Vec::new(), pipeline: vk::PipelineLayout::null() };
        let made = sets.iter().try_for_each(|bindings| {
            let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(bindings);
            // SAFETY: the device lives, and `bindings` until the call returns. Gain: pipelines need a layout.
            layout.sets.push(unsafe { self.device.create_descriptor_set_layout(&info, None) }?);
            Ok(())
        });
        let made = made.and_then(|()| {
            let range =
                vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(push_constants);
            let ranges = [range];
            let ranges = if push_constants > 0 { &ranges[..] } else { &[] };
            let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&layout.sets).push_constant_ranges(ranges);
            // SAFETY: as above, and so do the layouts of the sets.
            layout.pipeline = unsafe { self.device.create_pipeline_layout(&info, None) }?;
            Ok(())
        });
        match made {
            Ok(()) => Ok(layout),
            Err(e) => {
                self.destroy_layout(&layout);
                Err(failed::<vk::Result>("lay out bindings")(e))
            }
        }
    }

    /// Once for each layout.
    fn destroy_layout(&self, layout: &Layout) {
        // SAFETY: each handle was made once by this device, which lives, or is null; no pipeline is being made with it.
        // Gain: nothing is left behind.
        unsafe {
            self.device.destroy_pipeline_layout(layout.pipeline, None);
            layout.sets.iter().for_each(|&set| self.device.destroy_descriptor_set_layout(set, None));
        }
    }

    /// Finds out the lanes of a subgroup in pipelines that use cooperative matrices. What fails here fails no other
    /// kernel, as when a device is opened to run them.
    fn look_at_cooperative(&mut self) {
        let mut found = Vec::new();
        for edge in [16, 8] {
            let program = Program::new(CoopCheck { edge });
            if program.supported_by(&self.caps).is_err() {
                continue;
            }
            let made = lower(&program, self.version).and_then(|l| self.executable(&program, &l, false));
            match made {
                Ok(executable) => found.push(executable.subgroup),
                Err(e) => self.caps.cooperative_refused = Some(e.to_string()),
            }
        }
        found.dedup();
        self.caps.cooperative_lanes = match found[..] {
            [lanes] if self.caps.cooperative_refused.is_none() => Some(lanes),
            _ => None,
        };
    }

    /// Name of the device, as its driver has it. A pretended one may have none.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name and version of the driver.
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// What the device offers to kernels.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Version of Vulkan, such as `(1, 3)`.
    pub fn vulkan(&self) -> (u32, u32) {
        self.version
    }

    /// Compiles a program and asks what it became; with `code`, for its representations, too. An error if the driver
    /// refuses it.
    pub(super) fn executable(&self, program: &Program, lowered: &Lowered, code: bool) -> Result<Executable> {
        let what = format!("compile {program} on {}", self.name);
        let layout = self.layout_of(program)?;
        // SAFETY: naga wrote valid SPIR-V for features that the device was opened with, which `Program::supported_by`
        // asks for; the layout has every binding that the program declares. Gain: the driver's compiler needs it.
        unsafe { self.pipeline(&what, &lowered.words, c"main", layout, code) }
    }

    /// Compiles a shader of a module and asks what it became. An error if the device lacks what the shader needs, or
    /// the driver refuses it.
    ///
    /// # Safety
    /// As of [`Compiler::compile_module`].
    pub(super) unsafe fn executable_of(&self, module: &Module, entry: &Entry) -> Result<Executable> {
        let what = format!("compile {} on {}", entry.name, self.name);
        let fail = |reason: String| Error::gpu(what.clone(), reason);
        if let Some(lack) = module.capabilities().iter().find(|c| !self.capabilities.contains(c)) {
            return Err(fail(format!("it needs {lack:?}, which the device lacks or was not opened with")));
        }
        let limits = &self.limits;
        let within = |what: &str, needed: u32, most: u32| match needed > most {
            true => Err(fail(format!("{needed} {what}, of which the device has {most}"))),
            false => Ok(()),
        };
        let sizes = entry.workgroup.iter().zip(limits.max_compute_work_group_size);
        sizes.into_iter().try_for_each(|(&size, most)| within("invocations along one axis", size, most))?;
        within("invocations of a workgroup", entry.threads(), limits.max_compute_work_group_invocations)?;
        within("bytes of workgroup memory", entry.workgroup_bytes, limits.max_compute_shared_memory_size)?;
        within("bytes of push constants", entry.push_constants, limits.max_push_constants_size)?;
        let count = |uniform: bool| {
            let counts = entry.buffers.values().filter(|b| b.is_uniform == uniform).map(|b| b.count);
            counts.fold(0, u32::saturating_add)
        };
        within("uniform buffers", count(true), limits.max_per_stage_descriptor_uniform_buffers)?;
        within("storage buffers", count(false), limits.max_per_stage_descriptor_storage_buffers)?;
        let last = entry.buffers.keys().map(|&(set, _)| set).max();
        within("sets of bindings", last.map_or(0, |set| set.saturating_add(1)), limits.max_bound_descriptor_sets)?;
        let name = CString::new(entry.name.as_str()).map_err(|e| fail(e.to_string()))?;

        let mut sets = vec![Vec::new(); last.map_or(0, |set| set as usize + 1)];
        for (&(set, binding), buffers) in &entry.buffers {
            sets[set as usize].push(
                vk::DescriptorSetLayoutBinding::default()
                    .binding(binding)
                    .descriptor_count(buffers.count)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
                    .descriptor_type(match buffers.is_uniform {
                        true => vk::DescriptorType::UNIFORM_BUFFER,
                        false => vk::DescriptorType::STORAGE_BUFFER,
                    }),
            );
        }
        let layout = self.lay_out(&sets, entry.push_constants.next_multiple_of(4))?;
        // SAFETY: the caller vouches for the module; the layout has what the entry point uses, and the device what it
        // needs, both found above. Gain: what the driver makes of it.
        let executable = unsafe { self.pipeline(&what, module.words(), &name, layout.pipeline, true) };
        self.destroy_layout(&layout);
        executable
    }

    /// Makes a pipeline, describes it, and destroys it.
    ///
    /// # Safety
    /// The words are valid SPIR-V with this entry point of a compute shader, of features that the device was opened
    /// with; the layout lives, and has all that the entry point uses.
    unsafe fn pipeline(
        &self,
        what: &str,
        words: &[u32],
        entry: &CStr,
        layout: vk::PipelineLayout,
        code: bool,
    ) -> Result<Executable> {
        let info = vk::ShaderModuleCreateInfo::default().code(words);
        // SAFETY: the device lives, and the caller vouches for the words. Gain: the driver's compiler needs it.
        let module = unsafe { self.device.create_shader_module(&info, None) }.map_err(failed(what))?;
        let mut stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(entry);
        if self.caps.subgroups.is_some() {
            stage = stage.flags(vk::PipelineShaderStageCreateFlags::ALLOW_VARYING_SUBGROUP_SIZE);
        }
        let mut flags = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR;
        if code {
            flags |= vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
        }
        let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout).flags(flags)];
        // SAFETY: module and layout live, and the caller vouches for what they are. Gain: as above.
        let make = || unsafe { self.device.create_compute_pipelines(vk::PipelineCache::null(), &info, None) };
        let (made, printed) = if code && self.prints_code { printed_by(make) } else { (make(), Ok(String::new())) };
        // SAFETY: a module may be destroyed once its pipelines are made. Gain: thousands of them are compiled.
        unsafe { self.device.destroy_shader_module(module, None) };
        let made = made.map_err(|(_, e)| failed(what)(e))?;
        let Some(&pipeline) = made.first() else {
            return Err(Error::gpu(what.to_owned(), "no pipeline was made"));
        };
        let executable = self.describe(pipeline, code).map_err(failed(what)).and_then(|mut executable| {
            let printed = printed?;
            if executable.representations.is_empty() && !printed.is_empty() {
                executable.representations.push((super::isa::PRINTED.to_owned(), printed));
            }
            Ok(executable)
        });
        // SAFETY: the pipeline was made above, is used nowhere else, and was never run. Gain: as above.
        unsafe { self.device.destroy_pipeline(pipeline, None) };
        executable
    }

    fn describe(&self, pipeline: vk::Pipeline, code: bool) -> std::result::Result<Executable, vk::Result> {
        let info = vk::PipelineInfoKHR::default().pipeline(pipeline);
        // SAFETY: the pipeline lives, and was made with the flags that allow what is asked of it. Gain: this is what
        // the module is for.
        let executables = unsafe { self.executables.get_pipeline_executable_properties(&info) }?;
        let mut all = Executable::default();
        for (index, executable) in (0..).zip(&executables) {
            all.subgroup = executable.subgroup_size;
            let info = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline).executable_index(index);
            // SAFETY: as above. Gain: as above.
            for statistic in unsafe { self.executables.get_pipeline_executable_statistics(&info) }? {
                // SAFETY: `format` says which field of the union is meant. Gain: as above.
                let value = unsafe {
                    match statistic.format {
                        vk::PipelineExecutableStatisticFormatKHR::UINT64 => statistic.value.u64 as f64,
                        vk::PipelineExecutableStatisticFormatKHR::INT64 => statistic.value.i64 as f64,
                        vk::PipelineExecutableStatisticFormatKHR::FLOAT64 => statistic.value.f64,
                        _ => f64::from(statistic.value.b32),
                    }
                };
                all.statistics.push((text(&statistic.name), value));
            }
            if code {
                all.representations.extend(self.representations(&info)?);
            }
        }
        Ok(all)
    }

    fn representations(
        &self,
        info: &vk::PipelineExecutableInfoKHR<'_>,
    ) -> std::result::Result<Vec<(String, String)>, vk::Result> {
        let get = self.executables.fp().get_pipeline_executable_internal_representations_khr;
        let device = self.device.handle();
        let mut count = 0;
        // SAFETY: as in `describe`; without an array the driver only counts. Gain: the machine code.
        unsafe { get(device, info, &mut count, std::ptr::null_mut()) }.result()?;
        let mut found = vec![vk::PipelineExecutableInternalRepresentationKHR::default(); count as usize];
        // SAFETY: the array has `count` elements, whose data is null, so that the driver tells their sizes. Gain: as
        // above.
        unsafe { get(device, info, &mut count, found.as_mut_ptr()) }.result()?;
        found.truncate(count as usize);
        let mut contents: Vec<Vec<u8>> = found.iter().map(|r| vec![0; r.data_size]).collect();
        for (representation, content) in found.iter_mut().zip(&mut contents) {
            representation.p_data = content.as_mut_ptr().cast();
        }
        // SAFETY: each element points to memory of the size that the driver asked for, which lives until the end. Gain:
        // as above.
        unsafe { get(device, info, &mut count, found.as_mut_ptr()) }.result()?;
        let text_of = |content: &[u8]| {
            let end = content.iter().position(|&b| b == 0).unwrap_or(content.len());
            String::from_utf8_lossy(&content[..end]).into_owned()
        };
        Ok(found.iter().zip(&contents).map(|(r, content)| (text(&r.name), text_of(content))).collect())
    }
}

impl Drop for Compiler {
    fn drop(&mut self) {
        let layouts = std::mem::take(&mut *self.layouts.lock().unwrap_or_else(PoisonError::into_inner));
        layouts.values().for_each(|layout| self.destroy_layout(layout));
        // SAFETY: the device was made once, is used by nobody else, and nothing runs on it. Gain: nothing is left
        // behind.
        unsafe { self.device.destroy_device(None) };
    }
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").field("name", &self.name).field("driver", &self.driver).finish_non_exhaustive()
    }
}

/// What a call gives, and what it prints on the process's stdout, which does not appear there. Other threads should not
/// print meanwhile.
#[cfg(unix)]
fn printed_by<T>(call: impl FnOnce() -> T) -> (T, Result<String>) {
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsRawFd;

    let fail = |cause: std::io::Error| Error::gpu("read what the driver prints", cause.to_string());
    let file = std::io::stdout().flush().and_then(|()| tempfile::tempfile());
    let mut file = match file {
        Ok(file) => file,
        Err(e) => return (call(), Err(fail(e))),
    };
    // SAFETY: plain calls of the C library on open descriptors; `saved` is closed once. C's own buffers are flushed
    // before and after, so that nothing ends up on the wrong side. Gain: the only way to Honeykrisp's machine code.
    let (result, moved) = unsafe {
        libc::fflush(std::ptr::null_mut());
        let saved = libc::dup(1);
        let moved = saved >= 0 && libc::dup2(file.as_raw_fd(), 1) >= 0;
        let result = call();
        libc::fflush(std::ptr::null_mut());
        let back = !moved || libc::dup2(saved, 1) >= 0;
        if saved >= 0 {
            libc::close(saved);
        }
        (result, moved && back)
    };
    if !moved {
        return (result, Err(fail(std::io::Error::last_os_error())));
    }
    let mut text = Vec::new();
    let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut text));
    (result, read.map(|_| String::from_utf8_lossy(&text).into_owned()).map_err(fail))
}

/// Drivers of other systems hand over what they have.
#[cfg(not(unix))]
fn printed_by<T>(call: impl FnOnce() -> T) -> (T, Result<String>) {
    (call(), Ok(String::new()))
}

/// What shaders can do with subgroups on a device.
fn of_subgroups(instance: &ash::Instance, physical: vk::PhysicalDevice) -> impl Iterator<Item = Capability> {
    let mut subgroups = vk::PhysicalDeviceSubgroupProperties::default();
    let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut subgroups);
    // SAFETY: the physical device is one of the living instance, and the chain is of Vulkan 1.1. Gain: what modules of
    // others may use.
    unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
    let in_compute = subgroups.supported_stages.contains(vk::ShaderStageFlags::COMPUTE);
    let all = [
        (vk::SubgroupFeatureFlags::BASIC, Capability::GroupNonUniform),
        (vk::SubgroupFeatureFlags::VOTE, Capability::GroupNonUniformVote),
        (vk::SubgroupFeatureFlags::ARITHMETIC, Capability::GroupNonUniformArithmetic),
        (vk::SubgroupFeatureFlags::BALLOT, Capability::GroupNonUniformBallot),
        (vk::SubgroupFeatureFlags::SHUFFLE, Capability::GroupNonUniformShuffle),
        (vk::SubgroupFeatureFlags::SHUFFLE_RELATIVE, Capability::GroupNonUniformShuffleRelative),
        (vk::SubgroupFeatureFlags::CLUSTERED, Capability::GroupNonUniformClustered),
        (vk::SubgroupFeatureFlags::QUAD, Capability::GroupNonUniformQuad),
    ];
    let has = subgroups.supported_operations;
    all.into_iter().filter(move |(operations, _)| in_compute && has.contains(*operations)).map(|(_, name)| name)
}

/// Driver, version of Vulkan, and capabilities of a device, in the words of wgpu's limits.
fn describe(entry: &Loaded, physical: vk::PhysicalDevice, f16: bool, cooperative: bool) -> (String, (u32, u32), Caps) {
    let instance = &entry.instance;
    let mut driver = vk::PhysicalDeviceDriverProperties::default();
    let mut subgroups = vk::PhysicalDeviceSubgroupSizeControlProperties::default();
    let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut driver).push_next(&mut subgroups);
    // SAFETY: the chain lives until the call returns, and is of Vulkan 1.3. Gain: what kernels ask about.
    unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
    let core = properties.properties;
    let limits = core.limits;
    let version = (vk::api_version_major(core.api_version), vk::api_version_minor(core.api_version));
    let name = [text(&driver.driver_name), text(&driver.driver_info)].join(" ").trim().to_owned();
    let matrices = ash::khr::cooperative_matrix::Instance::new(&entry._entry, instance);
    let shapes = match cooperative {
        true => {
            // SAFETY: the device lists the extension. Gain: as above.
            unsafe { matrices.get_physical_device_cooperative_matrix_properties(physical) }.unwrap_or_default()
        }
        false => Vec::new(),
    };
    let scalar = |t| match t {
        vk::ComponentTypeKHR::FLOAT16 => Some("f16"),
        vk::ComponentTypeKHR::FLOAT32 => Some("f32"),
        _ => None,
    };
    let shape = |p: &vk::CooperativeMatrixPropertiesKHR<'_>| {
        let of_subgroups = p.scope == vk::ScopeKHR::SUBGROUP && p.a_type == p.b_type && p.c_type == p.result_type;
        let (ab, c) = (scalar(p.a_type)?, scalar(p.c_type)?);
        of_subgroups.then_some(CoopShape { m: p.m_size, n: p.n_size, k: p.k_size, ab, c })
    };
    let caps = Caps {
        architecture: None,
        f16,
        subgroups: Some((subgroups.min_subgroup_size, subgroups.max_subgroup_size)),
        cooperative: shapes.iter().filter_map(shape).collect(),
        // What a pipeline with such matrices has is seen when one was made.
        cooperative_lanes: None,
        cooperative_refused: None,
        cooperative_scalars: false,
        emulates_cooperative: false,
        unrolls: true,
        timestamps: false,
        workgroup_memory: limits.max_compute_shared_memory_size,
        workgroup_threads: limits.max_compute_work_group_invocations.min(limits.max_compute_work_group_size[0]),
        grid: limits.max_compute_work_group_count[0],
        busy_threads: 1 << 17,
        // Not asked for: nothing is planned by them here.
        rates: Rates { fma: 1.0, cooperative: 1.0, memory: 1.0, cache: 1.0, dispatch: 0.0 },
        binding_bytes: u64::from(limits.max_storage_buffer_range),
        buffer_bytes: u64::from(limits.max_storage_buffer_range),
    };
    (name, version, caps)
}
