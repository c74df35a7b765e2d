//! The teacher's hidden states and embeddings: computed once for each text, where there is memory to cache them.

use super::kept::HiddenStateCache;
use super::missing;
use super::part::Part;
use super::shapes::PassCache;
use super::texts::Texts;
use crate::error::Result;
use crate::graph::{Forward, Graph, Model, ValueId};
use crate::matrix::Matrix;

/// The dense model.
#[derive(Debug)]
pub(super) struct Teacher {
    model: Model,
    passes: PassCache<Forward>,
    /// Values of the held-out texts, and where the whole model is trained of all texts; of the shorter ones only where
    /// all would take too much.
    kept: TeacherValues,
}

/// The cache of several of the teacher's values.
#[derive(Debug)]
pub(super) struct TeacherValues(Vec<(ValueId, HiddenStateCache)>);

impl TeacherValues {
    /// Room for values of those texts for which they are wanted.
    fn new(graph: &Graph, values: &[ValueId], texts: &Texts, wanted: impl Fn(usize) -> bool + Copy) -> Self {
        Self(values.iter().map(|&value| (value, texts.room(graph, value, wanted))).collect())
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|(_, kept)| kept.bytes()).sum()
    }

    fn has_room(&self, text: usize) -> bool {
        self.0.iter().all(|(_, kept)| kept.has_room(text))
    }

    fn has(&self, text: usize) -> bool {
        self.0.iter().all(|(_, kept)| kept.has(text))
    }

    /// The values of a batch of texts of `seq` tokens.
    pub(super) fn batch(&self, graph: &Graph, texts: &[usize], seq: usize) -> Result<Vec<(ValueId, Matrix)>> {
        let each = |value: ValueId| graph.value(value).rows.count(1, seq);
        self.0.iter().map(|(value, kept)| Ok((*value, kept.batch(texts, each(*value)?)?))).collect()
    }

    fn take(&mut self, texts: &[usize], made: &[(ValueId, Matrix)]) {
        for ((_, kept), (_, made)) in self.0.iter_mut().zip(made) {
            kept.take(texts, made);
        }
    }
}

impl Teacher {
    /// A teacher that caches the values of the whole model for those texts for which they are wanted, in at most
    /// `memory[0]` bytes. Where that is too little, it caches those of the shorter texts: a batch has texts of about
    /// one length, so that most batches are cached whole or not at all. Its passes take at most `memory[1]` bytes; a
    /// single pass may take more.
    pub(super) fn new(
        model: Model,
        whole: &Part,
        texts: &Texts,
        wanted: impl Fn(usize) -> bool + Copy,
        memory: [u64; 2],
    ) -> Self {
        let (graph, values) = (model.graph(), whole.values());
        let mut lengths: Vec<usize> = texts.all().iter().map(|text| text.len()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let up_to = |length: usize| move |text: usize| wanted(text) && texts.all()[text].len() <= length;
        let bytes = |length| values.iter().map(|&value| texts.room_bytes(graph, value, up_to(length))).sum::<u64>();
        let fitting = lengths.partition_point(|&length| bytes(length) <= memory[0]);
        let longest = fitting.checked_sub(1).map_or(0, |at| lengths[at]);
        let kept = TeacherValues::new(graph, &values, texts, up_to(longest));
        Self { model, passes: PassCache::new(memory[1]), kept }
    }

    /// Bytes of its cache, once it is full.
    pub(super) fn kept_bytes(&self) -> u64 {
        self.kept.bytes()
    }

    /// Whether it caches the values of all texts of a batch.
    pub(super) fn keeps(&self, batch: &[usize]) -> bool {
        batch.iter().all(|&text| self.kept.has_room(text))
    }

    /// The values of the whole model for a batch, computed now.
    pub(super) fn compute(&mut self, whole: &Part, texts: &Texts, batch: &[usize]) -> Result<Vec<(ValueId, Matrix)>> {
        self.run((usize::MAX, whole), texts, batch, None)
    }

    /// The values of the whole model for a batch, from the cache where it has them.
    pub(super) fn values(&mut self, whole: &Part, texts: &Texts, batch: &[usize]) -> Result<Vec<(ValueId, Matrix)>> {
        if !self.keeps(batch) {
            let made = self.compute(whole, texts, batch)?;
            // Some of its texts may be cached: no other batch computes them again.
            if batch.first().is_some_and(|&text| texts.first_batch(text) == batch) {
                self.kept.take(batch, &made);
            }
            return Ok(made);
        }
        for &text in batch {
            if !self.kept.has(text) {
                let first_batch = texts.first_batch(text);
                let made = self.compute(whole, texts, first_batch)?;
                self.kept.take(first_batch, &made);
            }
        }
        self.kept.batch(self.model.graph(), batch, texts.seq(batch))
    }

    /// The values of part `number` for the texts of some batches, computed from those of the part before it.
    pub(super) fn values_of_part(
        &mut self,
        (number, part): (usize, &Part),
        texts: &Texts,
        batches: &[Vec<usize>],
        before: Option<&TeacherValues>,
    ) -> Result<TeacherValues> {
        let is_trained = |text: usize| !texts.is_held_out(text);
        let mut values = TeacherValues::new(self.model.graph(), &part.values(), texts, is_trained);
        for batch in batches {
            let made = self.run((number, part), texts, batch, before)?;
            values.take(batch, &made);
        }
        Ok(values)
    }

    /// Runs a part on a batch of texts.
    fn run(
        &mut self,
        (number, part): (usize, &Part),
        texts: &Texts,
        batch: &[usize],
        before: Option<&TeacherValues>,
    ) -> Result<Vec<(ValueId, Matrix)>> {
        let seq = texts.seq(batch);
        let shape = (number, batch.len(), seq);
        let at = match self.passes.find(shape) {
            Some(at) => at,
            None => {
                let pass = self.model.part(part.nodes.clone(), &part.values(), batch.len(), seq)?;
                self.passes.add(shape, pass.bytes(), pass)
            }
        };
        let (pass, device) = (self.passes.get(at), self.model.device());
        pass.write(&texts.ids(batch))?;
        if let Some(value) = part.input {
            let input = before.ok_or_else(missing)?.batch(self.model.graph(), batch, seq)?;
            let (_, input) = input.iter().find(|(of, _)| *of == value).ok_or_else(missing)?;
            device.write(pass.operand(value).ok_or_else(missing)?, input)?;
        }
        pass.run()?;
        let read = |value: ValueId| Ok((value, device.read(pass.tap(value).ok_or_else(missing)?)?));
        part.values().into_iter().map(read).collect()
    }
}
