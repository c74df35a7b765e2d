//! Pixels of pictures.

use rand_pcg::rand_core::Rng;
use sparse24::ops::pixels::PixelsKernel;
use sparse24::reference::pixels as oracle;
use sparse24::{DType, Device, Pixels};

use crate::common::{rng, seed};
use crate::{expect, indices, poisoned, refuses, slightly_wrong};

on_both_devices!(pixels_agree_with_the_oracle);

fn pixels_agree_with_the_oracle(device: &Device) {
    let mut rng = rng(seed(), 0);
    let f16 = device.caps().is_none_or(|caps| caps.f16);
    // One; around a workgroup of 256, and the 4096 of a task.
    for count in [1, 255, 257, 5000] {
        for output in [DType::F32, DType::F16].into_iter().filter(|&dtype| dtype == DType::F32 || f16) {
            // The highest byte does not count.
            let pixels: Vec<u32> = (0..count).map(|_| rng.next_u32()).collect();
            // EfficientNet-Lite's, which round nothing, and torchvision's.
            let torchvision = ([123.675, 116.28, 103.53], [1.0 / 58.395, 1.0 / 57.12, 1.0 / 57.375]);
            for (mean, scale) in [([127.0; 3], [1.0 / 128.0; 3]), torchvision] {
                let want = oracle::expect(&pixels, mean, scale, output);
                let (on_device, y) = (indices(device, &pixels), poisoned(device, count, 3, output));
                let call = device.prepare(&Pixels { pixels: &on_device, mean, scale, y: &y }).unwrap();
                let what = format!("{count} pixels, {mean:?}, {output}");
                expect(device, &call, &y, &want, &what);
                slightly_wrong(&want, &device.read(&y).unwrap(), &what);
            }
        }
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let f32s = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (pixels, y) = (device.indices(4).unwrap(), f32s(4, 3));
    let call = Pixels { pixels: &pixels, mean: [0.0; 3], scale: [1.0; 3], y: &y };
    assert!(device.prepare(&call).is_ok());
    refuses(device, &Pixels { y: &f32s(4, 4), ..call }, &["y has shape [4, 4], expected [4, 3]"]);
    refuses(device, &Pixels { y: &f32s(5, 3), ..call }, &["pixels has shape [4], expected [5]"]);
    refuses(device, &Pixels { scale: [1.0, f32::NAN, 1.0], ..call }, &["a channel's mean or scale is NaN"]);
    refuses(device, &Pixels { y: &device.zeros(4, 3, DType::Bf16).unwrap(), ..call }, &["y is bf16"]);
    let (none, y) = (device.indices(0).unwrap(), f32s(0, 3));
    device.prepare(&Pixels { pixels: &none, y: &y, ..call }).unwrap().run().unwrap();
}

#[test]
fn kernels_have_their_types_in_their_name() {
    assert_eq!(PixelsKernel::new(DType::F16).unwrap().to_string(), "pixels-f32f32-out_f16");
    assert!(PixelsKernel::new(DType::Bf16).is_err());
}
