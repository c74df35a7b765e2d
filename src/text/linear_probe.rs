//! A linear probe: how well classes of texts can be told apart by a linear function of their embeddings, which is what
//! an embedding is often used for. Nothing of the model is trained.
//!
//! Ridge regression on one target for each class, 1 for its texts and 0 for others, and the class with the highest
//! prediction: a solution in closed form, so that the same embeddings give the same probe, with no seed, no number of
//! steps and no rate. (The crates that have logistic regression were looked at: linfa-logistic brings a second ndarray
//! and an optimiser's 50 crates, smartcore its own matrices; both iterate.) Invariant: no text's class is predicted by
//! a probe that was fitted to that text.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::prune::inverse_factor;

/// A linear classifier of embeddings.
///
/// ```
/// use sparse24::Matrix;
/// use sparse24::text::LinearProbe;
/// let embeddings = Matrix::from_f32(4, 2, &[1.0, 0.1, 0.9, 0.0, 0.0, 1.0, 0.1, 0.8])?;
/// let probe = LinearProbe::fit(&embeddings, &[0, 0, 1, 1])?;
/// let others = Matrix::from_f32(2, 2, &[0.2, 0.9, 0.7, 0.1])?;
/// assert_eq!(probe.predict(&others)?, [1, 0]);
/// assert_eq!(LinearProbe::cross_validate(&embeddings, &[0, 0, 1, 1], 2)?, [0, 0, 1, 1]);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LinearProbe {
    /// Features x classes.
    weights: Array2<f64>,
    /// Of the embeddings that it was fitted to.
    mean: Array1<f64>,
    /// Share of each class among them.
    shares: Array1<f64>,
}

impl LinearProbe {
    /// The penalty on squared weights, as a share of the mean variance of the embeddings' features, so that it means
    /// the same whatever their scale. It was set once and for all, and not chosen by any result.
    pub const RIDGE: f64 = 0.1;

    /// Fits a probe to embeddings, one a row, of the classes `labels`, counted from 0. An error if there are fewer than
    /// two classes, another number of labels than of rows, or no two different embeddings.
    pub fn fit(embeddings: &Matrix, labels: &[usize]) -> Result<Self> {
        check(embeddings, labels)?;
        fit(&array(embeddings), labels)
    }

    /// The class of each embedding. An error if embeddings have another number of features.
    pub fn predict(&self, embeddings: &Matrix) -> Result<Vec<usize>> {
        let features = self.weights.nrows();
        if embeddings.cols() != features {
            let (got, expected) = (vec![embeddings.rows(), embeddings.cols()], vec![embeddings.rows(), features]);
            return Err(Error::shape("embeddings to classify", got, expected));
        }
        Ok(self.classes(&array(embeddings).view()))
    }

    /// The class that each of these embeddings is given by a probe that was fitted to the others: those outside of its
    /// fold. Texts of a class go to the `folds` folds in turns, so that every fold has its share of every class. An
    /// error as of [`LinearProbe::fit`], or if there are fewer than two folds, or more than texts.
    pub fn cross_validate(embeddings: &Matrix, labels: &[usize], folds: usize) -> Result<Vec<usize>> {
        check(embeddings, labels)?;
        if !(2..=labels.len()).contains(&folds) {
            return Err(Error::invalid(format!("{} texts cannot be parted into {folds} folds", labels.len())));
        }
        let all = array(embeddings);
        let mut by_class: Vec<usize> = (0..labels.len()).collect();
        by_class.sort_by_key(|&row| labels[row]);
        let mut predicted = vec![0; labels.len()];
        for fold in 0..folds {
            let (mut fitted, mut tested) = (Vec::new(), Vec::new());
            for (place, &row) in by_class.iter().enumerate() {
                if place % folds == fold { tested.push(row) } else { fitted.push(row) }
            }
            let of_fitted: Vec<usize> = fitted.iter().map(|&row| labels[row]).collect();
            let probe = fit(&all.select(Axis(0), &fitted), &of_fitted)?;
            let classes = probe.classes(&all.select(Axis(0), &tested).view());
            tested.iter().zip(classes).for_each(|(&row, class)| predicted[row] = class);
        }
        Ok(predicted)
    }

    fn classes(&self, embeddings: &ArrayView2<'_, f64>) -> Vec<usize> {
        let scores = (embeddings - &self.mean).dot(&self.weights) + &self.shares;
        let best = |scores: ndarray::ArrayView1<'_, f64>| {
            // Of equal scores the first: `max_by` would take the last.
            scores.iter().enumerate().rev().max_by(|(_, a), (_, b)| a.total_cmp(b)).map_or(0, |(class, _)| class)
        };
        scores.rows().into_iter().map(best).collect()
    }
}

fn check(embeddings: &Matrix, labels: &[usize]) -> Result<()> {
    if embeddings.rows() != labels.len() {
        let (got, expected) = (vec![labels.len()], vec![embeddings.rows()]);
        return Err(Error::shape("labels", got, expected));
    }
    if labels.iter().all(|label| Some(label) == labels.first()) {
        return Err(Error::invalid("there are no two classes to tell apart"));
    }
    Ok(())
}

fn array(embeddings: &Matrix) -> Array2<f64> {
    let numbers = embeddings.elements().to_f32();
    let cols = embeddings.cols();
    Array2::from_shape_fn((embeddings.rows(), cols), |(row, col)| f64::from(numbers[row * cols + col]))
}

