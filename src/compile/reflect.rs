//! Compute shaders of anyone's, as SPIR-V: what a pipeline must be told of them, read from the words themselves.
//!
//! Read are entry points, sizes of workgroups, bindings of buffers, push constants and workgroup memory. Specialisation
//! constants have the values that the module gives them. Invariant: of a [`Module`] every instruction lies within its
//! words, and every entry point is one that a pipeline can be made for; whatever stands in the way of that (images,
//! arrays of buffers without a length, sizes that are computed) is an error that says what it is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use spirv::{BuiltIn, Capability, Decoration, ExecutionMode, ExecutionModel, Op, StorageClass};

use crate::error::{Error, Result};

/// Words before the first instruction.
const HEADER: usize = 5;

/// The newest version of SPIR-V that Vulkan 1.3 takes, as in a module's header.
const NEWEST: u32 = 0x0001_0600;

/// From this version on an entry point names all variables that it uses.
const NAMES_ALL: u32 = 0x0001_0400;

/// A module of compute shaders.
#[derive(Clone, Debug)]
pub struct Module {
    words: Vec<u32>,
    capabilities: Vec<Capability>,
    entries: Vec<Entry>,
}

/// A compute shader of a module.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Invocations of a workgroup, along x, y and z.
    pub(super) workgroup: [u32; 3],
    /// Bytes of workgroup memory that it uses.
    pub(super) workgroup_bytes: u32,
    /// Bytes of push constants.
    pub(super) push_constants: u32,
    /// By set and binding.
    pub(super) buffers: BTreeMap<(u32, u32), Buffers>,
}

/// What stands at a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffers {
    pub(super) is_uniform: bool,
    /// Of an array of them; else 1.
    pub(super) count: u32,
}

impl Entry {
    /// Invocations of a workgroup.
    pub(super) fn threads(&self) -> u32 {
        self.workgroup.iter().fold(1, |threads: u32, &size| threads.saturating_mul(size))
    }
}

