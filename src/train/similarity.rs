//! What embeddings of a batch lose beside those of another model: computed on the host, as there are few of them.
//!
//! With unit vectors s of the model that is trained and t of the other, of n texts:
//!
//! loss = a · mean(1 − sᵢ·tᵢ) + b · mean((sᵢ·sⱼ − tᵢ·tⱼ)²)
//!
//! The first term says where each embedding should be, the second how they should lie to each other, which is what
//! searches and comparisons read (Park et al. 2019, "Relational Knowledge Distillation"). Embeddings that are no unit
//! vectors are divided by their lengths first, and the gradient goes through that.

use ndarray::{Array2, ArrayView2, Axis};

/// How much each term counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SimilarityWeights {
    /// Of the cosine of a text's two embeddings.
    pub cosine: f64,
    /// Of the similarities of all pairs of a batch.
    pub pairs: f64,
}

/// The loss, and its gradient with regard to `student`.
pub(super) fn loss(
    student: ArrayView2<'_, f64>,
    teacher: ArrayView2<'_, f64>,
    weights: SimilarityWeights,
) -> (f64, Array2<f64>) {
    let n = student.nrows().max(1) as f64;
    let unit = |of: ArrayView2<'_, f64>| {
        let lengths = of.map_axis(Axis(1), |row| row.dot(&row).sqrt().max(1e-12));
        (&of / &lengths.view().insert_axis(Axis(1)), lengths)
    };
    let ((s, lengths), (t, _)) = (unit(student), unit(teacher));
    let cosine = n - (&s * &t).sum();
    let off = s.dot(&s.t()) - t.dot(&t.t());
    let loss = weights.cosine * cosine / n + weights.pairs * off.mapv(|x| x * x).sum() / (n * n);
    // Every pair counts twice, once for each of its texts.
    let ds = &t * (-weights.cosine / n) + off.dot(&s) * (4.0 * weights.pairs / (n * n));
    // What points along a unit vector does not move it.
    let along = (&ds * &s).sum_axis(Axis(1)).insert_axis(Axis(1));
    let gradient = (ds - &s * &along) / lengths.insert_axis(Axis(1));
    (loss, gradient)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_is_the_limit_of_differences() {
        let wave = |rows: usize, phase: f64| {
            Array2::from_shape_fn((rows, 7), |(r, c)| ((r * 7 + c) as f64 * 1.3 + phase).sin() + 0.1 * phase)
        };
        let weights = SimilarityWeights { cosine: 3.0, pairs: 5.0 };
        let (s, t) = (wave(4, 0.2), wave(4, 1.9));
        let (value, gradient) = loss(s.view(), t.view(), weights);
        assert!(value > 0.1);
        for ((row, col), &slope) in gradient.indexed_iter() {
            let moved = |by: f64| {
                let mut s = s.clone();
                s[[row, col]] += by;
                loss(s.view(), t.view(), weights).0
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((slope - difference).abs() < 1e-8, "({row}, {col}): {slope}, not {difference}");
        }
        // A model beside itself has nothing to lose.
        let (none, zero) = loss(t.view(), t.view(), weights);
        assert!(none.abs() < 1e-12 && zero.iter().all(|x| x.abs() < 1e-12));
    }
}