/// W = (XᵀX + λI)⁻¹XᵀY, with the means of X and Y taken off, so that the intercept is not penalised.
fn fit(embeddings: &Array2<f64>, labels: &[usize]) -> Result<LinearProbe> {
    let (rows, features) = embeddings.dim();
    let classes = labels.iter().max().map_or(0, |&last| last + 1);
    let mean = embeddings.sum_axis(Axis(0)) / rows as f64;
    let x = embeddings - &mean;
    let mut y = Array2::<f64>::zeros((rows, classes));
    labels.iter().enumerate().for_each(|(row, &label)| y[[row, label]] = 1.0);
    let shares = y.sum_axis(Axis(0)) / rows as f64;
    y -= &shares;
    let mut gram = x.t().dot(&x);
    let ridge = LinearProbe::RIDGE * gram.diag().sum() / features as f64;
    if !(ridge > 0.0 && ridge.is_finite()) {
        return Err(Error::invalid("all embeddings are the same, or not finite: no classes can be told apart"));
    }
    gram.diag_mut().mapv_inplace(|x| x + ridge);
    // UᵀU is the inverse.
    let u = inverse_factor(gram)?;
    let weights = u.t().dot(&u.dot(&x.t().dot(&y)));
    Ok(LinearProbe { weights, mean, shares })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::dtype::DType;

    /// Noise of 12 features; with the class added to the first of them, or not.
    fn embeddings(rows: usize, strength: f32) -> (Matrix, Vec<usize>) {
        let noise = Matrix::uniform(rows, 12, DType::F32, 24).unwrap().elements().to_f32();
        let labels: Vec<usize> = (0..rows).map(|row| row * 7 % 3).collect();
        let with_class = noise.iter().enumerate().map(|(at, x)| match at % 12 == labels[at / 12] {
            true => x + strength,
            false => *x,
        });
        (Matrix::from_f32(rows, 12, &with_class.collect::<Vec<_>>()).unwrap(), labels)
    }

    fn share_right(predicted: &[usize], labels: &[usize]) -> f64 {
        predicted.iter().zip(labels).filter(|(a, b)| a == b).count() as f64 / labels.len() as f64
    }

    /// Few texts for many features: a probe fits their noise, and only on other texts is seen to have learned nothing.
    #[test]
    fn no_text_is_predicted_by_a_probe_that_saw_it() {
        let (noise, labels) = embeddings(30, 0.0);
        let seen = LinearProbe::fit(&noise, &labels).unwrap().predict(&noise).unwrap();
        let unseen = LinearProbe::cross_validate(&noise, &labels, 5).unwrap();
        let (seen, unseen) = (share_right(&seen, &labels), share_right(&unseen, &labels));
        assert!(seen > 0.6 && unseen < 0.5, "{seen}, {unseen}");
    }

    #[test]
    fn classes_are_told_apart_where_they_differ_whatever_the_scale() {
        let (apart, labels) = embeddings(300, 2.0);
        let predicted = LinearProbe::cross_validate(&apart, &labels, 5).unwrap();
        assert!(share_right(&predicted, &labels) > 0.9);
        let small: Vec<f32> = apart.elements().to_f32().iter().map(|x| x / 1024.0).collect();
        let small = Matrix::from_f32(300, 12, &small).unwrap();
        assert_eq!(LinearProbe::cross_validate(&small, &labels, 5).unwrap(), predicted);
    }

    /// At its minimum the penalised sum of squares has no gradient: 2Xᵀ(XW - Y) + 2λW = 0.
    #[test]
    fn the_weights_are_those_of_the_minimum() {
        let (embeddings, labels) = embeddings(50, 0.5);
        let x = array(&embeddings);
        let probe = fit(&x, &labels).unwrap();
        let x = &x - &probe.mean;
        let ridge = LinearProbe::RIDGE * (&x * &x).sum() / 12.0;
        let y = Array2::from_shape_fn((50, 3), |(row, class)| f64::from(labels[row] == class) - probe.shares[class]);
        let gradient = x.t().dot(&(x.dot(&probe.weights) - y)) + &probe.weights * ridge;
        assert!(gradient.iter().all(|x| x.abs() < 1e-10), "{gradient}");
    }

    #[test]
    fn what_has_no_probe_is_an_error() {
        let (some, labels) = embeddings(6, 1.0);
        let error =
            |embeddings: &Matrix, labels: &[usize]| LinearProbe::fit(embeddings, labels).unwrap_err().to_string();
        assert_eq!(error(&some, &[1; 6]), "there are no two classes to tell apart");
        assert_eq!(error(&some, &[0, 1]), "labels has shape [2], expected [6]");
        let same = Matrix::from_f32(6, 2, &[0.5; 12]).unwrap();
        assert!(error(&same, &labels).starts_with("all embeddings are the same"));
        let folds = LinearProbe::cross_validate(&some, &labels, 7).unwrap_err().to_string();
        assert_eq!(folds, "6 texts cannot be parted into 7 folds");
        let probe = LinearProbe::fit(&some, &labels).unwrap();
        assert!(probe.predict(&same).unwrap_err().to_string().starts_with("embeddings to classify has shape [6, 2]"));
    }
}
