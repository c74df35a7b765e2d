//! cubek-matmul on the wgpu runtime of cubecl (WGSL): dense. Only kernels of plain f32 take part, which multiply in
//! registers: those for cooperative matrices would turn f32 into TF32 where a device has it.

use std::marker::PhantomData;

use anyhow::{Context, Result, anyhow, ensure};
use cubecl::client::ComputeClient;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::wgpu::{AutoGraphicsApi, GraphicsApi, WgpuDevice, WgpuRuntime, init_setup};
use cubek_matmul::definition::MatmulElems;
use cubek_matmul::launch::{Strategy, launch_ref};
use cubek_matmul::routines::double_unit::DoubleUnitSelectionArgs;
use cubek_matmul::routines::simple_unit::SimpleUnitSelectionArgs;
use cubek_matmul::routines::{BlueprintStrategy, TileSizeSelection};
use cubek_std::InputBinding;
use wgpu29::DeviceType;

use crate::problem::{Problem, Shape};
use crate::{Call, Peer, Place};

struct Cubek {
    client: ComputeClient<WgpuRuntime>,
    place: Place,
}

/// cubecl's word for the first adapter with `part` in its name: a type, and the how-manieth of that type it is.
fn find(part: &str) -> Result<WgpuDevice> {
    let instance = wgpu29::Instance::new(wgpu29::InstanceDescriptor::new_without_display_handle());
    let adapters = cubecl::future::block_on(instance.enumerate_adapters(AutoGraphicsApi::backend().into()));
    let infos: Vec<wgpu29::AdapterInfo> = adapters.iter().map(wgpu29::Adapter::get_info).collect();
    let found = infos.iter().position(|info| info.name.to_lowercase().contains(&part.to_lowercase()));
    let found = found.with_context(|| {
        let names: Vec<&str> = infos.iter().map(|info| info.name.as_str()).collect();
        format!("no GPU has {part:?} in its name: {names:?}")
    })?;
    let kind = infos[found].device_type;
    let before = infos[..found].iter().filter(|info| info.device_type == kind).count();
    match kind {
        DeviceType::DiscreteGpu => Ok(WgpuDevice::DiscreteGpu(before)),
        DeviceType::IntegratedGpu => Ok(WgpuDevice::IntegratedGpu(before)),
        DeviceType::VirtualGpu => Ok(WgpuDevice::VirtualGpu(before)),
        DeviceType::Cpu if before == 0 => Ok(WgpuDevice::Cpu),
        DeviceType::Cpu | DeviceType::Other => Err(anyhow!("cubecl cannot choose {:?}", infos[found].name)),
    }
}

pub(crate) fn peer(part: Option<&str>) -> Result<Box<dyn Peer>> {
    let device = part.map_or(Ok(WgpuDevice::DefaultDevice), find)?;
    let info = init_setup::<AutoGraphicsApi>(&device, Default::default()).adapter.get_info();
    let wanted = part.unwrap_or_default().to_lowercase();
    ensure!(info.name.to_lowercase().contains(&wanted), "cubecl took {:?} instead", info.name);
    let place = Place {
        program: "cubek-matmul",
        libraries: vec![("cubecl", ""), ("wgpu", "29.")],
        device: info.name,
        kind: match info.device_type {
            DeviceType::DiscreteGpu => "discrete",
            DeviceType::IntegratedGpu => "integrated",
            DeviceType::VirtualGpu | DeviceType::Other => "virtual",
            DeviceType::Cpu => "software",
        },
        driver: Some(format!("{} {}", info.driver, info.driver_info).trim().to_owned()),
        backend: Some(info.backend.to_str().to_owned()),
        simd: None,
        threads: None,
    };
    Ok(Box::new(Cubek { client: WgpuRuntime::client(&device), place }))
}

fn strategies(n: usize) -> Vec<Strategy> {
    let mut strategies = vec![Strategy::Naive];
    for tile_size in [TileSizeSelection::MinTileSize, TileSizeSelection::MaxTileSize] {
        strategies.push(Strategy::SimpleUnit(BlueprintStrategy::Inferred(SimpleUnitSelectionArgs { tile_size })));
        strategies.push(Strategy::DoubleUnit(BlueprintStrategy::Inferred(DoubleUnitSelectionArgs { tile_size })));
    }
    if n == 1 {
        strategies.push(Strategy::GemvPlaneParallel(BlueprintStrategy::Inferred(Default::default())));
        strategies.push(Strategy::GemvUnitPerpendicular(BlueprintStrategy::Inferred(Default::default())));
    }
    strategies
}

/// A matrix [rows, cols] in a batch of one.
fn tensor(handle: &Handle, [rows, cols]: [usize; 2]) -> TensorBinding<WgpuRuntime> {
    TensorBinding {
        handle: handle.clone().binding(),
        strides: [rows * cols, cols, 1].into(),
        shape: [1, rows, cols].into(),
        runtime: PhantomData,
    }
}

impl Peer for Cubek {
    fn place(&self) -> Place {
        self.place.clone()
    }

    fn calls<'a>(&'a self, problem: &'a Problem) -> Result<Vec<Call<'a>>> {
        let Shape { m, n, k } = problem.shape;
        let client = &self.client;
        let f32_type = f32::as_type_native_unchecked();
        let x = client.create_from_slice(f32::as_bytes(&problem.x));
        let w = client.create_from_slice(f32::as_bytes(&problem.w));
        let call = |strategy: Strategy| {
            let (x, w) = (x.clone(), w.clone());
            // Poisoned: an output that is never written stays NaN.
            let y = client.create_from_slice(f32::as_bytes(&vec![f32::NAN; m * n]));
            let out = y.clone();
            Call {
                op: "dense",
                kernel: strategy.to_string(),
                depth: k,
                weight_bytes: 4 * m * k,
                run: Box::new(move |calls| {
                    for _ in 0..calls {
                        let lhs = InputBinding::new(tensor(&x, [n, k]), f32_type.storage_type());
                        let mut rhs = InputBinding::new(tensor(&w, [m, k]), f32_type.storage_type());
                        rhs.swap_dims(1, 2);
                        let mut types = MatmulElems::from_single_dtype(f32_type);
                        launch_ref(&strategy, client, lhs, rhs, tensor(&y, [n, m]), &mut types)
                            .map_err(|error| anyhow!("{error:?}"))?;
                    }
                    cubecl::future::block_on(client.sync()).map_err(|error| anyhow!("{error:?}"))
                }),
                output: Box::new(move || {
                    let bytes = client.read_one(out.clone()).map_err(|error| anyhow!("{error:?}"))?;
                    Ok(f32::from_bytes(&bytes).to_vec())
                }),
            }
        };
        Ok(strategies(n).into_iter().map(call).collect())
    }
}
