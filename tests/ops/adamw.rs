//! Steps of AdamW.

use sparse24::ops::adamw::AdamWStep;
use sparse24::reference::adamw::AdamWState;
use sparse24::{AdamW, DType, Device, Matrix};

use crate::common::{Data, matrix, rng, seed};
use crate::{numbers, refuses};

on_both_devices!(steps_agree_with_the_oracle);

fn steps_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // One element, a ragged vector, more than a task of the CPU's threads.
    for (rows, cols) in [(1, 1), (3, 67), (130, 129)] {
        let mut rng = rng(seed, rows as u64);
        let mut given = || matrix(rows, cols, DType::F32, Data::Uniform, &mut rng);
        let w = given();
        let [tw, m, v] = [0; 3].map(|_| device.zeros(rows, cols, DType::F32).unwrap());
        device.write(&tw, &w).unwrap();
        let gradient = device.zeros(rows, cols, DType::F32).unwrap();
        let step = device.zeros(1, AdamWStep::LEN, DType::F32).unwrap();
        let call = device.prepare(&AdamW { w: &tw, gradient: &gradient, m: &m, v: &v, step: &step }).unwrap();
        let zero = AdamWState { w: 0.0, m: 0.0, v: 0.0 };
        let mut states: Vec<AdamWState> =
            w.elements().to_f32().iter().map(|&w| AdamWState { w: f64::from(w), ..zero }).collect();
        for number in 1..=3 {
            let (rate, factor, betas, eps, decay) = (1e-2, 0.5, [0.9, 0.98], 1e-8, 0.1);
            let g = given();
            device.write(&gradient, &g).unwrap();
            device.write(&step, &AdamWStep { number, rate, factor, betas, eps, decay }.to_matrix().unwrap()).unwrap();
            call.run().unwrap();
            for (state, &g) in states.iter_mut().zip(&g.elements().to_f32()) {
                *state = state.after(factor * f64::from(g), number, rate, betas, eps, decay);
            }
            // A step is at most a few rates; its roundings are a few dozen of f32's, and those of numbers like 0.98.
            for (i, (got, want)) in numbers(device, &tw).iter().zip(&states).enumerate() {
                let bound = 64.0 * 2f64.powi(-24) * (want.w.abs() + 4.0 * rate);
                assert!((f64::from(*got) - want.w).abs() <= bound, "step {number}, element {i}: {got}, not {}", want.w);
            }
            assert!(numbers(device, &gradient).iter().all(|&g| g == 0.0));
        }
    }
}

on_both_devices!(what_has_no_gradient_stays_zero);

/// A weight that is masked is zero, and so is its gradient: no step moves it.
fn what_has_no_gradient_stays_zero(device: &Device) {
    let [w, gradient, m, v] = [0; 4].map(|_| device.zeros(1, 5, DType::F32).unwrap());
    let step = AdamWStep { number: 1, rate: 1.0, factor: 1.0, betas: [0.9, 0.999], eps: 1e-8, decay: 0.1 };
    let step = device.upload(&step.to_matrix().unwrap()).unwrap();
    device.write(&gradient, &Matrix::from_f32(1, 5, &[0.0, 1.0, 0.0, -1.0, 0.0]).unwrap()).unwrap();
    device.prepare(&AdamW { w: &w, gradient: &gradient, m: &m, v: &v, step: &step }).unwrap().run().unwrap();
    let w = numbers(device, &w);
    assert!([0, 2, 4].iter().all(|&i| w[i] == 0.0) && (w[1] + 1.0).abs() < 1e-5 && (w[3] - 1.0).abs() < 1e-5, "{w:?}");
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let [w, gradient, m, v, short] = [4, 4, 4, 4, 3].map(|cols| tensor(2, cols));
    let step = tensor(1, AdamWStep::LEN);
    let call = AdamW { w: &w, gradient: &gradient, m: &m, v: &v, step: &step };
    refuses(device, &AdamW { gradient: &short, ..call }, &["gradient has shape [2, 3]"]);
    refuses(device, &AdamW { step: &short, ..call }, &["step has shape"]);
    refuses(device, &AdamW { v: &m, ..call }, &["shares its memory"]);
}
