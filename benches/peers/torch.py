#!/usr/bin/env python3
"""torch's linear layers: a peer of `sparse24 bench`, on the CPU or on an NVIDIA GPU.

dense is torch.nn.functional.linear without bias; masked multiplies the weights by their mask on every call before it,
into new memory, as a layer with a mask of weights does. With --device cuda: dense in f32 with TF32 off and on (dtype
"f32" and "tf32") and in f16, and 2:4 in f16 by torch.sparse.to_sparse_semi_structured with both of its libraries,
cuSPARSELt and CUTLASS, where they support the GPU.

    pip install torch==2.15.0 numpy==2.4.6
    python3 benches/peers/torch.py [--device cpu|cuda] [--shapes MxNxK,...] [--threads N] [--quick] [--out FILE]

On the GPU calls are timed by CUDA events, which count the gaps where Python launches slower than the GPU works. With
--cuda-graphs a call is one replay of a graph captured before, without the gaps.
"""
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
# This folder's numpy.py and torch.py would be imported in place of the libraries.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != HERE]
import torch  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

sys.path.append(HERE)
import common  # noqa: E402

sys.path.remove(HERE)

PRECISION = {"f32": "highest", "tf32": "high", "f16": "highest"}


class Builder:
    """Puts operands in place on a device and makes the calls."""

    def __init__(self, device, graphs):
        self.device, self.graphs = device, graphs

    def way(self, op, kernel, dtype="f32"):
        def build(w, mask, x):
            place = lambda a: torch.from_numpy(a).to(self.device, torch.float16 if dtype == "f16" else torch.float32)
            w, x = place(w), place(x)
            if op == "masked":
                mask = place(mask)
                return self.built(lambda: linear(x, w * mask), dtype)
            if op == "sparse24":
                w = semi_structured(w, kernel)
            return self.built(lambda: linear(x, w), dtype)

        clock = "cuda_events" if self.device == "cuda" else "host_wall"
        return common.Way(op, kernel, build, dtype, clock=clock)

    def built(self, raw, dtype):
        torch.set_float32_matmul_precision(PRECISION[dtype])
        last = []
        if self.device == "cuda" and self.graphs:
            graph, y = captured(raw)
            last, raw = [y], graph.replay

        def call():
            torch.set_float32_matmul_precision(PRECISION[dtype])
            y = raw()
            if y is not None:  # a replay writes where its capture did
                last[:] = [y]

        def seconds(calls):
            torch.set_float32_matmul_precision(PRECISION[dtype])
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                raw()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        extra = {"cuda_graph": self.graphs} if self.device == "cuda" else {}
        return common.Built(call, lambda: last[0].cpu().numpy(), seconds if self.device == "cuda" else None, extra)


def captured(raw):
    """A graph of one call, and its output."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up on first use, which a capture must not see
        for _ in range(3):
            raw()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = raw()
    return graph, y


def semi_structured(w, kernel):
    """w in 2:4 for the library `kernel`. The flag says which class is made; calls go by the class."""
    torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = kernel == "cutlass"
    return torch.sparse.to_sparse_semi_structured(w)


def supported(kernel):
    """Whether the library runs on this GPU: it is asked to multiply."""
    try:
        w = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float16, device="cuda").tile((128, 32))
        x = torch.ones(128, 128, dtype=torch.float16, device="cuda")
        linear(x, semi_structured(w, kernel))
        torch.cuda.synchronize()
    except (RuntimeError, NotImplementedError) as e:
        common.log(f"no rows of {kernel}: {str(e).strip().splitlines()[0]}")
        return False
    return True


def driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def mkl():
    """The version of MKL, or None."""
    _, found, rest = torch.__config__.show().partition("Math Kernel Library Version ")
    return rest.split("-")[0].split()[0] if found else None


def main():
    p = common.parser(__doc__)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--cuda-graphs", action="store_true", help="time replays of CUDA graphs")
    p.set_defaults(threads=None)
    args = p.parse_args()
    reproduce = ["--device", args.device, *(["--cuda-graphs"] if args.cuda_graphs else [])]
    builder = Builder(args.device, args.cuda_graphs)
    if args.device == "cpu":
        if args.cuda_graphs:
            p.error("--cuda-graphs: needs --device cuda")
        threads = args.threads or common.cores()
        torch.set_num_threads(threads)
        libraries = {"mkl": mkl()} if mkl() else {}
        device = common.cpu(threads, torch.backends.cpu.get_cpu_capability().lower())
        ways = [builder.way("dense", "torch_linear"), builder.way("masked", "torch_mul+linear")]
    else:
        if args.threads:
            p.error("--threads: needs --device cpu")
        if not torch.cuda.is_available():
            sys.exit("--device cuda: torch.cuda.is_available() is false: no NVIDIA GPU or driver here, or a torch "
                     f"built without CUDA ({torch.__version__})")
        # Partial sums of split products would otherwise be added in f16.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        kind = "integrated" if getattr(properties, "is_integrated", 0) else "discrete"
        device = common.Device(properties.name, kind, driver(), f"cuda {torch.version.cuda}")
        libraries = {"cuda": torch.version.cuda}
        ways = [builder.way("dense", "torch_linear", dtype) for dtype in ("f32", "tf32", "f16")]
        ways[1:2] *= properties.major >= 8  # before Ampere there is no TF32
        if supported("cusparselt"):
            libraries["cusparselt"] = str(torch.backends.cusparselt.version())
            ways.append(builder.way("sparse24", "cusparselt", "f16"))
        if supported("cutlass"):
            ways.append(builder.way("sparse24", "cutlass", "f16"))
    with torch.inference_mode():
        return common.run(args, "torch", torch.__version__, libraries, device, ways, reproduce)


if __name__ == "__main__":
    sys.exit(main())
