//! The interpreter behind [`super::run`]: naga's IR, executed by all threads of a workgroup in lock step.
//!
//! A value is held for all lanes at once, component by component: component `c` of lane `l` is word `c * lanes + l`. A
//! component is 32 bits: an integer, a bool as 0 or 1, an f32, or an f16 widened to f32 and rounded after every
//! operation. Vectors, arrays and structs are their components in order. Control flow is a mask of active lanes.
//! Inactive lanes compute, too, and what they compute is never read: they touch no memory.

mod arithmetic;
mod matrix;

use std::collections::HashMap;
use std::rc::Rc;

use naga::proc::TypeResolution;
use naga::valid::{FunctionInfo, ModuleInfo};
use naga::{
    AddressSpace, ArraySize, Binding, Block, BuiltIn, Expression, Function, Handle, MathFunction, Module,
    RelationalFunction, Scalar, ScalarKind, Statement, SwitchValue, TypeInner, UnaryOperator,
};

use arithmetic::{binary, convert_to, float, map, math, read, word, write};
use matrix::{matrix_lanes, multiply_add};

use super::{Access, FIRST_SUBGROUP, INACTIVE, Launch, Loop, Trace, Variable};
use crate::error::{Error, Result};

/// A loop that runs longer than this is taken for one that does not end.
const MAX_ITERATIONS: u64 = 1 << 24;

type Lanes = Rc<Vec<u32>>;
type Mask = Vec<bool>;

#[derive(Clone)]
enum Value {
    Data(Lanes),
    Pointer(Pointer),
}

/// Where something is: in bytes for memory, in components for registers.
#[derive(Clone)]
struct Pointer {
    root: Root,
    offset: Offset,
}

#[derive(Clone, Copy)]
enum Root {
    /// A global variable in memory, by its index.
    Memory(usize),
    /// A variable of the threads' own.
    Registers(usize),
}

#[derive(Clone)]
enum Offset {
    Same(u32),
    Each(Lanes),
}

impl Offset {
    fn of(&self, lane: usize) -> u32 {
        match self {
            Self::Same(offset) => *offset,
            Self::Each(offsets) => offsets[lane],
        }
    }
}

/// A global variable that is not the threads' own.
struct Memory {
    name: String,
    binding: Option<u32>,
    space: AddressSpace,
    bytes: Vec<u8>,
    /// Byte of workgroup memory at which it starts, and its number among the variables there.
    base: u32,
    variable: usize,
}

/// A function being executed.
struct Frame<'m> {
    function: &'m Function,
    info: &'m FunctionInfo,
    values: Vec<Option<Value>>,
    arguments: Vec<Value>,
    /// Where its variables are among the registers.
    locals: Vec<usize>,
    /// Number of the chain of calls that led here.
    path: usize,
    returned: Mask,
    result: Option<Vec<u32>>,
}

/// A vector or scalar within a larger type: what one access reads or writes.
struct Part {
    /// In bytes, from the start of the type.
    offset: u32,
    components: usize,
    scalar: Scalar,
}

/// A loop of the program, reached by one chain of calls.
struct Node {
    parent: Option<usize>,
    function: String,
    iterations: u64,
}

pub(super) struct Machine<'m> {
    module: &'m Module,
    info: &'m ModuleInfo,
    lanes: usize,
    /// Lanes over which a cooperative matrix is spread.
    matrix_lanes: usize,
    workgroup: [u32; 3],
    grid: [u32; 3],
    /// By the index of their global variable.
    roots: Vec<Root>,
    memories: Vec<Memory>,
    registers: Vec<Vec<u32>>,
    /// By the chain of calls and the statement's address.
    paths: HashMap<(usize, usize), usize>,
    loops: HashMap<(usize, usize), usize>,
    nodes: Vec<Node>,
    /// By the chain of calls, the expression or statement, and its part.
    sites: HashMap<(usize, usize, usize), u32>,
    trace: Trace,
}

fn invalid(what: impl Into<String>) -> Error {
    Error::invalid(what)
}

fn unknown(what: &impl std::fmt::Debug) -> Error {
    let mut text = format!("{what:?}");
    text.truncate(text.char_indices().nth(160).map_or(text.len(), |(at, _)| at));
    invalid(format!("the tracer does not know {text}"))
}

/// Identity of a statement, which lies still while the module is borrowed.
fn address(statement: &Statement) -> usize {
    std::ptr::from_ref(statement).addr()
}

fn any(mask: &[bool]) -> bool {
    mask.contains(&true)
}

fn scalar_of(inner: &TypeInner) -> Result<Scalar> {
    inner.scalar().ok_or_else(|| unknown(inner))
}

