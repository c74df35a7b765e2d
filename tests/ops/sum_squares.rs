//! Sums of squares.

use sparse24::reference::sum_squares as oracle;
use sparse24::{DType, Device, SumSquares};

use crate::common::{Data, matrix, rng, seed};
use crate::{numbers, poisoned, refuses};

on_both_devices!(sums_agree_with_the_oracle);

fn sums_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // One element; a ragged vector; a part and a little; several parts.
    for (rows, cols) in [(1, 1), (3, 67), (1, SumSquares::PART + 1), (300, 200)] {
        for data in [Data::Whole, Data::Uniform] {
            let x = matrix(rows, cols, DType::F32, data, &mut rng(seed, rows as u64));
            let tx = device.upload(&x).unwrap();
            let parts = SumSquares::parts(&tx);
            let y = poisoned(device, 1, parts + 3, DType::F32);
            device.prepare(&SumSquares { x: &tx, y: &y, first: 2 }).unwrap().run().unwrap();
            let wide: Vec<f64> = x.elements().to_f32().iter().map(|&x| f64::from(x)).collect();
            let (got, want) = (numbers(device, &y), oracle::exact(&wide, SumSquares::PART));
            for (got, want) in got[2..].iter().zip(&want) {
                // Whole numbers of this size have exact sums.
                let bound = if matches!(data, Data::Whole) { 0.0 } else { 1200.0 * 2f64.powi(-24) * want };
                assert!((f64::from(*got) - want).abs() <= bound, "{rows} x {cols}: {got}, not {want}");
            }
            assert!([got[0], got[1], got[parts + 2]].iter().all(|y| y.is_nan()), "others' places are left alone");
        }
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, y) = (tensor(3, 5), tensor(1, 2));
    refuses(device, &SumSquares { x: &x, y: &y, first: 2 }, &["too few for 1 from 2 on"]);
    refuses(device, &SumSquares { x: &y, y: &y, first: 0 }, &["shares its memory"]);
}
