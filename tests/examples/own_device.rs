//! 2:4 inside a program that has a wgpu device: its buffers, its encoder, its submission.
//!
//! `cargo run --release --example own_device`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use sparse24::{DType, Device, Gemm, GemmOperands, Matrix, Op, Problem, Tensor, VectorLen, prune, wgpu};

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The program's own device, opened with what kernels use of the adapter's features and limits.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (gpu, queue) = pollster::block_on(adapter.request_device(&Device::descriptor(&adapter)))?;
    let (tokens, m, k) = (20, 64, 128);
    let buffer = |bytes| {
        gpu.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes as u64,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    };
    let (x_buffer, y_buffer) = (buffer(4 * tokens * k), buffer(4 * tokens * m));
    queue.write_buffer(&x_buffer, 0, Matrix::uniform(tokens, k, DType::F32, 2)?.elements().as_bytes());

    // A layer on those buffers.
    let device = Device::from_wgpu(gpu.clone(), queue.clone())?;
    let v = VectorLen::new(32)?;
    let w = prune::sparsify(&Matrix::uniform(m, k, DType::F32, 1)?, v)?;
    let weights = device.upload_weights(&w.into())?;
    let x = Tensor::from_buffer(&device, x_buffer, tokens, k, DType::F32)?;
    let y = Tensor::from_buffer(&device, y_buffer, tokens, m, DType::F32)?;
    let plan = device.plan(&Problem::linear(Op::Sparse24(v), m, tokens, k, DType::F32))?;
    let call = device.prepare(&Gemm { plan: &plan, weights: &weights, operands: GemmOperands::new(&x, &y) })?;

    // Recorded where the program wants it; nothing is submitted, copied or waited for behind its back.
    let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    call.on_gpu().ok_or("not on a GPU")?.record(&mut encoder);
    queue.submit([encoder.finish()]);

    println!("{}: Y[0, 0] = {}", adapter.get_info().name, device.read(&y)?.get(0, 0));
    Ok(())
}
