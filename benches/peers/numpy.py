#!/usr/bin/env python3
"""numpy's matrix multiplication in f32, by the BLAS that it brings: a peer of `sparse24 bench --device cpu`.

dense is one sgemm; masked multiplies the weights by their mask on every call and then does the same sgemm, as training
with a mask of weights does. numpy has no 2:4.

    pip install numpy==2.4.6
    python3 benches/peers/numpy.py [--shapes MxNxK,...] [--threads N] [--quick] [--out FILE] [--seed N]

Where OpenBLAS chose kernels for a lesser processor than /proc/cpuinfo shows (a virtual machine that hides the model,
or OPENBLAS_CORETYPE), the script starts itself again with the right OPENBLAS_CORETYPE, and records that.
"""
import ctypes
import glob
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
# This folder's numpy.py and torch.py would be imported in place of the libraries.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != HERE]
import numpy as np  # noqa: E402

sys.path.append(HERE)
import common  # noqa: E402

sys.path.remove(HERE)

AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd")
KERNELS = {"avx512": ("SkylakeX", "Cooperlake", "SapphireRapids"), "avx2": ("Haswell", "Zen")}


def openblas():
    """(version, core) of the OpenBLAS in this process, or None."""
    libs = glob.glob(os.path.join(os.path.dirname(np.__file__), "..", "numpy.libs", "*openblas*"))
    libs += glob.glob(os.path.join(os.path.dirname(np.__file__), ".dylibs", "*openblas*"))
    if os.path.exists("/proc/self/maps"):  # a distribution's numpy: its BLAS is anywhere
        libs += {line.split()[-1] for line in open("/proc/self/maps", encoding="utf-8") if "blas" in line}
    for path in libs:
        try:
            lib = ctypes.CDLL(path)
        except OSError:
            continue
        for name in ("scipy_openblas_get_{}64_", "scipy_openblas_get_{}", "openblas_get_{}64_", "openblas_get_{}"):
            try:
                config, core = getattr(lib, name.format("config")), getattr(lib, name.format("corename"))
            except AttributeError:
                continue
            config.restype = core.restype = ctypes.c_char_p
            words = config().decode().split()
            return words[1] if words[:1] == ["OpenBLAS"] else "unknown", core().decode()
    return None


def wanted_core(core):
    """(the SIMD level that `core` uses, the OPENBLAS_CORETYPE to take instead or None)."""
    flags, intel = common.cpuinfo("flags").split(), common.cpuinfo("vendor_id") == "GenuineIntel"
    has = "avx512" if all(f in flags for f in AVX512) else "avx2" if "avx2" in flags and "fma" in flags else None
    uses = next((level for level, cores in KERNELS.items() if core in cores), None)
    if has is None or uses == has or uses == "avx512":
        return uses, None
    return uses, "SkylakeX" if has == "avx512" else "Haswell" if intel else "Zen"


def start_again(**environment):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})


def dense(w, _, x):
    y = np.full((x.shape[0], w.shape[0]), np.nan, np.float32)
    return common.Built(lambda: np.matmul(x, w.T, out=y), lambda: y)


def masked(w, mask, x):
    y = np.full((x.shape[0], w.shape[0]), np.nan, np.float32)
    product = np.empty_like(w)

    def call():
        np.multiply(w, mask, out=product)
        np.matmul(x, product.T, out=y)

    return common.Built(call, lambda: y)


def main():
    args = common.parser(__doc__).parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != str(args.threads):
        # It is read when numpy is loaded, which common does for everybody.
        start_again(OPENBLAS_NUM_THREADS=str(args.threads), OMP_NUM_THREADS=str(args.threads))
    blas = openblas()
    if blas:
        version, core = blas
        simd, better = wanted_core(core)
        if better and os.environ.get("SPARSE24_PEER_CORETYPE") != better:
            common.log(f"OpenBLAS runs {core} kernels: starting again with OPENBLAS_CORETYPE={better}")
            start_again(OPENBLAS_CORETYPE=better, SPARSE24_PEER_CORETYPE=better)
        elif better:
            common.log(f"OpenBLAS still runs {core} kernels")
        libraries = {"openblas": f"{version} {core}"}
        if os.environ.get("OPENBLAS_CORETYPE"):
            libraries["OPENBLAS_CORETYPE"] = os.environ["OPENBLAS_CORETYPE"]
        kernel = "openblas_sgemm"
    else:
        found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        libraries, simd, kernel = {found["name"]: found["version"]}, None, f"{found['name']}_sgemm"
        common.log(f"numpy's BLAS is {found['name']}: its threads and kernels are as it chose")
    ways = [common.Way("dense", kernel, dense), common.Way("masked", f"multiply+{kernel}", masked)]
    # Only OpenBLAS was told how many threads to take.
    device = common.cpu(args.threads if kernel == "openblas_sgemm" else None, simd)
    return common.run(args, "numpy", np.__version__, libraries, device, ways)


if __name__ == "__main__":
    sys.exit(main())
