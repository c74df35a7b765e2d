//! The crate `matrixmultiply`: dense f32 on the CPU.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Result, ensure};
use matrixmultiply::sgemm;

use crate::problem::{Problem, Shape};
use crate::{Call, Peer, Place};

pub(crate) struct Matrixmultiply {
    threads: u32,
}

impl Matrixmultiply {
    pub(crate) fn new(threads: u32) -> Result<Self> {
        ensure!(threads <= 4, "matrixmultiply uses 4 threads at most");
        Ok(Self { threads })
    }
}

impl Peer for Matrixmultiply {
    fn place(&self) -> Place {
        Place::on_cpu("matrixmultiply", self.threads)
    }

    // Strides transpose either side, and the micro-kernel is not square: X·Wᵀ and its transpose, W·Xᵀ, differ.
    fn calls<'a>(&'a self, problem: &'a Problem) -> Result<Vec<Call<'a>>> {
        let Shape { m, n, k } = problem.shape;
        let (x, w) = (&problem.x, &problem.w);
        let call = |kernel: &str, [rows, cols]: [usize; 2], a: &'a [f32], b: &'a [f32], y_strides: [isize; 2]| {
            // Poisoned: an output that is never written stays NaN.
            let y = Rc::new(RefCell::new(vec![f32::NAN; m * n]));
            let out = Rc::clone(&y);
            let k_stride = k as isize;
            Call {
                op: "dense",
                kernel: kernel.to_owned(),
                depth: k,
                weight_bytes: 4 * m * k,
                run: Box::new(move |calls| {
                    let mut y = y.borrow_mut();
                    let [row, col] = y_strides;
                    for _ in 0..calls {
                        let (a, b, y) = (a.as_ptr(), b.as_ptr(), y.as_mut_ptr());
                        // SAFETY: a is [rows, k], b is [cols, k] read as its transpose, and rows·cols = m·n outputs
                        // lie in y under either pair of strides.
                        unsafe { sgemm(rows, k, cols, 1.0, a, k_stride, 1, b, 1, k_stride, 0.0, y, row, col) };
                    }
                    Ok(())
                }),
                output: Box::new(move || Ok(out.borrow().clone())),
            }
        };
        Ok(vec![call("sgemm_x_wt", [n, m], x, w, [m as isize, 1]), call("sgemm_w_xt", [m, n], w, x, [1, m as isize])])
    }
}