impl<'m> Machine<'m> {
    pub(super) fn new(module: &'m Module, info: &'m ModuleInfo, launch: Launch) -> Result<Self> {
        let entry = module.entry_points.first().ok_or_else(|| invalid("a module without an entry point"))?;
        let lanes = entry.workgroup_size.iter().product::<u32>() as usize;
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).map_err(|e| invalid(e.to_string()))?;
        let Launch { mut bindings, workgroup, grid } = launch;
        let (mut roots, mut memories, mut registers) = (Vec::new(), Vec::new(), Vec::new());
        let mut base = 0u32;
        let mut variables = Vec::new();
        for (_, variable) in module.global_variables.iter() {
            let name = variable.name.clone().unwrap_or_default();
            if variable.init.is_some() {
                return Err(unknown(variable));
            }
            let size = layouter[variable.ty].size as usize;
            let binding = variable.binding.as_ref().map(|at| at.binding);
            let start = base;
            let number = variables.len();
            let bytes = match variable.space {
                AddressSpace::WorkGroup => {
                    // Variables follow each other in the order of the text, each at a multiple of 16.
                    variables.push(Variable { name: name.clone(), start, bytes: size as u32 });
                    base += (size as u32).next_multiple_of(16);
                    vec![0; size]
                }
                // A binding that is not given has no bytes, so that any use of it is an error that names it.
                AddressSpace::Uniform | AddressSpace::Storage { .. } => {
                    let given = bindings.iter_mut().find(|(number, _)| Some(*number) == binding);
                    given.map_or_else(Vec::new, |(_, bytes)| std::mem::take(bytes))
                }
                AddressSpace::Private => {
                    roots.push(Root::Registers(registers.len()));
                    registers.push(vec![0; components(module, &module.types[variable.ty].inner)? * lanes]);
                    continue;
                }
                space => return Err(unknown(&space)),
            };
            roots.push(Root::Memory(memories.len()));
            memories.push(Memory { name, binding, space: variable.space, bytes, base: start, variable: number });
        }
        Ok(Self {
            module,
            info,
            lanes,
            matrix_lanes: matrix_lanes(module),
            workgroup,
            grid,
            roots,
            memories,
            registers,
            paths: HashMap::new(),
            loops: HashMap::new(),
            nodes: Vec::new(),
            sites: HashMap::new(),
            trace: Trace { threads: lanes, variables, ..Trace::default() },
        })
    }

    pub(super) fn run(mut self) -> Result<Trace> {
        let module = self.module;
        let entry = &module.entry_points[0];
        self.survey(&entry.function, &entry.function.body, 0, None);
        let mut arguments = Vec::new();
        for argument in &entry.function.arguments {
            arguments.push(Value::Data(Rc::new(self.builtin(argument)?)));
        }
        let active = vec![true; self.lanes];
        self.call(&entry.function, self.info.get_entry_point(0), arguments, 0, &active)?;
        self.trace.loops = self.tree(None);
        let bound = |memory: Memory| memory.binding.map(|number| (number, memory.bytes));
        self.trace.bindings = self.memories.into_iter().filter_map(bound).collect();
        Ok(self.trace)
    }

    /// Numbers the chains of calls and the loops, in the order of the program.
    fn survey(&mut self, function: &'m Function, block: &'m Block, path: usize, parent: Option<usize>) {
        let module = self.module;
        for statement in block.iter() {
            match statement {
                Statement::Block(block) => self.survey(function, block, path, parent),
                Statement::If { accept, reject, .. } => {
                    self.survey(function, accept, path, parent);
                    self.survey(function, reject, path, parent);
                }
                Statement::Switch { cases, .. } => {
                    for case in cases {
                        self.survey(function, &case.body, path, parent);
                    }
                }
                Statement::Loop { body, continuing, .. } => {
                    let node = self.nodes.len();
                    let name = function.name.clone().unwrap_or_else(|| "main".to_owned());
                    self.nodes.push(Node { parent, function: name, iterations: 0 });
                    self.loops.insert((path, address(statement)), node);
                    self.survey(function, body, path, Some(node));
                    self.survey(function, continuing, path, Some(node));
                }
                Statement::Call { function: callee, .. } => {
                    let next = self.paths.len() + 1;
                    self.paths.insert((path, address(statement)), next);
                    let callee = &module.functions[*callee];
                    self.survey(callee, &callee.body, next, parent);
                }
                _ => {}
            }
        }
    }

    fn tree(&self, parent: Option<usize>) -> Vec<Loop> {
        let children = self.nodes.iter().enumerate().filter(|(_, node)| node.parent == parent);
        children
            .map(|(at, node)| Loop {
                function: node.function.clone(),
                iterations: node.iterations,
                inner: self.tree(Some(at)),
            })
            .collect()
    }

    fn builtin(&self, argument: &naga::FunctionArgument) -> Result<Vec<u32>> {
        let lanes = self.lanes;
        let same = |values: [u32; 3]| values.iter().flat_map(|&v| std::iter::repeat_n(v, lanes)).collect();
        let size = self.module.entry_points[0].workgroup_size;
        let along = |lane: u32| [lane % size[0], lane / size[0] % size[1], lane / size[0] / size[1]];
        let each = |f: &dyn Fn(u32, usize) -> u32| {
            (0..3).flat_map(|c| (0..lanes as u32).map(move |lane| f(lane, c))).collect::<Vec<_>>()
        };
        Ok(match argument.binding {
            Some(Binding::BuiltIn(BuiltIn::WorkGroupId)) => same(self.workgroup),
            Some(Binding::BuiltIn(BuiltIn::NumWorkGroups)) => same(self.grid),
            Some(Binding::BuiltIn(BuiltIn::LocalInvocationIndex)) => (0..lanes as u32).collect(),
            Some(Binding::BuiltIn(BuiltIn::LocalInvocationId)) => each(&|lane, c| along(lane)[c]),
            Some(Binding::BuiltIn(BuiltIn::GlobalInvocationId)) => {
                each(&|lane, c| self.workgroup[c] * size[c] + along(lane)[c])
            }
            _ => return Err(unknown(argument)),
        })
    }

    fn call(
        &mut self,
        function: &'m Function,
        info: &'m FunctionInfo,
        arguments: Vec<Value>,
        path: usize,
        active: &Mask,
    ) -> Result<Option<Lanes>> {
        let depth = self.registers.len();
        let mut frame = Frame {
            function,
            info,
            values: vec![None; function.expressions.len()],
            arguments,
            locals: Vec::new(),
            path,
            returned: vec![false; self.lanes],
            result: None,
        };
        for (_, variable) in function.local_variables.iter() {
            let contents = match variable.init {
                Some(init) => self.data(&mut frame, init, active)?.to_vec(),
                None => vec![0; components(self.module, &self.module.types[variable.ty].inner)? * self.lanes],
            };
            frame.locals.push(self.registers.len());
            self.registers.push(contents);
        }
        let (mut running, mut continued) = (active.clone(), vec![false; self.lanes]);
        self.block(&mut frame, &function.body, &mut running, &mut continued)?;
        self.registers.truncate(depth);
        Ok(frame.result.map(Rc::new))
    }

    /// Executes a block for the lanes that are active. Those that leave it early are no longer active afterwards, and
    /// are in `continued` if they wait for the innermost loop's continuing part.
    fn block(
        &mut self,
        frame: &mut Frame<'m>,
        block: &'m Block,
        active: &mut Mask,
        continued: &mut Mask,
    ) -> Result<()> {
        if !any(active) {
            return Ok(());
        }
        for statement in block.iter() {
            let branches = match statement {
                Statement::Emit(range) => {
                    for handle in range.clone() {
                        let value = self.evaluate(frame, handle, active)?;
                        frame.values[handle.index()] = Some(value);
                    }
                    false
                }
                Statement::Block(inner) => {
                    self.block(frame, inner, active, continued)?;
                    true
                }
                Statement::If { condition, accept, reject } => {
                    let condition = self.data(frame, *condition, active)?;
                    let chosen = |wanted: bool| {
                        active.iter().zip(condition.iter()).map(|(&on, &c)| on && (c != 0) == wanted).collect::<Mask>()
                    };
                    let (mut then, mut otherwise) = (chosen(true), chosen(false));
                    self.block(frame, accept, &mut then, continued)?;
                    self.block(frame, reject, &mut otherwise, continued)?;
                    for (lane, on) in active.iter_mut().enumerate() {
                        *on = then[lane] || otherwise[lane];
                    }
                    true
                }
                Statement::Switch { selector, cases } => {
                    self.switch(frame, *selector, cases, active, continued)?;
                    true
                }
                Statement::Loop { body, continuing, break_if } => {
                    let at = self.loops.get(&(frame.path, address(statement))).copied();
                    let at = at.ok_or_else(|| invalid("a loop that was not surveyed"))?;
                    self.repeat(frame, (body, continuing, *break_if), at, active)?;
                    true
                }
                Statement::Break => {
                    active.fill(false);
                    true
                }
                Statement::Continue => {
                    continued.iter_mut().zip(active.iter()).for_each(|(c, &on)| *c |= on);
                    active.fill(false);
                    true
                }
                Statement::Return { value } => {
                    if let Some(value) = value {
                        let value = self.data(frame, *value, active)?;
                        let lanes = self.lanes;
                        let result = frame.result.get_or_insert_with(|| vec![0; value.len()]);
                        for (at, slot) in result.iter_mut().enumerate() {
                            if active[at % lanes] {
                                *slot = value[at];
                            }
                        }
                    }
                    frame.returned.iter_mut().zip(active.iter()).for_each(|(r, &on)| *r |= on);
                    active.fill(false);
                    true
                }
                Statement::ControlBarrier(_) => {
                    if active.contains(&false) {
                        return Err(invalid("a barrier that only some threads of the workgroup reach"));
                    }
                    false
                }
                Statement::MemoryBarrier(_) => false,
                Statement::Store { pointer, value } => {
                    let target = self.pointer(frame, *pointer, active)?;
                    let inner = pointee(self.module, frame, *pointer)?;
                    let value = self.data(frame, *value, active)?;
                    self.store(frame.path, address(statement), &target, &inner, &value, active)?;
                    false
                }
                Statement::CooperativeStore { target, data } => {
                    self.store_matrix(frame, address(statement), *target, *data, active)?;
                    false
                }
                Statement::Call { function, arguments, result } => {
                    let path = self.paths.get(&(frame.path, address(statement))).copied();
                    let path = path.ok_or_else(|| invalid("a call that was not surveyed"))?;
                    let mut values = Vec::with_capacity(arguments.len());
                    for &argument in arguments {
                        values.push(self.value(frame, argument, active)?);
                    }
                    let callee = &self.module.functions[*function];
                    let returned = self.call(callee, &self.info[*function], values, path, active)?;
                    if let Some(result) = result {
                        let value = returned.ok_or_else(|| invalid("a function that returned nothing"))?;
                        frame.values[result.index()] = Some(Value::Data(value));
                    }
                    false
                }
                other => return Err(unknown(other)),
            };
            if branches && !any(active) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn switch(
        &mut self,
        frame: &mut Frame<'m>,
        selector: Handle<Expression>,
        cases: &'m [naga::SwitchCase],
        active: &mut Mask,
        continued: &mut Mask,
    ) -> Result<()> {
        let selector = self.data(frame, selector, active)?;
        let word = |case: &naga::SwitchCase| match case.value {
            SwitchValue::I32(value) => Some(value.cast_unsigned()),
            SwitchValue::U32(value) => Some(value),
            SwitchValue::Default => None,
        };
        // The case of each lane: the one that names its value, else the default.
        let default = cases.iter().position(|case| word(case).is_none());
        let chosen: Vec<_> =
            selector.iter().map(|&value| cases.iter().position(|case| word(case) == Some(value)).or(default)).collect();
        let mut through = vec![false; self.lanes];
        let mut left = vec![false; self.lanes];
        for (at, case) in cases.iter().enumerate() {
            let mut running: Mask =
                (0..self.lanes).map(|lane| active[lane] && (through[lane] || chosen[lane] == Some(at))).collect();
            let entered = running.clone();
            let before = continued.clone();
            self.block(frame, &case.body, &mut running, continued)?;
            through.fill(false);
            for lane in 0..self.lanes {
                if case.fall_through {
                    through[lane] = running[lane];
                }
                // Whoever neither returned nor continued leaves the switch here, by its end or by a break.
                let gone = frame.returned[lane] || (continued[lane] && !before[lane]);
                left[lane] |= entered[lane] && !gone && !through[lane];
            }
        }
        for (lane, on) in active.iter_mut().enumerate() {
            *on = *on && (left[lane] || chosen[lane].is_none());
        }
        Ok(())
    }

    fn repeat(
        &mut self,
        frame: &mut Frame<'m>,
        (body, continuing, break_if): (&'m Block, &'m Block, Option<Handle<Expression>>),
        at: usize,
        active: &mut Mask,
    ) -> Result<()> {
        let mut running = active.clone();
        let mut rounds = 0u64;
        while any(&running) {
            rounds += 1;
            if rounds > MAX_ITERATIONS {
                return Err(invalid(format!("a loop of {} does not end", self.nodes[at].function)));
            }
            let mut continued = vec![false; self.lanes];
            let first = FIRST_SUBGROUP.min(self.lanes);
            let entered = any(&running[..first]);
            self.block(frame, body, &mut running, &mut continued)?;
            running.iter_mut().zip(&continued).for_each(|(on, &c)| *on |= c);
            // The last entry into the body only to leave it by its own test is no iteration.
            if entered && any(&running[..first]) {
                self.nodes[at].iterations += 1;
            }
            self.block(frame, continuing, &mut running, &mut vec![false; self.lanes])?;
            if let (Some(condition), true) = (break_if, any(&running)) {
                let condition = self.data(frame, condition, &running)?;
                running.iter_mut().zip(condition.iter()).for_each(|(on, &c)| *on &= c == 0);
            }
        }
        active.iter_mut().zip(&frame.returned).for_each(|(on, &gone)| *on &= !gone);
        Ok(())
    }

    fn value(&mut self, frame: &mut Frame<'m>, handle: Handle<Expression>, active: &Mask) -> Result<Value> {
        if let Some(value) = &frame.values[handle.index()] {
            return Ok(value.clone());
        }
        // What needs no place in the order of statements is evaluated when it is asked for. Initial values of variables
        // are made of constants without being emitted; they are not kept.
        match frame.function.expressions[handle] {
            Expression::Compose { .. } | Expression::Splat { .. } => return self.evaluate(frame, handle, active),
            ref other if !other.needs_pre_emit() => {
                return Err(invalid("an expression is used before it is emitted"));
            }
            _ => {}
        }
        let value = self.evaluate(frame, handle, active)?;
        frame.values[handle.index()] = Some(value.clone());
        Ok(value)
    }

    fn data(&mut self, frame: &mut Frame<'m>, handle: Handle<Expression>, active: &Mask) -> Result<Lanes> {
        match self.value(frame, handle, active)? {
            Value::Data(data) => Ok(data),
            Value::Pointer(_) => Err(invalid("a pointer where a value is expected")),
        }
    }

    fn pointer(&mut self, frame: &mut Frame<'m>, handle: Handle<Expression>, active: &Mask) -> Result<Pointer> {
        match self.value(frame, handle, active)? {
            Value::Pointer(pointer) => Ok(pointer),
            Value::Data(_) => Err(invalid("a value where a pointer is expected")),
        }
    }

    fn broadcast(&self, words: &[u32]) -> Value {
        Value::Data(Rc::new(words.iter().flat_map(|&w| std::iter::repeat_n(w, self.lanes)).collect()))
    }

    fn evaluate(&mut self, frame: &mut Frame<'m>, handle: Handle<Expression>, active: &Mask) -> Result<Value> {
        let lanes = self.lanes;
        let module = self.module;
        let inner = |of: Handle<Expression>| frame.info[of].ty.inner_with(&module.types);
        let out = match frame.function.expressions[handle] {
            Expression::Literal(literal) => return Ok(self.broadcast(&[word(literal)?])),
            Expression::Constant(constant) => {
                return Ok(self.broadcast(&constant_words(module, module.constants[constant].init)?));
            }
            Expression::ZeroValue(ty) => vec![0; components(module, &module.types[ty].inner)? * lanes],
            Expression::FunctionArgument(at) => return Ok(frame.arguments[at as usize].clone()),
            Expression::GlobalVariable(variable) => {
                let root = self.roots[variable.index()];
                return Ok(Value::Pointer(Pointer { root, offset: Offset::Same(0) }));
            }
            Expression::LocalVariable(variable) => {
                let root = Root::Registers(frame.locals[variable.index()]);
                return Ok(Value::Pointer(Pointer { root, offset: Offset::Same(0) }));
            }
            Expression::Compose { components: ref parts, .. } => {
                let mut out = Vec::new();
                for &part in parts {
                    out.extend_from_slice(&self.data(frame, part, active)?);
                }
                out
            }
            Expression::Splat { size, value } => self.data(frame, value, active)?.repeat(size as usize),
            Expression::Swizzle { size, vector, pattern } => {
                let vector = self.data(frame, vector, active)?;
                let chosen = pattern[..size as usize].iter().map(|&p| p as usize);
                chosen.flat_map(|c| vector[c * lanes..(c + 1) * lanes].iter().copied()).collect()
            }
            Expression::Access { base, index } => {
                let index = self.data(frame, index, active)?;
                let base_value = self.value(frame, base, active)?;
                return self.access(frame, base, base_value, &index, active);
            }
            Expression::AccessIndex { base, index } => {
                let base_value = self.value(frame, base, active)?;
                return self.access_index(frame, base, base_value, index);
            }
            Expression::Load { pointer } => {
                let source = self.pointer(frame, pointer, active)?;
                let inner = pointee(module, frame, pointer)?;
                self.load(frame.path, handle.index(), &source, &inner, active)?
            }
            Expression::ArrayLength(pointer) => {
                let Pointer { root: Root::Memory(at), .. } = self.pointer(frame, pointer, active)? else {
                    return Err(invalid("the length of an array in registers"));
                };
                let TypeInner::Array { stride, .. } = pointee(module, frame, pointer)? else {
                    return Err(invalid("the length of no array"));
                };
                return Ok(self.broadcast(&[self.memories[at].bytes.len() as u32 / stride]));
            }
            Expression::Unary { op, expr } => {
                let kind = scalar_of(inner(expr))?.kind;
                let operand = self.data(frame, expr, active)?;
                match (op, kind) {
                    (UnaryOperator::Negate, ScalarKind::Float) => map(&operand, |a| (-float(a)).to_bits()),
                    (UnaryOperator::Negate, ScalarKind::Sint | ScalarKind::Uint) => map(&operand, u32::wrapping_neg),
                    (UnaryOperator::LogicalNot, _) => map(&operand, |a| u32::from(a == 0)),
                    (UnaryOperator::BitwiseNot, _) => map(&operand, |a| !a),
                    _ => return Err(unknown(&frame.function.expressions[handle])),
                }
            }
            Expression::Binary { op, left, right } => {
                let scalar = scalar_of(inner(left))?;
                let is_matrix =
                    |of| matches!(inner(of), TypeInner::CooperativeMatrix { .. } | TypeInner::Matrix { .. });
                let is_scalar = |of| matches!(inner(of), TypeInner::Scalar(_));
                // A matrix may be scaled; products with vectors and matrices are no product of components.
                if (is_matrix(left) && !is_scalar(right)) || (is_matrix(right) && !is_scalar(left)) {
                    return Err(unknown(&frame.function.expressions[handle]));
                }
                let (left, right) = (self.data(frame, left, active)?, self.data(frame, right, active)?);
                binary(lanes, op, scalar, &left, &right)?
            }
            Expression::Select { condition, accept, reject } => {
                let condition = self.data(frame, condition, active)?;
                let (accept, reject) = (self.data(frame, accept, active)?, self.data(frame, reject, active)?);
                let wide = condition.len() == accept.len();
                let on = |i: usize| condition[if wide { i } else { i % lanes }] != 0;
                (0..accept.len()).map(|i| if on(i) { accept[i] } else { reject[i] }).collect()
            }
            Expression::Relational { fun, argument } => {
                let operand = self.data(frame, argument, active)?;
                let over = |all: bool| {
                    let each = |lane: usize| operand[lane..].iter().step_by(lanes).all(|&a| (a != 0) == all);
                    (0..lanes).map(|lane| u32::from(each(lane) == all)).collect()
                };
                match fun {
                    RelationalFunction::All => over(true),
                    RelationalFunction::Any => over(false),
                    RelationalFunction::IsNan => map(&operand, |a| u32::from(float(a).is_nan())),
                    RelationalFunction::IsInf => map(&operand, |a| u32::from(float(a).is_infinite())),
                }
            }
            Expression::Math { fun: MathFunction::Transpose, arg, .. } => {
                let TypeInner::Matrix { columns, rows, .. } = *inner(arg) else {
                    return Err(unknown(&frame.function.expressions[handle]));
                };
                let (columns, rows) = (columns as usize, rows as usize);
                let matrix = self.data(frame, arg, active)?;
                let turned = (0..rows).flat_map(|row| (0..columns).map(move |column| column * rows + row));
                turned.flat_map(|c| matrix[c * lanes..(c + 1) * lanes].iter().copied()).collect()
            }
            Expression::Math { fun, arg, arg1, arg2, arg3 } => {
                let scalar = scalar_of(inner(arg))?;
                let mut operands = Vec::new();
                for operand in [Some(arg), arg1, arg2, arg3].into_iter().flatten() {
                    operands.push(self.data(frame, operand, active)?);
                }
                math(lanes, fun, scalar, &operands)?
            }
            Expression::As { expr, kind, convert } => {
                let from = scalar_of(inner(expr))?;
                let operand = self.data(frame, expr, active)?;
                convert_to(from, kind, convert, &operand)?
            }
            Expression::CooperativeLoad { data, .. } => {
                let ty = inner(handle).clone();
                self.load_matrix(frame, handle.index(), &ty, data, active)?
            }
            Expression::CooperativeMultiplyAdd { a, b, c } => {
                let (
                    TypeInner::CooperativeMatrix { rows, columns: depth, .. },
                    TypeInner::CooperativeMatrix { columns, .. },
                ) = (inner(a), inner(b))
                else {
                    return Err(unknown(&frame.function.expressions[handle]));
                };
                let shape = (*rows as usize, *columns as usize, *depth as usize);
                let scalar = scalar_of(inner(c))?;
                let (a, b) = (self.data(frame, a, active)?, self.data(frame, b, active)?);
                let c = self.data(frame, c, active)?;
                multiply_add((lanes, self.matrix_lanes), shape, scalar, &a, &b, &c)
            }
            ref other => return Err(unknown(other)),
        };
        Ok(Value::Data(Rc::new(out)))
    }

    /// An element that each lane chooses.
    fn access(
        &self,
        frame: &Frame<'m>,
        base: Handle<Expression>,
        value: Value,
        index: &[u32],
        active: &Mask,
    ) -> Result<Value> {
        let module = self.module;
        match value {
            Value::Pointer(Pointer { root, offset }) => {
                let inner = pointee(module, frame, base)?;
                let in_memory = matches!(root, Root::Memory(_));
                let (count, step) = match inner {
                    TypeInner::Array { base, size, stride } => {
                        let count = match size {
                            ArraySize::Constant(count) => Some(count.get()),
                            _ => None,
                        };
                        let step = match in_memory {
                            true => stride,
                            false => components(module, &module.types[base].inner)? as u32,
                        };
                        (count, step)
                    }
                    TypeInner::Vector { size, scalar } => {
                        (Some(size as u32), if in_memory { u32::from(scalar.width) } else { 1 })
                    }
                    other => return Err(unknown(&other)),
                };
                let stray = |lane: &usize| active[*lane] && count.is_some_and(|count| index[*lane] >= count);
                if let Some(lane) = (0..self.lanes).find(stray) {
                    return Err(invalid(format!(
                        "lane {lane} takes element {} of {} in {}",
                        index[lane],
                        count.unwrap_or_default(),
                        self.root_name(root)
                    )));
                }
                let offsets = (0..self.lanes).map(|l| offset.of(l).wrapping_add(index[l].wrapping_mul(step))).collect();
                Ok(Value::Pointer(Pointer { root, offset: Offset::Each(Rc::new(offsets)) }))
            }
            Value::Data(data) => {
                let element = match frame.info[base].ty.inner_with(&module.types) {
                    TypeInner::Vector { .. } => 1,
                    TypeInner::Array { base, .. } => components(module, &module.types[*base].inner)?,
                    other => return Err(unknown(other)),
                };
                let count = data.len() / self.lanes / element;
                if let Some(lane) = (0..self.lanes).find(|&l| active[l] && index[l] as usize >= count) {
                    return Err(invalid(format!("lane {lane} takes element {} of a value of {count}", index[lane])));
                }
                let at =
                    |c: usize, lane: usize| ((index[lane] as usize).min(count - 1) * element + c) * self.lanes + lane;
                let out = (0..element).flat_map(|c| (0..self.lanes).map(move |lane| (c, lane)));
                Ok(Value::Data(Rc::new(out.map(|(c, lane)| data[at(c, lane)]).collect())))
            }
        }
    }

    /// The same element or member for all lanes.
    fn access_index(&self, frame: &Frame<'m>, base: Handle<Expression>, value: Value, index: u32) -> Result<Value> {
        let module = self.module;
        let of = |ty: Handle<naga::Type>| components(module, &module.types[ty].inner);
        match value {
            Value::Pointer(Pointer { root, offset }) => {
                let in_memory = matches!(root, Root::Memory(_));
                let step = match pointee(module, frame, base)? {
                    TypeInner::Array { stride, .. } if in_memory => index * stride,
                    TypeInner::Array { base, .. } => index * of(base)? as u32,
                    TypeInner::Vector { scalar, .. } if in_memory => index * u32::from(scalar.width),
                    TypeInner::Vector { .. } => index,
                    TypeInner::Matrix { rows, .. } if !in_memory => index * rows as u32,
                    TypeInner::Struct { members, .. } if in_memory => members[index as usize].offset,
                    TypeInner::Struct { members, .. } => {
                        let before = members[..index as usize].iter().map(|member| of(member.ty));
                        before.sum::<Result<usize>>()? as u32
                    }
                    other => return Err(unknown(&other)),
                };
                let offset = match offset {
                    Offset::Same(offset) => Offset::Same(offset + step),
                    Offset::Each(offsets) => Offset::Each(Rc::new(map(&offsets, |o| o.wrapping_add(step)))),
                };
                Ok(Value::Pointer(Pointer { root, offset }))
            }
            Value::Data(data) => {
                let index = index as usize;
                let (start, len) = match frame.info[base].ty.inner_with(&module.types) {
                    TypeInner::Vector { .. } => (index, 1),
                    TypeInner::Matrix { rows, .. } => (index * *rows as usize, *rows as usize),
                    TypeInner::Array { base, .. } => (index * of(*base)?, of(*base)?),
                    TypeInner::Struct { members, .. } => {
                        let before = members[..index].iter().map(|member| of(member.ty));
                        (before.sum::<Result<usize>>()?, of(members[index].ty)?)
                    }
                    other => return Err(unknown(other)),
                };
                Ok(Value::Data(Rc::new(data[start * self.lanes..(start + len) * self.lanes].to_vec())))
            }
        }
    }

    fn root_name(&self, root: Root) -> String {
        match root {
            Root::Memory(at) => match self.memories[at].binding {
                Some(binding) => format!("{} (binding {binding})", self.memories[at].name),
                None => self.memories[at].name.clone(),
            },
            Root::Registers(_) => "a variable of its own".to_owned(),
        }
    }

    /// Notes an access of memory and returns the byte of the variable that each lane means.
    fn touch(
        &mut self,
        (path, site, part): (usize, usize, usize),
        at: usize,
        bytes: u32,
        write: bool,
        offsets: &[Option<u32>],
    ) -> Result<()> {
        let memory = &self.memories[at];
        let len = memory.bytes.len() as u64;
        for (lane, offset) in offsets.iter().enumerate() {
            if let Some(offset) = offset.filter(|&o| u64::from(o) + u64::from(bytes) > len) {
                let does = if write { "writes" } else { "reads" };
                let name = self.root_name(Root::Memory(at));
                return Err(invalid(format!(
                    "lane {lane} {does} {bytes} bytes at {offset} of {name}, which has {len}"
                )));
            }
        }
        let active = offsets.iter().flatten().count() as u64;
        match memory.space {
            AddressSpace::WorkGroup => {
                let next = self.sites.len() as u32;
                let site = *self.sites.entry((path, site, part)).or_insert(next);
                let Memory { base, variable, .. } = *memory;
                self.trace.addresses.extend(offsets.iter().map(|o| o.map_or(INACTIVE, |o| base + o)));
                self.trace.accesses.push(Access { site, variable, bytes, write });
            }
            AddressSpace::Storage { .. } if write => self.trace.stored_bytes += active * u64::from(bytes),
            AddressSpace::Storage { .. } => self.trace.loaded_bytes += active * u64::from(bytes),
            _ => {}
        }
        Ok(())
    }

    fn offsets(&self, pointer: &Pointer, plus: u32, active: &Mask) -> Vec<Option<u32>> {
        let each = active.iter().enumerate();
        each.map(|(lane, &on)| on.then(|| pointer.offset.of(lane).wrapping_add(plus))).collect()
    }

    fn load(
        &mut self,
        path: usize,
        site: usize,
        pointer: &Pointer,
        inner: &TypeInner,
        active: &Mask,
    ) -> Result<Vec<u32>> {
        let lanes = self.lanes;
        match pointer.root {
            Root::Registers(at) => {
                let count = components(self.module, inner)?;
                let register = &self.registers[at];
                match &pointer.offset {
                    Offset::Same(offset) => {
                        let start = *offset as usize * lanes;
                        Ok(register[start..start + count * lanes].to_vec())
                    }
                    Offset::Each(offsets) => {
                        // Inactive lanes may point anywhere.
                        let read = |c: usize, lane: usize| {
                            let at = (offsets[lane] as usize + c) * lanes + lane;
                            if active[lane] { register[at] } else { 0 }
                        };
                        Ok((0..count * lanes).map(|at| read(at / lanes, at % lanes)).collect())
                    }
                }
            }
            Root::Memory(at) => {
                let mut out = Vec::new();
                for (number, part) in parts(self.module, inner)?.into_iter().enumerate() {
                    let bytes = part.components as u32 * u32::from(part.scalar.width);
                    let offsets = self.offsets(pointer, part.offset, active);
                    // Loads have even numbers, stores odd ones.
                    self.touch((path, 2 * site, number), at, bytes, false, &offsets)?;
                    let memory = &self.memories[at].bytes;
                    for c in 0..part.components {
                        for offset in &offsets {
                            out.push(match offset {
                                Some(offset) => {
                                    read(memory, *offset as usize + c * usize::from(part.scalar.width), part.scalar)?
                                }
                                None => 0,
                            });
                        }
                    }
                }
                Ok(out)
            }
        }
    }

    fn store(
        &mut self,
        path: usize,
        site: usize,
        pointer: &Pointer,
        inner: &TypeInner,
        value: &[u32],
        active: &Mask,
    ) -> Result<()> {
        let lanes = self.lanes;
        match pointer.root {
            Root::Registers(at) => {
                let register = &mut self.registers[at];
                for c in 0..value.len() / lanes {
                    for (lane, _) in active.iter().enumerate().filter(|&(_, &on)| on) {
                        register[(pointer.offset.of(lane) as usize + c) * lanes + lane] = value[c * lanes + lane];
                    }
                }
            }
            Root::Memory(at) => {
                let mut first = 0;
                for (number, part) in parts(self.module, inner)?.into_iter().enumerate() {
                    let width = usize::from(part.scalar.width);
                    let offsets = self.offsets(pointer, part.offset, active);
                    self.touch((path, 2 * site + 1, number), at, (part.components * width) as u32, true, &offsets)?;
                    let memory = &mut self.memories[at].bytes;
                    for c in 0..part.components {
                        for (lane, offset) in offsets.iter().enumerate() {
                            let Some(offset) = offset else { continue };
                            let word = value[(first + c) * lanes + lane];
                            write(memory, *offset as usize + c * width, part.scalar, word)?;
                        }
                    }
                    first += part.components;
                }
            }
        }
        Ok(())
    }
}

/// What an expression points to.
fn pointee(module: &Module, frame: &Frame<'_>, pointer: Handle<Expression>) -> Result<TypeInner> {
    let resolved: &TypeResolution = &frame.info[pointer].ty;
    Ok(match *resolved.inner_with(&module.types) {
        TypeInner::Pointer { base, .. } => module.types[base].inner.clone(),
        TypeInner::ValuePointer { size: Some(size), scalar, .. } => TypeInner::Vector { size, scalar },
        TypeInner::ValuePointer { size: None, scalar, .. } => TypeInner::Scalar(scalar),
        ref other => return Err(unknown(other)),
    })
}

/// 32-bit words that a value of a type takes per lane.
fn components(module: &Module, inner: &TypeInner) -> Result<usize> {
    Ok(match *inner {
        TypeInner::Scalar(_) => 1,
        TypeInner::Vector { size, .. } => size as usize,
        TypeInner::Matrix { columns, rows, .. } => columns as usize * rows as usize,
        TypeInner::Array { base, size: ArraySize::Constant(count), .. } => {
            count.get() as usize * components(module, &module.types[base].inner)?
        }
        TypeInner::Struct { ref members, .. } => {
            members.iter().map(|member| components(module, &module.types[member.ty].inner)).sum::<Result<usize>>()?
        }
        TypeInner::CooperativeMatrix { columns, rows, .. } => columns as usize * rows as usize / matrix_lanes(module),
        ref other => return Err(unknown(other)),
    })
}

/// The vectors and scalars of a type in memory, in order.
fn parts(module: &Module, inner: &TypeInner) -> Result<Vec<Part>> {
    fn walk(module: &Module, inner: &TypeInner, offset: u32, out: &mut Vec<Part>) -> Result<()> {
        match *inner {
            TypeInner::Scalar(scalar) => out.push(Part { offset, components: 1, scalar }),
            TypeInner::Vector { size, scalar } => out.push(Part { offset, components: size as usize, scalar }),
            TypeInner::Array { base, size: ArraySize::Constant(count), stride } => {
                for at in 0..count.get() {
                    walk(module, &module.types[base].inner, offset + at * stride, out)?;
                }
            }
            TypeInner::Struct { ref members, .. } => {
                for member in members {
                    walk(module, &module.types[member.ty].inner, offset + member.offset, out)?;
                }
            }
            ref other => return Err(unknown(other)),
        }
        Ok(())
    }
    let mut out = Vec::new();
    walk(module, inner, 0, &mut out)?;
    Ok(out)
}

/// The components of a constant of the module.
fn constant_words(module: &Module, handle: Handle<Expression>) -> Result<Vec<u32>> {
    Ok(match module.global_expressions[handle] {
        Expression::Literal(literal) => vec![word(literal)?],
        Expression::Constant(constant) => constant_words(module, module.constants[constant].init)?,
        Expression::ZeroValue(ty) => vec![0; components(module, &module.types[ty].inner)?],
        Expression::Splat { size, value } => constant_words(module, value)?.repeat(size as usize),
        Expression::Compose { components: ref parts, .. } => {
            let parts = parts.iter().map(|&part| constant_words(module, part));
            parts.collect::<Result<Vec<_>>>()?.concat()
        }
        ref other => return Err(unknown(other)),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use half::f16;

    use super::*;

    /// What a shader of 64 threads leaves in binding 0, which has so many words, and its trace.
    fn execute(body: &str, words: usize) -> Result<(Vec<u32>, Trace)> {
        let text = format!(
            "enable f16;
             @group(0) @binding(0) var<storage, read_write> out: array<u32>;
             var<workgroup> shared_words: array<u32, 64>;
             {body}"
        );
        let module = naga::front::wgsl::parse_str(&text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&text)));
        let flags = naga::valid::ValidationFlags::all();
        let info = naga::valid::Validator::new(flags, naga::valid::Capabilities::all()).validate(&module).unwrap();
        let launch = Launch { bindings: vec![(0, vec![0; 4 * words])], workgroup: [0; 3], grid: [1; 3] };
        let trace = Machine::new(&module, &info, launch)?.run()?;
        let out = trace.binding(0).unwrap().as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        Ok((out, trace))
    }

    /// The same for a `fn f(lane: u32) -> u32`, a word per thread.
    fn each(f: &str) -> Vec<u32> {
        let main = "@compute @workgroup_size(64)
            fn main(@builtin(local_invocation_index) lane: u32) { out[lane] = f(lane); }";
        execute(&format!("{f} {main}"), 64).unwrap().0
    }

    fn twin(f: impl Fn(u32) -> u32) -> Vec<u32> {
        (0..64).map(f).collect()
    }

    #[test]
    fn lanes_go_their_own_ways_and_meet_again() {
        // Loops that lanes leave by return, at different times.
        let collatz = "fn f(lane: u32) -> u32 {
            var n = lane;
            var steps = 0u;
            loop {
                if n <= 1u { return steps; }
                if n % 2u == 0u { n /= 2u; } else { n = 3u * n + 1u; }
                steps++;
            }
            return 0u;
        }";
        let expected = |lane: u32| {
            let (mut n, mut steps) = (lane, 0);
            while n > 1 {
                n = if n.is_multiple_of(2) { n / 2 } else { 3 * n + 1 };
                steps += 1;
            }
            steps
        };
        assert_eq!(each(collatz), twin(expected));
        // Continue and break, in a loop around a loop, and a test at the end of the body.
        let nested = "fn f(lane: u32) -> u32 {
            var sum = 0u;
            for (var i = 0u; i < lane; i++) {
                if i % 3u == 0u { continue; }
                var j = i;
                loop {
                    if j > 30u { break; }
                    sum += j;
                    continuing { j += 7u; break if sum > 500u; }
                }
                if sum > 600u { break; }
                sum += 1u;
            }
            return sum;
        }";
        let expected = |lane: u32| {
            let mut sum = 0;
            for i in (0..lane).filter(|i| i % 3 != 0) {
                let mut j = i;
                while j <= 30 {
                    sum += j;
                    j += 7;
                    if sum > 500 {
                        break;
                    }
                }
                if sum > 600 {
                    break;
                }
                sum += 1;
            }
            sum
        };
        assert_eq!(each(nested), twin(expected));
        // A switch that lanes leave by its end, by break, by return, and by the continue of the loop around it.
        let switch = "fn f(lane: u32) -> u32 {
            var sum = 0u;
            for (var i = 0u; i < 4u; i++) {
                switch (lane + i) % 5u {
                    case 0u: { if lane > 50u { return 1000u + i; } }
                    case 1u, 2u: { if lane < 20u { break; } sum += 10u; }
                    case 3u: { continue; }
                    default: { sum += 100u; }
                }
                sum += 1u;
            }
            return sum;
        }";
        let expected = |lane: u32| {
            let mut sum = 0;
            for i in 0..4 {
                match (lane + i) % 5 {
                    0 if lane > 50 => return 1000 + i,
                    0 => {}
                    1 | 2 if lane < 20 => {}
                    1 | 2 => sum += 10,
                    3 => continue,
                    _ => sum += 100,
                }
                sum += 1;
            }
            sum
        };
        assert_eq!(each(switch), twin(expected));
    }

    #[test]
    fn values_are_those_of_wgsl() {
        let integers = "fn f(lane: u32) -> u32 {
            let a = i32(lane) - 32;
            let b = vec3(a, a * a, -7).zyx;
            let c = (b / 5) ^ (b % vec3(3, 4, 5)) ^ (b >> vec3(1u));
            var table = array<i32, 3>(c.x, c.y, c.z);
            table[lane % 3u] += select(1, 100, a < 0);
            return u32(table[0] + 3 * table[1]) + (lane << 3u) + u32(max(table[2], -3)) + ~lane;
        }";
        let expected = |lane: u32| {
            let a = lane.cast_signed() - 32;
            let b = [-7, a * a, a];
            let mut table = [0, 1, 2].map(|i| (b[i] / 5) ^ (b[i] % [3, 4, 5][i]) ^ (b[i] >> 1));
            table[lane as usize % 3] += if a < 0 { 100 } else { 1 };
            (table[0] + 3 * table[1])
                .cast_unsigned()
                .wrapping_add(lane << 3)
                .wrapping_add(table[2].max(-3).cast_unsigned())
                .wrapping_add(!lane)
        };
        assert_eq!(each(integers), twin(expected));
        let floats = "fn f(lane: u32) -> u32 {
            let h = f32(f16(f32(lane) * 0.37) * 0.3h + 1.1h);
            let m = transpose(mat2x3<f32>(vec3(h, 1.0, 2.0), vec3(3.0, h, 5.0)));
            let v = unpack2x16float(pack2x16float(vec2(h, m[1].y + m[2].x)));
            return bitcast<u32>(dot(v, vec2(1.5, -2.0))) ^ u32(fma(h, 3.0, 1.0));
        }";
        let expected = |lane: u32| {
            let half = |value: f32| f16::from_f32(value).to_f32();
            let h = half(half(half(lane as f32 * 0.37) * half(0.3)) + half(1.1));
            let [x, y] = [h, h + 2.0].map(half);
            (x * 1.5 + y * -2.0).to_bits() ^ (h.mul_add(3.0, 1.0) as u32)
        };
        assert_eq!(each(floats), twin(expected));
    }

    #[test]
    fn accesses_have_the_addresses_of_their_lanes() {
        let body = "@compute @workgroup_size(64)
            fn main(@builtin(local_invocation_index) lane: u32) {
                shared_words[63u - lane] = lane;
                workgroupBarrier();
                if lane % 2u == 1u { out[lane] = shared_words[lane / 2u]; }
            }";
        let (out, trace) = execute(body, 64).unwrap();
        assert_eq!(out, twin(|lane| if lane % 2 == 1 { 63 - lane / 2 } else { 0 }));
        let found: Vec<_> = trace.each().map(|(access, lanes)| (access, lanes.collect::<Vec<_>>())).collect();
        let store = Access { site: 0, variable: 0, bytes: 4, write: true };
        let load = Access { site: 1, variable: 0, bytes: 4, write: false };
        assert_eq!(found[0], (store, (0..64).map(|lane| Some(4 * (63 - lane))).collect()));
        assert_eq!(found[1], (load, (0..64).map(|lane| (lane % 2 == 1).then_some(4 * (lane / 2))).collect()));
        assert_eq!((found.len(), trace.loaded_bytes, trace.stored_bytes), (2, 0, 4 * 32));
    }

    #[test]
    fn variables_follow_each_other_and_accesses_merge_where_they_are_aligned() {
        let body = "var<workgroup> pairs: array<vec2<u32>, 64>;
            @compute @workgroup_size(64)
            fn main(@builtin(local_invocation_index) lane: u32) {
                pairs[lane] = vec2(lane);
                workgroupBarrier();
                out[lane] = shared_words[1] + shared_words[2] + shared_words[3] + pairs[63u - lane].y;
            }";
        let (out, trace) = execute(body, 64).unwrap();
        assert_eq!(out, twin(|lane| 63 - lane));
        let variables: Vec<_> = trace.variables.iter().map(|v| (v.name.as_str(), v.start, v.bytes)).collect();
        assert_eq!(variables, [("shared_words", 0, 256), ("pairs", 256, 512)]);
        let shown = |trace: &Trace| -> Vec<_> {
            trace.each().map(|(a, mut lanes)| (a.variable, a.bytes, lanes.nth(1).flatten())).collect()
        };
        let last = (1, 4, Some(256 + 8 * 62 + 4));
        let each = [(1, 8, Some(264)), (0, 4, Some(4)), (0, 4, Some(8)), (0, 4, Some(12)), last];
        assert_eq!(shown(&trace), each);
        // Words 1 and 2 do not start at a multiple of 8; words 2 and 3 do.
        assert_eq!(shown(&trace.merged(16)), [each[0], each[1], (0, 8, Some(8)), last]);
    }

    #[test]
    fn what_a_gpu_would_not_survive_is_an_error() {
        let error = |body: &str| {
            let main = format!(
                "@compute @workgroup_size(64) fn main(@builtin(local_invocation_index) lane: u32) {{ {body} }}"
            );
            execute(&main, 64).unwrap_err().to_string()
        };
        assert!(error("if lane < 3u { workgroupBarrier(); }").contains("barrier"));
        assert!(error("shared_words[lane + 1u] = 0u;").contains("lane 63 takes element 64 of 64 in shared_words"));
        assert!(error("out[2u * lane] = 0u;").contains("lane 32 writes 4 bytes at 256 of out (binding 0)"));
        assert!(error("var a = array<u32, 2>(1u, 2u); out[0] = a[lane];").contains("lane 2"));
        assert!(error("out[0] = u32(sin(f32(lane)));").contains("Sin"));
    }
}
