//! Batches of texts that go through a model part by part, their states kept on the host in between.
//!
//! Invariant: the batches of a [`Streams`] come by length, so that neighbours mostly have one shape and its buffers.

use super::{Batching, Config, Model, States, batches};
use crate::engine::{Device, Prepared, Tensor};
use crate::error::{Error, Result, checked_mul};
use crate::matrix::{DType, Element, Elements, Matrix, each_dtype};

/// All texts of a run.
#[derive(Debug)]
pub(super) struct Streams(Vec<Stream>);

/// One batch.
#[derive(Debug)]
pub(super) struct Stream {
    /// Which texts these are.
    pub(super) texts: Vec<usize>,
    /// Tokens of each.
    pub(super) lengths: Vec<u32>,
    /// Tokens of each with padding.
    pub(super) seq: usize,
    /// `texts · seq x hidden`, once for each model that the texts go through.
    pub(super) states: Vec<Matrix>,
}

impl Streams {
    /// Texts, given as token ids, with the states that enter the first encoder layer, for as many models that differ in
    /// later layers alone. An error if there are no texts, or one is no input of the model.
    pub(super) fn new<T: AsRef<[u32]>>(model: &Model, texts: &[T], batching: Batching, models: usize) -> Result<Self> {
        if texts.is_empty() {
            return Err(Error::Invalid("there are no texts".into()));
        }
        for (i, text) in texts.iter().enumerate() {
            super::check_ids(model.config(), text.as_ref()).map_err(|e| Error::Invalid(format!("text {i}: {e}")))?;
        }
        let lengths: Vec<_> = texts.iter().map(|text| text.as_ref().len()).collect();
        let plan = batches(&lengths, model.config().positions(), batching).into_iter();
        plan.map(|batch| {
            let ids: Vec<&[u32]> = batch.texts.iter().map(|&text| texts[text].as_ref()).collect();
            let lengths = ids.iter().map(|ids| ids.len() as u32).collect();
            let states = vec![model.embedded(&ids, batch.seq)?; models];
            Ok(Stream { texts: batch.texts, lengths, seq: batch.seq, states })
        })
        .collect::<Result<_>>()
        .map(Self)
    }

    /// Number of texts.
    pub(super) fn texts(&self) -> usize {
        self.0.iter().map(|stream| stream.texts.len()).sum()
    }

    /// Gives every batch other states, in their order: those that [`Self::run`] came to.
    pub(super) fn set(&mut self, states: Vec<Vec<Matrix>>) {
        self.0.iter_mut().zip(states).for_each(|(stream, states)| stream.states = states);
    }

    /// Hands every batch and its states to `done`.
    pub(super) fn each(&mut self, mut done: impl FnMut(&mut Stream, Vec<Matrix>) -> Result<()>) -> Result<()> {
        self.0.iter_mut().try_for_each(|stream| {
            let states = stream.states.clone();
            done(stream, states)
        })
    }

    /// Runs calls over every batch, from its states to whatever they end in, which is handed to `done`. `prepare` makes
    /// the calls for one shape, a list for each model, on buffers that hold the states and lengths of a batch, and names
    /// the tensor in which they all end.
    pub(super) fn run(
        &mut self,
        device: &Device,
        config: &Config,
        dtype: DType,
        prepare: impl Fn(&States) -> Result<(Vec<Vec<Prepared>>, Tensor)>,
        mut done: impl FnMut(&mut Stream, Vec<Matrix>) -> Result<()>,
    ) -> Result<()> {
        let mut kept: Option<(States, Vec<Vec<Prepared>>, Tensor)> = None;
        for stream in &mut self.0 {
            let shape = (stream.lengths.len(), stream.seq);
            // Given back before the next is made: this bounds what is allocated at once.
            let same = kept.take().filter(|(states, ..)| (states.batch, states.seq) == shape);
            let (states, models, end) = match same {
                Some(same) => same,
                None => {
                    let states = States::new(device, config, dtype, shape.0, shape.1)?;
                    let (models, end) = prepare(&states)?;
                    (states, models, end)
                }
            };
            device.write_indices(&states.lengths, &stream.lengths)?;
            let ends = models.iter().zip(&stream.states).map(|(calls, from)| {
                device.write(&states.hidden, from)?;
                device.submit(calls)?;
                device.read(&end)
            });
            let ends = ends.collect::<Result<_>>()?;
            done(stream, ends)?;
            kept = Some((states, models, end));
        }
        Ok(())
    }
}

impl Stream {
    /// The rows of `x`, one for each token, that are no padding.
    pub(super) fn real(&self, x: &Matrix) -> Result<Matrix> {
        fn gather<T: Element>(data: &[T], rows: impl Iterator<Item = usize>, cols: usize) -> Elements {
            T::wrap(rows.flat_map(|row| &data[row * cols..][..cols]).copied().collect())
        }
        let tokens = self.lengths.iter().map(|&length| length as usize).sum();
        checked_mul("inputs", tokens, x.cols())?;
        let rows = self.lengths.iter().enumerate();
        let rows = rows.flat_map(|(text, &length)| (0..length as usize).map(move |token| text * self.seq + token));
        Matrix::new(tokens, x.cols(), each_dtype!(x.elements(), data => gather(data, rows, x.cols())))
    }
}
