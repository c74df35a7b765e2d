//! What vendors and papers claim for sparse hardware and software, as context beside what was measured.
//!
//! A measured gain says little without the gain that was promised. Invariant: nothing here was measured by this crate,
//! and every row names its source; whoever shows one marks it "datasheet, not measured". That a device
//! has no row, as all of Intel's, says nothing about what it can do.

/// One claim, either two peaks or a few words.
pub(super) struct Claim {
    pub(super) device: &'static str,
    /// Which units, in which numbers; or which software.
    pub(super) what: &'static str,
    /// Peak of dense products, TFLOPS.
    pub(super) dense: Option<f64>,
    /// Peak of 2:4 products, TFLOPS, the skipped operations counted as done.
    pub(super) sparse: Option<f64>,
    /// The claim, if it is no pair of peaks; else empty.
    pub(super) says: &'static str,
    /// Title and year or version.
    pub(super) source: &'static str,
    pub(super) url: &'static str,
}

const fn peaks(
    device: &'static str,
    what: &'static str,
    dense: f64,
    sparse: f64,
    source: &'static str,
    url: &'static str,
) -> Claim {
    Claim { device, what, dense: Some(dense), sparse: Some(sparse), says: "", source, url }
}

const fn says(
    device: &'static str,
    what: &'static str,
    says: &'static str,
    source: &'static str,
    url: &'static str,
) -> Claim {
    Claim { device, what, dense: None, sparse: None, says, source, url }
}

const F16_F32: &str = "f16 tensor cores, f32 accumulation";
const F16_F16: &str = "f16 tensor cores, f16 accumulation";
/// Of sources that give a peak without saying what it accumulates in.
const F16: &str = "f16 matrix units, accumulation not stated";

const GA102: &str = "NVIDIA Ampere GA102 GPU Architecture, V2.0";
const GA102_URL: &str = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf";
const ADA: &str = "NVIDIA Ada GPU Architecture, appendix A, 2022";
const ADA_URL: &str = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf";
const ORIN_URL: &str =
    "https://www.nvidia.com/content/dam/en-zz/Solutions/gtcf21/jetson-orin/nvidia-jetson-agx-orin-technical-brief.pdf";