impl Module {
    /// Reads a file of SPIR-V.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        parse(&bytes).map_err(|reason| Error::file(path, reason))
    }

    /// Reads SPIR-V of either byte order.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        parse(bytes).map_err(|reason| Error::invalid(format!("SPIR-V module: {reason}")))
    }

    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    pub(super) fn capabilities(&self) -> &[Capability] {
        &self.capabilities
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

const TOO_LARGE: &str = "larger than any device";

/// What is wrong with a module, without its name.
type Parsed<T> = std::result::Result<T, String>;

fn parse(bytes: &[u8]) -> Parsed<Module> {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut words: Vec<u32> = words.iter().map(|&word| u32::from_le_bytes(word)).collect();
    match words.first() {
        Some(&spirv::MAGIC_NUMBER) => {}
        Some(&first) if first.swap_bytes() == spirv::MAGIC_NUMBER => {
            words.iter_mut().for_each(|word| *word = word.swap_bytes());
        }
        _ => return Err("is not SPIR-V: it does not begin with 0x07230203".into()),
    }
    if !rest.is_empty() || words.len() < HEADER {
        return Err(format!("is cut off: {} bytes are no SPIR-V header and whole words", bytes.len()));
    }
    let version = words[1];
    if version > NEWEST {
        return Err(format!("is SPIR-V {}.{}; Vulkan 1.3 takes 1.6", version >> 16 & 0xff, version >> 8 & 0xff));
    }
    let mut reader = Reader { version, ..Reader::default() };
    let mut at = HEADER;
    while let Some(&first) = words.get(at) {
        let count = (first >> 16) as usize;
        if count == 0 {
            return Err(format!("word {at} begins an instruction without length"));
        }
        let operands = words.get(at + 1..at + count).ok_or_else(|| {
            format!(
                "is cut off: the instruction at word {at} has {count} words, of which {} are there",
                words.len() - at
            )
        })?;
        // What is newer than this crate's list declares nothing that is asked for below.
        if let Some(op) = Op::from_u32(first & 0xffff) {
            reader.read(op, operands).ok_or_else(|| format!("the {op:?} at word {at} is too short"))?;
        }
        at += count;
    }
    let entries = reader.entries()?;
    let capabilities = reader.capabilities.iter().map(|&number| {
        Capability::from_u32(number).ok_or_else(|| format!("needs capability {number}, which is not known here"))
    });
    Ok(Module { capabilities: capabilities.collect::<Parsed<_>>()?, entries, words })
}

/// A type, as far as bindings and sizes ask.
#[derive(Clone, Debug)]
enum Kind {
    Number,
    /// The elements' type, and how many there are; none where there can be any number.
    Array(u32, Option<Parsed<u32>>),
    Struct,
    /// What a pointer points to.
    Pointer(u32),
    /// What is no memory.
    Opaque(&'static str),
}

/// Bytes and alignment: as decorations say, and where there are none as WGSL lays out workgroup memory.
type Layout = Parsed<(u64, u64)>;

/// What was declared so far.
#[derive(Default)]
struct Reader {
    version: u32,
    capabilities: Vec<u32>,
    /// Name, function, and the variables that it names.
    entries: Vec<(String, u32, Vec<u32>)>,
    /// Sizes of workgroups by function: numbers, or constants that hold them.
    sizes: HashMap<u32, [u32; 3]>,
    size_constants: HashMap<u32, [u32; 3]>,
    /// The constant that overrides them all.
    size_of_all: Option<u32>,
    /// A type is declared after what it consists of, and after its decorations.
    types: HashMap<u32, (Kind, Layout)>,
    constants: HashMap<u32, u32>,
    composites: HashMap<u32, Vec<u32>>,
    /// Variables outside of functions, in their order: id, type, and where they live.
    variables: Vec<(u32, u32, u32)>,
    sets: HashMap<u32, u32>,
    bindings: HashMap<u32, u32>,
    blocks: HashSet<u32>,
    buffer_blocks: HashSet<u32>,
    strides: HashMap<u32, u32>,
    offsets: HashMap<(u32, u32), u32>,
    /// The words of each function.
    functions: HashMap<u32, HashSet<u32>>,
    function: Option<u32>,
}

impl Reader {
    /// Takes one instruction. `None` if it has fewer words than it must.
    fn read(&mut self, op: Op, operands: &[u32]) -> Option<()> {
        let word = |at: usize| operands.get(at).copied();
        match op {
            Op::Capability => self.capabilities.push(word(0)?),
            Op::EntryPoint if word(0)? == ExecutionModel::GLCompute as u32 => {
                let (name, rest) = literal(operands.get(2..)?)?;
                self.entries.push((name, word(1)?, rest.to_vec()));
            }
            Op::ExecutionMode if word(1)? == ExecutionMode::LocalSize as u32 => {
                self.sizes.insert(word(0)?, [word(2)?, word(3)?, word(4)?]);
            }
            Op::ExecutionModeId if word(1)? == ExecutionMode::LocalSizeId as u32 => {
                self.size_constants.insert(word(0)?, [word(2)?, word(3)?, word(4)?]);
            }
            Op::Decorate => self.decorate(word(0)?, word(1)?, word(2))?,
            Op::MemberDecorate if word(2)? == Decoration::Offset as u32 => {
                self.offsets.insert((word(0)?, word(1)?), word(3)?);
            }
            Op::Constant | Op::SpecConstant => {
                self.constants.insert(word(1)?, word(2)?);
            }
            Op::ConstantComposite | Op::SpecConstantComposite => {
                self.composites.insert(word(1)?, operands.get(2..)?.to_vec());
            }
            Op::Function => {
                self.function = Some(word(1)?);
                self.functions.insert(word(1)?, HashSet::new());
            }
            Op::FunctionEnd => self.function = None,
            Op::Variable if self.function.is_none() => self.variables.push((word(1)?, word(0)?, word(2)?)),
            _ => {
                if let Some(declared) = self.type_of(op, operands)? {
                    self.types.insert(word(0)?, declared);
                }
            }
        }
        if let Some(words) = self.function.and_then(|function| self.functions.get_mut(&function)) {
            words.extend(operands);
        }
        Some(())
    }

    /// The type that an instruction declares, if it does. `None` outside if it has fewer words than it must.
    fn type_of(&self, op: Op, operands: &[u32]) -> Option<Option<(Kind, Layout)>> {
        let word = |at: usize| operands.get(at).copied();
        let opaque = |what: &'static str| (Kind::Opaque(what), Err(format!("{what} has no size")));
        let declared = match op {
            // WGSL's truth values take four bytes.
            Op::TypeBool => (Kind::Number, Ok((4, 4))),
            Op::TypeInt | Op::TypeFloat => {
                let bytes = u64::from(word(1)?).div_ceil(8).max(1);
                (Kind::Number, Ok((bytes, bytes)))
            }
            Op::TypeVector => {
                let count = u64::from(word(2)?);
                let of = |(bytes, _): (u64, u64)| {
                    let align = bytes.checked_mul(count.next_power_of_two());
                    bytes.checked_mul(count).zip(align).ok_or_else(|| TOO_LARGE.to_owned())
                };
                (Kind::Number, self.layout(word(1)?).and_then(of))
            }
            Op::TypeMatrix => (Kind::Number, self.repeated(word(1)?, None, word(2)?)),
            Op::TypeArray => {
                let (of, length) = (word(1)?, self.length(word(2)?));
                let stride = self.strides.get(&word(0)?).copied();
                let layout = length.clone().and_then(|length| self.repeated(of, stride, length));
                (Kind::Array(of, Some(length)), layout)
            }
            Op::TypeRuntimeArray => (Kind::Array(word(1)?, None), Err("an array without a length has no size".into())),
            Op::TypeStruct => (Kind::Struct, self.joined(word(0)?, operands.get(1..)?)),
            Op::TypePointer => (Kind::Pointer(word(2)?), Err("a pointer has no size".into())),
            Op::TypeImage => opaque("an image"),
            Op::TypeSampledImage => opaque("a sampled image"),
            Op::TypeSampler => opaque("a sampler"),
            _ => return Some(None),
        };
        Some(Some(declared))
    }

    fn layout(&self, id: u32) -> Layout {
        self.types.get(&id).map_or_else(|| Err(format!("%{id} has no size")), |(_, layout)| layout.clone())
    }

    /// Of so many elements.
    fn repeated(&self, of: u32, stride: Option<u32>, count: u32) -> Layout {
        let (bytes, align) = self.layout(of)?;
        let stride = stride.map_or(bytes.checked_next_multiple_of(align), |stride| Some(stride.into()));
        let bytes = stride.and_then(|stride| stride.checked_mul(count.into())).ok_or(TOO_LARGE)?;
        Ok((bytes, align))
    }

    /// Of a struct.
    fn joined(&self, id: u32, members: &[u32]) -> Layout {
        let (mut end, mut largest) = (0u64, 1);
        for (member, &of) in (0..).zip(members) {
            let (bytes, align) = self.layout(of)?;
            let stated = self.offsets.get(&(id, member)).map(|&offset| u64::from(offset));
            let start = stated.or_else(|| end.checked_next_multiple_of(align));
            end = end.max(start.and_then(|start| start.checked_add(bytes)).ok_or(TOO_LARGE)?);
            largest = largest.max(align);
        }
        Ok((end, largest))
    }

    fn decorate(&mut self, id: u32, decoration: u32, value: Option<u32>) -> Option<()> {
        let values = match Decoration::from_u32(decoration) {
            Some(Decoration::DescriptorSet) => &mut self.sets,
            Some(Decoration::Binding) => &mut self.bindings,
            Some(Decoration::ArrayStride) => &mut self.strides,
            Some(Decoration::Block) => {
                self.blocks.insert(id);
                return Some(());
            }
            Some(Decoration::BufferBlock) => {
                self.buffer_blocks.insert(id);
                return Some(());
            }
            Some(Decoration::BuiltIn) if value? == BuiltIn::WorkgroupSize as u32 => {
                self.size_of_all = Some(id);
                return Some(());
            }
            _ => return Some(()),
        };
        values.insert(id, value?);
        Some(())
    }

    fn entries(&self) -> Parsed<Vec<Entry>> {
        if self.entries.is_empty() {
            return Err("has no compute shader: no entry point is of GLCompute".into());
        }
        let entry = |(name, function, named): &(String, u32, Vec<u32>)| {
            self.entry(name, *function, named).map_err(|reason| format!("entry point {name}: {reason}"))
        };
        self.entries.iter().map(entry).collect()
    }

    fn entry(&self, name: &str, function: u32, named: &[u32]) -> Parsed<Entry> {
        let workgroup = self.workgroup(function)?;
        let used = match self.version >= NAMES_ALL {
            true => named.iter().copied().collect(),
            false => self.reached(function),
        };
        let mut entry =
            Entry { name: name.to_owned(), workgroup, workgroup_bytes: 0, push_constants: 0, buffers: BTreeMap::new() };
        for &(id, pointer, class) in self.variables.iter().filter(|(id, ..)| used.contains(id)) {
            let Some((Kind::Pointer(pointee), _)) = self.types.get(&pointer) else {
                return Err(format!("variable %{id} has no type of a pointer"));
            };
            let sized = |what: &str, before: u32| {
                let (bytes, align) = self.layout(*pointee).map_err(|e| format!("{what}: {e}"))?;
                let bytes = bytes.checked_next_multiple_of(align).and_then(|bytes| bytes.checked_add(before.into()));
                bytes.and_then(|bytes| u32::try_from(bytes).ok()).ok_or_else(|| format!("{what}: {TOO_LARGE}"))
            };
            match StorageClass::from_u32(class) {
                Some(StorageClass::Workgroup) => {
                    entry.workgroup_bytes = sized("workgroup memory", entry.workgroup_bytes)?;
                }
                Some(StorageClass::PushConstant) => entry.push_constants = sized("push constants", 0)?,
                Some(StorageClass::Uniform | StorageClass::StorageBuffer | StorageClass::UniformConstant) => {
                    let place = self.sets.get(&id).copied().zip(self.bindings.get(&id).copied());
                    let place = place.ok_or_else(|| format!("variable %{id} has no set and binding"))?;
                    let buffers = self.buffers(*pointee, class == StorageClass::Uniform as u32);
                    let buffers = buffers.map_err(|e| format!("set {}, binding {}: {e}", place.0, place.1))?;
                    if entry.buffers.insert(place, buffers).is_some_and(|before| before != buffers) {
                        return Err(format!("set {}, binding {}: two kinds of buffers", place.0, place.1));
                    }
                }
                Some(StorageClass::Input | StorageClass::Output | StorageClass::Private) => {}
                other => return Err(format!("variable %{id} lives in {other:?}, which is not known here")),
            }
        }
        Ok(entry)
    }

    fn workgroup(&self, function: u32) -> Parsed<[u32; 3]> {
        let value = |id: u32| {
            let value = self.constants.get(&id).copied();
            value.ok_or_else(|| format!("the size of its workgroups is computed: %{id} is no plain constant"))
        };
        if let Some(all) = self.size_of_all {
            let parts = self.composites.get(&all).map(Vec::as_slice);
            return match parts {
                Some(&[x, y, z]) => Ok([value(x)?, value(y)?, value(z)?]),
                _ => Err(format!("the size of its workgroups is computed: %{all} is no plain constant")),
            };
        }
        match (self.sizes.get(&function), self.size_constants.get(&function)) {
            (Some(&size), _) => Ok(size),
            (None, Some(&[x, y, z])) => Ok([value(x)?, value(y)?, value(z)?]),
            (None, None) => Err("the size of its workgroups is not stated".into()),
        }
    }

    /// Ids that a function and those that it calls may use. Numbers that stand in the code are taken for ids, too:
    /// that a variable too many is found in a module of several shaders does no harm.
    fn reached(&self, function: u32) -> HashSet<u32> {
        let (mut reached, mut todo) = (HashSet::new(), vec![function]);
        let mut called = HashSet::from([function]);
        while let Some(words) = todo.pop().and_then(|function| self.functions.get(&function)) {
            todo.extend(words.iter().filter(|id| self.functions.contains_key(id) && called.insert(**id)));
            reached.extend(words);
        }
        reached
    }

    /// What a variable that is bound consists of.
    fn buffers(&self, id: u32, is_uniform: bool) -> Parsed<Buffers> {
        let kind = |id: u32| self.types.get(&id).map(|(kind, _)| kind);
        let (of, count) = match kind(id) {
            Some(Kind::Array(of, Some(length))) => (*of, length.clone()?),
            Some(Kind::Array(_, None)) => return Err("an array of buffers without a length".into()),
            _ => (id, 1),
        };
        match kind(of) {
            Some(Kind::Struct) if is_uniform && self.buffer_blocks.contains(&of) => {
                Ok(Buffers { is_uniform: false, count })
            }
            Some(Kind::Struct) if self.blocks.contains(&of) => Ok(Buffers { is_uniform, count }),
            Some(Kind::Opaque(what)) => Err(format!("{what}, where only buffers are known")),
            _ => Err("what is bound there is no buffer".into()),
        }
    }

    fn length(&self, constant: u32) -> Parsed<u32> {
        let length = self.constants.get(&constant).copied();
        length.ok_or_else(|| format!("an array whose length is computed: %{constant} is no plain constant"))
    }
}

/// A text of SPIR-V's, and the words after it. `None` if it does not end, or is not UTF-8.
fn literal(words: &[u32]) -> Option<(String, &[u32])> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let end = bytes.iter().position(|&byte| byte == 0)?;
    Some((String::from_utf8(bytes[..end].to_vec()).ok()?, &words[end / 4 + 1..]))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::compile::spirv::lower;
    use crate::kernels::{BindingAccess, Program};

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn refused(bytes: &[u8]) -> String {
        Module::from_bytes(bytes).unwrap_err().to_string()
    }

    /// The SPIR-V that naga makes of WGSL, with all its entry points.
    fn words(source: &str, version: (u8, u8)) -> Vec<u32> {
        let module = naga::front::wgsl::parse_str(source).unwrap();
        let (flags, all) = (naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
        let info = naga::valid::Validator::new(flags, all).validate(&module).unwrap();
        let options = naga::back::spv::Options { lang_version: version, ..Default::default() };
        naga::back::spv::write_vec(&module, &info, &options, None).unwrap()
    }

    /// A module of instructions: number and operands.
    fn assembled(version: u32, instructions: &[(Op, &[u32])]) -> Vec<u8> {
        let mut words = vec![spirv::MAGIC_NUMBER, version, 0, 100, 0];
        for (op, operands) in instructions {
            words.push((operands.len() as u32 + 1) << 16 | *op as u32);
            words.extend(*operands);
        }
        bytes(&words)
    }

    const MAIN: u32 = u32::from_le_bytes(*b"main");
    const COMPUTE: u32 = ExecutionModel::GLCompute as u32;
    const SIZE: u32 = ExecutionMode::LocalSize as u32;

    /// What is read from the words is what the program was written with.
    #[test]
    fn own_programs_are_read_back() {
        let (mut seen, mut shared) = (0, 0);
        for program in Program::all().filter(Program::is_representative).step_by(97) {
            for vulkan in [(1, 1), (1, 3)] {
                let lowered = lower(&program, vulkan).unwrap();
                let module = Module::from_bytes(&bytes(&lowered.words)).unwrap();
                let [entry] = module.entries() else { panic!("{program}: {:?}", module.entries()) };
                assert_eq!((entry.name.as_str(), entry.threads()), ("main", lowered.threads), "{program}");
                assert_eq!((entry.workgroup_bytes, entry.push_constants), (lowered.workgroup_bytes, 0), "{program}");
                // A shader need not use all that its layout has, but writes its result.
                let is_uniform = |number: u32| {
                    let binding = program.bindings().iter().find(|b| b.number == number);
                    binding.map(|b| matches!(b.access, BindingAccess::Uniform))
                };
                for (&(set, number), found) in &entry.buffers {
                    assert_eq!((set, Some(found.is_uniform), found.count), (0, is_uniform(number), 1), "{program}");
                }
                for written in program.bindings().iter().filter(|b| matches!(b.access, BindingAccess::Write)) {
                    assert!(entry.buffers.contains_key(&(0, written.number)), "{program}: {}", written.number);
                }
                assert!(module.capabilities().contains(&Capability::Shader));
                shared += u32::from(lowered.workgroup_bytes > 0);
                seen += 1;
            }
        }
        assert!(seen > 10 && shared > 5, "{seen} {shared}");
    }

    /// Each entry point has what it uses itself, whether the module names it or its functions have to be followed.
    #[test]
    fn entry_points_of_one_module_are_told_apart() {
        let source = "
            struct Row { a: vec3<f32>, b: f32, c: array<vec2<f32>, 3> }
            var<workgroup> rows: array<Row, 5>;
            var<workgroup> few: array<u32, 7>;
            @group(0) @binding(3) var<uniform> scale: vec4<f32>;
            @group(2) @binding(1) var<storage, read_write> out: array<f32>;
            fn write(at: u32) { out[at] = rows[at].b * scale.x; }
            @compute @workgroup_size(8, 4, 2) fn first(@builtin(local_invocation_index) at: u32) { write(at); }
            @compute @workgroup_size(64) fn second(@builtin(local_invocation_index) at: u32) { out[at] = f32(few[at]); }";
        let uniform = ((0, 3), Buffers { is_uniform: true, count: 1 });
        let storage = ((2, 1), Buffers { is_uniform: false, count: 1 });
        for version in [(1, 0), (1, 3), (1, 4), (1, 6)] {
            let module = Module::from_bytes(&bytes(&words(source, version))).unwrap();
            let [first, second] = module.entries() else { panic!("{:?}", module.entries()) };
            assert_eq!((first.name.as_str(), first.workgroup), ("first", [8, 4, 2]));
            assert_eq!((second.name.as_str(), second.threads()), ("second", 64));
            // A row: 12 bytes and 4, then three of 8; its alignment is 16.
            assert_eq!((first.workgroup_bytes, second.workgroup_bytes), (5 * 48, 7 * 4), "{version:?}");
            assert_eq!(first.buffers, BTreeMap::from([uniform, storage]), "{version:?}");
            assert_eq!(second.buffers, BTreeMap::from([storage]), "{version:?}");
        }
    }

    #[test]
    fn either_byte_order_is_read() {
        let little = words("@compute @workgroup_size(3) fn f() {}", (1, 3));
        let big: Vec<u8> = little.iter().flat_map(|word| word.to_be_bytes()).collect();
        assert_eq!(Module::from_bytes(&big).unwrap().words(), little);
    }

    #[test]
    fn sizes_by_constants_and_push_constants_are_read() {
        let id = ExecutionMode::LocalSizeId as u32;
        let (push, offset) = (StorageClass::PushConstant as u32, Decoration::Offset as u32);
        let common: [(Op, &[u32]); 9] = [
            (Op::MemberDecorate, &[20, 1, offset, 8]),
            (Op::TypeInt, &[10, 32, 0]),
            (Op::SpecConstant, &[10, 1, 16]),
            (Op::Constant, &[10, 2, 4]),
            (Op::TypeStruct, &[20, 10, 10]),
            (Op::TypePointer, &[21, push, 20]),
            (Op::Variable, &[21, 30, push]),
            (Op::TypeVector, &[11, 10, 3]),
            (Op::SpecConstantComposite, &[11, 40, 1, 2, 2]),
        ];
        let entry: (Op, &[u32]) = (Op::EntryPoint, &[COMPUTE, 5, MAIN, 0, 30]);
        let by_mode: (Op, &[u32]) = (Op::ExecutionModeId, &[5, id, 1, 2, 2]);
        let read = |first: &[(Op, &[u32])]| {
            let module = Module::from_bytes(&assembled(NEWEST, &[first, &common[..]].concat()));
            module.map(|module| module.entries()[0].clone()).map_err(|e| e.to_string())
        };
        let found = read(&[entry, by_mode]).unwrap();
        assert_eq!((found.workgroup, found.push_constants), ([16, 4, 4], 12));
        // The decorated constant is stronger than what the entry point states.
        let decorated: (Op, &[u32]) = (Op::Decorate, &[40, Decoration::BuiltIn as u32, BuiltIn::WorkgroupSize as u32]);
        assert_eq!(read(&[entry, (Op::ExecutionMode, &[5, SIZE, 1, 1, 1]), decorated]).unwrap().workgroup, [16, 4, 4]);
        assert!(read(&[entry]).unwrap_err().contains("entry point main: the size of its workgroups is not stated"));
        let computed: (Op, &[u32]) = (Op::ExecutionModeId, &[5, id, 1, 77, 2]);
        assert!(read(&[entry, computed]).unwrap_err().contains("%77 is no plain constant"));
    }

    #[test]
    fn what_no_pipeline_can_be_made_for_says_why() {
        assert!(refused(b"").contains("is not SPIR-V"));
        assert!(refused(b"@compute fn main() {}").contains("is not SPIR-V"));
        let module = words("@compute @workgroup_size(1) fn f() {}", (1, 3));
        assert!(refused(&bytes(&module[..4])).contains("is cut off"));
        assert!(refused(&bytes(&module)[..4 * module.len() - 2]).contains("is cut off"));
        assert!(refused(&bytes(&module[..=HEADER])).contains("at word 5 has 2 words, of which 1 are there"));
        let mut newer = module.clone();
        newer[1] = 0x0001_0700;
        assert!(refused(&bytes(&newer)).contains("is SPIR-V 1.7"));
        let mut endless = module.clone();
        endless[HEADER] &= 0xffff;
        assert!(refused(&bytes(&endless)).contains("word 5 begins an instruction without length"));
        let short = assembled(NEWEST, &[(Op::EntryPoint, &[COMPUTE, 5])]);
        assert!(refused(&short).contains("the EntryPoint at word 5 is too short"));
        let fragment = words("@fragment fn f() {}", (1, 3));
        assert!(refused(&bytes(&fragment)).contains("has no compute shader"));
        let image = "@group(1) @binding(2) var image: texture_2d<f32>;
            @group(0) @binding(0) var<storage, read_write> out: vec4<f32>;
            @compute @workgroup_size(1) fn f() { out = textureLoad(image, vec2(0, 0), 0); }";
        let said = refused(&bytes(&words(image, (1, 3))));
        assert!(said.contains("entry point f: set 1, binding 2: an image, where only buffers are known"), "{said}");
        let known: (Op, &[u32]) = (Op::EntryPoint, &[COMPUTE, 5, MAIN, 0, 30]);
        let size: (Op, &[u32]) = (Op::ExecutionMode, &[5, SIZE, 1, 1, 1]);
        let workgroup = StorageClass::Workgroup as u32;
        // Four types of 2^20 elements of each other.
        let nested: [(Op, &[u32]); 8] = [
            (Op::TypeInt, &[10, 32, 0]),
            (Op::Constant, &[10, 1, 1 << 20]),
            (Op::TypeArray, &[11, 10, 1]),
            (Op::TypeArray, &[12, 11, 1]),
            (Op::TypeArray, &[13, 12, 1]),
            (Op::TypeArray, &[14, 13, 1]),
            (Op::TypePointer, &[21, workgroup, 14]),
            (Op::Variable, &[21, 30, workgroup]),
        ];
        let said = refused(&assembled(NEWEST, &[&[known, size], &nested[..]].concat()));
        assert!(said.contains("workgroup memory: larger than any device"), "{said}");
    }

    /// Whatever stands in a file, it is read or refused.
    #[test]
    fn no_words_make_it_panic() {
        let source = "
            var<workgroup> tile: array<array<vec4<f32>, 4>, 8>;
            @group(0) @binding(0) var<storage, read_write> out: array<vec4<f32>>;
            @compute @workgroup_size(32) fn f(@builtin(local_invocation_index) at: u32) { out[at] = tile[at / 4u][at % 4u]; }";
        for version in [(1, 3), (1, 4)] {
            let whole = words(source, version);
            assert!(Module::from_bytes(&bytes(&whole)).is_ok());
            let mut refusals = 0;
            for at in 0..whole.len() {
                refusals += usize::from(Module::from_bytes(&bytes(&whole[..at])).is_err());
                for value in [0, 1, 3, whole[at] ^ 0x0001_0000, whole[at].wrapping_add(1), u32::MAX] {
                    let mut changed = whole.clone();
                    changed[at] = value;
                    refusals += usize::from(Module::from_bytes(&bytes(&changed)).is_err());
                }
            }
            assert!(refusals > whole.len() / 2, "{refusals} of {} words", whole.len());
        }
    }
}
