//! Passes for batches of several shapes, cached as long as there is memory for them.

/// A part of a model, texts, and tokens of each.
pub(super) type Shape = (usize, usize, usize);

/// Passes by shape. Where memory is short, the one that was used longest ago is dropped first.
#[derive(Debug)]
pub(super) struct PassCache<P> {
    /// Bytes that they may take together. One pass may take more, alone.
    memory: u64,
    passes: Vec<(Shape, u64, P)>,
}

impl<P> PassCache<P> {
    pub(super) fn new(memory: u64) -> Self {
        Self { memory, passes: Vec::new() }
    }

    pub(super) fn memory(&self) -> u64 {
        self.memory
    }

    /// Drops passes until a new one of so many bytes fits, before it is made.
    pub(super) fn make_room(&mut self, bytes: u64) {
        let mut all = bytes + self.passes.iter().map(|(_, bytes, _)| bytes).sum::<u64>();
        while all > self.memory && !self.passes.is_empty() {
            all -= self.passes.remove(0).1;
        }
    }

    /// The place of the pass of a shape, until another is added or found.
    pub(super) fn find(&mut self, shape: Shape) -> Option<usize> {
        let at = self.passes.iter().position(|(of, ..)| *of == shape)?;
        let used = self.passes.remove(at);
        self.passes.push(used);
        Some(self.passes.len() - 1)
    }

    /// The place of a pass that is new and takes so many bytes.
    pub(super) fn add(&mut self, shape: Shape, bytes: u64, pass: P) -> usize {
        self.make_room(bytes);
        self.passes.push((shape, bytes, pass));
        self.passes.len() - 1
    }

    pub(super) fn get(&self, at: usize) -> &P {
        &self.passes[at].2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_longest_ago_gives_way() {
        let mut shapes = PassCache::new(10);
        shapes.add((0, 1, 8), 4, 'a');
        shapes.add((0, 1, 16), 4, 'b');
        assert!(shapes.find((0, 1, 8)).is_some_and(|at| *shapes.get(at) == 'a'));
        let at = shapes.add((1, 1, 8), 4, 'c');
        assert_eq!(*shapes.get(at), 'c');
        assert!(shapes.find((0, 1, 16)).is_none() && shapes.find((0, 1, 8)).is_some());
        // More than there is room for is there alone.
        shapes.add((0, 1, 24), 11, 'd');
        assert!(shapes.find((0, 1, 24)).is_some() && shapes.find((0, 1, 8)).is_none());
        shapes.make_room(1);
        assert!(shapes.find((0, 1, 24)).is_none());
    }
}
