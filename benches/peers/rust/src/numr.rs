//! numr: a 2:4 weight is decompressed into a dense one in every call of `sparse_24_matmul`, on the CPU and through wgpu
//! alike (only its CUDA runtime has a kernel for it). So an output takes k multiply-adds, not k/2.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Context, Result};
use numr::dtype::DType;
use numr::ops::MatmulOps;
use numr::runtime::cpu::{CpuClient, CpuDevice, CpuRuntime};
use numr::runtime::wgpu::{WgpuClient, WgpuDevice, WgpuRuntime};
use numr::runtime::{Runtime, RuntimeClient};
use numr::sparse::Sparse24Ops;
use numr::tensor::Tensor;

use crate::problem::{Problem, Shape};
use crate::{Call, Peer, Place};

struct Numr<R: Runtime> {
    client: R::Client,
    device: R::Device,
    place: Place,
}

pub(crate) fn peer(device: Option<&str>, threads: u32) -> Result<Box<dyn Peer>> {
    let Some(part) = device else {
        let device = CpuDevice::new();
        let place = Place::on_cpu("numr", threads);
        return Ok(Box::new(Numr::<CpuRuntime> { client: CpuClient::new(device.clone()), device, place }));
    };
    // As numr lists them, which takes an index into that list.
    let adapters = pollster::block_on(wgpu::Instance::default().enumerate_adapters(wgpu::Backends::all()));
    let infos: Vec<wgpu::AdapterInfo> = adapters.iter().map(wgpu::Adapter::get_info).collect();
    let matching = |info: &wgpu::AdapterInfo| info.name.to_lowercase().contains(&part.to_lowercase());
    let (index, info) = (infos.iter().enumerate())
        .filter(|(_, info)| matching(info))
        // The same GPU may be there through OpenGL, too.
        .min_by_key(|(_, info)| info.backend == wgpu::Backend::Gl)
        .with_context(|| {
            let names: Vec<&str> = infos.iter().map(|info| info.name.as_str()).collect();
            format!("no GPU has {part:?} in its name: {names:?}")
        })?;
    let client = WgpuClient::new(WgpuDevice::new(index))?;
    let place = Place {
        program: "numr",
        libraries: vec![("wgpu", "30.")],
        device: info.name.clone(),
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu | wgpu::DeviceType::Other => "virtual",
            wgpu::DeviceType::Cpu => "software",
        },
        driver: Some(format!("{} {}", info.driver, info.driver_info).trim().to_owned()),
        backend: Some(info.backend.to_str().to_owned()),
        simd: None,
        threads: None,
    };
    Ok(Box::new(Numr::<WgpuRuntime> { device: client.device().clone(), client, place }))
}

impl<R> Peer for Numr<R>
where
    R: Runtime<DType = DType>,
    R::Client: MatmulOps<R> + Sparse24Ops<R>,
{
    fn place(&self) -> Place {
        self.place.clone()
    }

    fn calls<'a>(&'a self, problem: &'a Problem) -> Result<Vec<Call<'a>>> {
        let Shape { m, n, k } = problem.shape;
        let client = &self.client;
        let x = Rc::new(Tensor::<R>::from_slice(&problem.x, &[n, k], &self.device)?);
        // Pruned already: groups of two values and two zeros keep their values, however numr breaks ties.
        let pruned = Tensor::<R>::from_slice(&problem.pruned, &[m, k], &self.device)?;
        let sparse = client.prune_to_24(&pruned)?;
        let sparse_bytes = 4 * (sparse.compressed_values().numel() + sparse.metadata().numel());
        // The output is numr's own and cannot be poisoned before.
        let call = |op, kernel: &str, weight_bytes, multiply: Box<dyn Fn() -> numr::error::Result<Tensor<R>> + 'a>| {
            let y = Rc::new(RefCell::new(None));
            let out = Rc::clone(&y);
            Call {
                op,
                kernel: kernel.to_owned(),
                depth: k,
                weight_bytes,
                run: Box::new(move |calls| {
                    for _ in 0..calls {
                        *y.borrow_mut() = Some(multiply()?);
                    }
                    client.synchronize();
                    Ok(())
                }),
                output: Box::new(move || {
                    let y = out.borrow();
                    Ok(y.as_ref().context("not run")?.to_vec())
                }),
            }
        };
        let weights = Tensor::<R>::from_slice(&problem.w, &[m, k], &self.device)?;
        let view = weights.t()?;
        let transposed = view.contiguous()?;
        let [x1, x2, x3] = [Rc::clone(&x), Rc::clone(&x), x];
        Ok(vec![
            call("dense", "matmul_wt_view", 4 * m * k, Box::new(move || client.matmul(&x1, &view))),
            call("dense", "matmul_wt_contiguous", 4 * m * k, Box::new(move || client.matmul(&x2, &transposed))),
            call(
                "sparse24",
                "sparse_24_matmul_decompressing",
                sparse_bytes,
                Box::new(move || client.sparse_24_matmul(&x3, &sparse)),
            ),
        ])
    }
}
