//! The oracle of AdamW.
//!
//! Invariant: no code is shared with the devices.

/// A parameter with the means of its gradients and of their squares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWState {
    /// The parameter.
    pub w: f64,
    /// The mean of gradients.
    pub m: f64,
    /// The mean of their squares.
    pub v: f64,
}

impl AdamWState {
    /// After step `t`, from 1, with this gradient.
    pub fn after(self, gradient: f64, t: u64, rate: f64, betas: [f64; 2], eps: f64, decay: f64) -> Self {
        let [beta1, beta2] = betas;
        let m = beta1 * self.m + (1.0 - beta1) * gradient;
        let v = beta2 * self.v + (1.0 - beta2) * gradient * gradient;
        let corrected = |mean: f64, beta: f64| mean / (1.0 - beta.powi(t as i32));
        let w = self.w - rate * (corrected(m, beta1) / (corrected(v, beta2).sqrt() + eps) + decay * self.w);
        Self { w, m, v }
    }
}
