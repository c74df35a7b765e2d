//! Devices.

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use sparse24::engine::{AdapterKind, DeviceInfo, Options};

use crate::errors::to_py;
use crate::process::{self, Owned};

/// A place where products are computed: a GPU, or this process.
#[pyclass(module = "sparse24", frozen)]
pub(crate) struct Device {
    pub(crate) device: Owned<sparse24::Device>,
    /// For what the host computes beside a device whose number of threads was given; else the process's own pool does.
    pool: Option<Owned<ThreadPool>>,
    asked: String,
    asked_threads: Option<usize>,
}

#[pymethods]
impl Device {
    #[new]
    #[pyo3(signature = (name="auto", threads=None))]
    fn new(py: Python<'_>, name: &str, threads: Option<usize>) -> PyResult<Self> {
        process::enter()?;
        if threads.is_some_and(|threads| !(1..=1024).contains(&threads)) {
            return Err(PyValueError::new_err("threads is not a number from 1 to 1024"));
        }
        let options = Options { threads, ..Options::default() };
        let device = py.detach(|| sparse24::Device::open(name, options)).map_err(to_py)?;
        let pool = threads.map(|threads| ThreadPoolBuilder::new().num_threads(threads).build()).transpose();
        let pool = pool.map_err(|e| PyRuntimeError::new_err(format!("cannot start threads: {e}")))?;
        Ok(Self {
            device: Owned::new(device),
            pool: pool.map(Owned::new),
            asked: name.to_owned(),
            asked_threads: threads,
        })
    }

    /// Of the hardware.
    #[getter]
    fn name(&self) -> String {
        self.device.info().name().to_owned()
    }

    #[getter]
    fn kind(&self) -> &'static str {
        match self.device.info() {
            DeviceInfo::Gpu(gpu) => kind(gpu.kind),
            DeviceInfo::Cpu(_) => "cpu",
        }
    }

    /// Of the CPU device.
    #[getter]
    fn threads(&self) -> Option<usize> {
        match self.device.info() {
            DeviceInfo::Gpu(_) => None,
            DeviceInfo::Cpu(cpu) => Some(cpu.threads),
        }
    }

    /// What it was opened with.
    #[getter]
    fn asked(&self) -> (&str, Option<usize>) {
        (&self.asked, self.asked_threads)
    }
}

impl Device {
    /// Computes something on the host with the device's number of threads.
    pub(crate) fn install<R: Send>(&self, compute: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(compute),
            None => compute(),
        }
    }
}

fn kind(kind: AdapterKind) -> &'static str {
    kind.name()
}

/// Name and kind of every device of this machine.
#[pyfunction]
pub(crate) fn device_names(py: Python<'_>) -> PyResult<Vec<(String, &'static str)>> {
    process::enter()?;
    let adapters = py.detach(sparse24::Device::adapters);
    let cpu = [("cpu".to_owned(), "cpu")];
    Ok(cpu.into_iter().chain(adapters.into_iter().map(|adapter| (adapter.name, kind(adapter.kind)))).collect())
}