/// Peaks first, then software and other hardware.
pub(super) const CLAIMS: &[Claim] = &[
    peaks(
        "NVIDIA A100 SXM 80GB",
        F16_F32,
        312.0,
        624.0,
        "NVIDIA Ampere Architecture In-Depth, 2020",
        "https://developer.nvidia.com/blog/nvidia-ampere-architecture-in-depth/",
    ),
    peaks(
        "NVIDIA H100 SXM",
        F16_F32,
        989.4,
        1978.9,
        "NVIDIA H100 Tensor Core GPU Architecture, 2022",
        "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper",
    ),
    peaks(
        "NVIDIA H200 SXM",
        F16,
        989.5,
        1979.0,
        "NVIDIA H200 Tensor Core GPU, 2023; gives the sparse peak, dense is half of it",
        "https://www.nvidia.com/en-us/data-center/h200/",
    ),
    peaks(
        "NVIDIA B200 (HGX)",
        F16,
        2250.0,
        4500.0,
        "NVIDIA HGX Platform, 2024; gives the sparse peak of 8 GPUs, dense is half of it",
        "https://www.nvidia.com/en-us/data-center/hgx/",
    ),
    peaks("NVIDIA L40S", F16, 362.05, 733.0, "NVIDIA L40S GPU, 2023", "https://www.nvidia.com/en-us/data-center/l40s/"),
    peaks("NVIDIA GeForce RTX 3090", F16_F32, 71.0, 142.0, GA102, GA102_URL),
    peaks("NVIDIA GeForce RTX 3090", F16_F16, 142.0, 284.0, GA102, GA102_URL),
    peaks("NVIDIA GeForce RTX 4090", F16_F32, 165.2, 330.4, ADA, ADA_URL),
    peaks("NVIDIA GeForce RTX 4090", F16_F16, 330.3, 660.6, ADA, ADA_URL),
    peaks(
        "AMD Instinct MI300X",
        F16,
        1307.4,
        2614.9,
        "AMD Instinct MI300X Accelerators, 2023",
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    ),
    says(
        "AMD Radeon RX 7900 XTX (RDNA 3)",
        "f16 matrix instructions",
        "dense ones (WMMA) only; sparse ones (SWMMAC) come with RDNA 4",
        "LLVM, [AMDGPU] Add GFX12 WMMA and SWMMAC instructions, 2024",
        "https://github.com/llvm/llvm-project/pull/77795",
    ),
    says(
        "NVIDIA Jetson AGX Orin 64GB",
        "int8 tensor cores of the GPU",
        "up to 170 TOPS sparse",
        "NVIDIA Jetson AGX Orin Series Technical Brief, 2022",
        ORIN_URL,
    ),
    says(
        "NVIDIA A100",
        "2:4 on tensor cores",
        "twice the math throughput of dense matrix units",
        "Mishra et al., Accelerating Sparse Deep Neural Networks, 2021",
        "https://arxiv.org/abs/2104.08378",
    ),
    says(
        "NVIDIA A100",
        "BERT-large inference, int8, end to end",
        "1.5x the dense model (batch 49 against 256), on units of up to twice the rate",
        "NVIDIA Investor Presentation, Structural Sparsity Brings Additional Speedups (a copy, undated)",
        "https://pitchsend.com/slides/hckD5VbSMGMxyeKu",
    ),
    says(
        "NVIDIA Ampere",
        "2:4 networks in TensorRT 8.0",
        "over 30 % more performance per watt than dense networks",
        "NVIDIA, Accelerating Inference with Sparsity, 2021",
        "https://developer.nvidia.com/blog/accelerating-inference-with-sparsity-using-ampere-and-tensorrt/",
    ),
    says(
        "NVIDIA A100, RTX 3090, RTX 4090",
        "N:M in software, f32 on CUDA cores (NM-SpMM)",
        "1.4x to 6.3x cuBLAS's dense product, from 50 % to 87.5 % zeros",
        "Ma et al., NM-SpMM, 2025",
        "https://arxiv.org/abs/2503.01253",
    ),
    says(
        "NVIDIA A100 PCIe 80GB",
        "16:32 in software, f32 on CUDA cores (NM-SpMM)",
        "1.83x cuBLAS's dense product, the mean of the 100 shapes in the authors' data",
        "NM-SpMM, benchmark/kernel_performance, at 143c1be",
        "https://github.com/M-H482/NM-SpMM",
    ),
    says(
        "EIE (ASIC, 600 mW)",
        "pruned and quantized fully connected layers",
        "189x and 13x as fast as CPU and GPU with the dense model; 102 GOPS compressed are worth 3 TOPS dense",
        "Han et al., EIE, 2016",
        "https://arxiv.org/abs/1602.01528",
    ),
    says(
        "ESE (Xilinx XCKU060 FPGA, 41 W)",
        "pruned and quantized LSTM",
        "43x and 3x as fast as CPU and GPU; 282 GOPS sparse are worth 2.52 TOPS dense",
        "Han et al., ESE, 2017",
        "https://arxiv.org/abs/1612.00694",
    ),
    says(
        "AMD (Xilinx) FPGAs",
        "Vitis AI Optimizer: whole channels, not 2:4",
        "5x to 50x less model complexity with minimal accuracy degradation",
        "Vitis AI User Guide, UG1414 3.0, 2023",
        "https://docs.amd.com/r/3.0-English/ug1414-vitis-ai/Vitis-AI-Optimizer",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_claim_claims_something_and_names_its_source() {
        for Claim { device, what, dense, sparse, says, source, url } in CLAIMS {
            assert!(![device, what, source].iter().any(|text| text.is_empty()), "{device}: {what}: {source}");
            assert!(url.starts_with("https://"), "{device}: {url}");
            match (dense, sparse) {
                (Some(dense), Some(sparse)) => {
                    assert!(says.is_empty() && *dense > 0.0 && sparse >= dense, "{device}: {dense}, {sparse}, {says}");
                }
                (None, None) => assert!(!says.is_empty(), "{device}: {what}"),
                _ => panic!("{device}: half a pair"),
            }
        }
    }
}
