"""What the peers' scripts share: operands, verification, sampling, and JSON of the schema `sparse24-bench/1`.

A script describes its ways to multiply as `Way`s. `run` builds each with weights and activations, verifies it, and
times the verified ones of a shape in turns. Y[n,m] = X[n,k] · W[m,k]ᵀ throughout.
"""
import argparse
import dataclasses
import datetime
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from typing import Any, Callable

import numpy as np

SHAPES = "768x128x768,3072x128x768,768x128x3072,1024x1024x1024,4096x1x4096"
FINE, WRONG = 0, 3  # exit codes; 1 is an error, 2 wrong usage
U = 2.0**-24  # unit round-off of f32
F16 = 2.0**-11  # and of f16


def log(*parts):
    print(*parts, file=sys.stderr, flush=True)


def command_line(*arguments):
    """A command as typed from the repository root."""
    script = "benches/peers/" + os.path.basename(sys.argv[0])
    return shlex.join(["python3", script, *arguments])


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parser(doc, threads=True, products=True):
    """The arguments that all scripts have, and those of scripts with threads and with products of their own shapes."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if products:
        p.add_argument("--shapes", type=shapes, default=SHAPES, metavar="MxNxK,...",
                       help="out features x tokens x in features (default: %(default)s)")
    if threads:
        p.add_argument("--threads", type=positive, default=cores(), help=f"default: all cores, here {cores()}")
    p.add_argument("--seed", type=int, default=24)
    p.add_argument("--quick", action="store_true", help="3 samples of 2 ms in place of 10 of 20 ms")
    p.add_argument("--out", metavar="FILE", help="JSON goes here, else to stdout")
    p.add_argument("--break-weight", action="store_true",
                   help="test of the verification: one weight is wrong, so that every row fails and the exit code is 3")
    return p


def positive(text):
    if (number := int(text)) < 1:
        raise ValueError
    return number


def shapes(text):
    all_shapes = [tuple(positive(x) for x in shape.split("x")) for shape in text.split(",")]
    if any(len(shape) != 3 or shape[2] % 4 for shape in all_shapes):
        raise argparse.ArgumentTypeError(f"{text}: MxNxK,... with K a multiple of 4")
    return all_shapes


def cpuinfo(key):
    """A field of /proc/cpuinfo, where there is one."""
    try:
        lines = open("/proc/cpuinfo", encoding="utf-8").read().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


@dataclasses.dataclass
class Device:
    """What the rows run on."""
    name: str
    kind: str = "cpu"
    driver: str | None = None
    backend: str | None = None
    simd: str | None = None
    threads: int | None = None


def cpu(threads, simd):
    return Device(cpuinfo("model name") or platform.processor(), simd=simd, threads=threads)


@dataclasses.dataclass
class Built:
    """One way with its operands in place. `call` multiplies once; `output` gives the n x m result of the last call.

    `seconds` times that many calls and waits for them.
    """
    call: Callable[[], Any]
    output: Callable[[], np.ndarray]
    seconds: Callable[[int], float] | None = None
    extra: dict = dataclasses.field(default_factory=dict)  # additional fields of the row

    def time(self, calls):
        if self.seconds:
            return self.seconds(calls)
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        return time.perf_counter() - start


@dataclasses.dataclass
class Way:
    """One way to multiply. `build` takes (w, mask, x) as f32: `mask` is None but for masked."""
    op: str
    kernel: str
    build: Callable[[np.ndarray, np.ndarray | None, np.ndarray], Built]
    dtype: str = "f32"
    accumulate: str = "f32"
    clock: str = "host_wall"

    def stored(self, a):
        """The numbers as this way stores them, in f32."""
        return a.astype(np.float16).astype(np.float32) if self.dtype == "f16" else a

    def weight_bytes(self, m, k):
        bits = 16 if self.dtype == "f16" else 32
        # Two of four values and two bits for each; a mask is a matrix of the weights' type.
        return m * k * {"dense": bits, "masked": 2 * bits, "sparse24": bits // 2 + 1}[self.op] // 8


def kept(w):
    """The 2:4 mask by magnitude: of each four the two largest, the lower index where they tie."""
    groups = np.abs(w).reshape(-1, 4)
    order = np.argsort(-groups, axis=1, kind="stable")[:, :2]
    mask = np.zeros(groups.shape, np.float32)
    np.put_along_axis(mask, order, 1.0, axis=1)
    return mask.reshape(w.shape)


def spread(length, rng):
    """One index of every 32, at most 512."""
    starts = np.arange(0, length, 32)
    picked = starts + rng.integers(0, np.minimum(32, length - starts))
    return picked[:: -(-len(picked) // 512)]


def verify(way, w, x, exact, wrong, rng):
    """Builds `way`, compares it with f64, and returns (what was built, error over bound, checked outputs)."""
    (m, k), n = w.shape, x.shape[0]
    w, x = way.stored(w), way.stored(x)
    mask = kept(w) if way.op != "dense" else None
    product = w if mask is None else w * mask
    features, tokens = spread(m, rng), spread(n, rng)
    # Not by BLAS, which may be what is measured.
    a, b = product[features].astype(np.float64), x[tokens].astype(np.float64)
    y, s = np.einsum("mk,nk->nm", a, b), np.einsum("mk,nk->nm", np.abs(a), np.abs(b))

    given = (product if way.op == "sparse24" else w).copy()
    if wrong:
        row = given[features[0]]
        row[np.abs(row).argmax()] *= -1.0
    built = way.build(given, mask, x)
    built.call()
    got = np.asarray(built.output())
    if got.shape != (n, m) or not np.isfinite(got).all():
        return built, np.inf, y.size
    executed = k // 2 if way.op == "sparse24" else k
    storing = 2.0 * F16 * np.abs(y) if way.dtype == "f16" else 0.0
    if exact:
        assert s.max() <= 2.0**24, "sums of whole numbers are not exact at this k"
        # Whole numbers up to 2048 are f16 numbers, larger ones need not be.
        bound = np.where(np.abs(y) > 2048.0, storing, 0.0)
    else:
        u = F16 if way.accumulate == "f16" else U
        # Where n·u reaches 1 there is no bound: nothing is then shown by the uniform data.
        gamma = (executed + 1) * u / (1.0 - (executed + 1) * u) if (executed + 1) * u < 1.0 else np.inf
        # TF32 keeps 10 bits of each operand, and may truncate.
        rounded = 2.0 * 2.0**-10 + 2.0**-20 if way.dtype == "tf32" else 0.0
        bound = (gamma + rounded) * s + 2.0 * executed * 2.0**-126 + storing
    error = np.abs(got[np.ix_(tokens, features)].astype(np.float64) - y)
    with np.errstate(divide="ignore", invalid="ignore"):
        over = np.where(error == 0.0, 0.0, error / bound)
    return built, float(over.max()), y.size


def row_of(way, shape, device, args):
    """Verifies one way on one shape. Returns its row, and what was built if it may be timed."""
    m, n, k = shape
    row = {"name": "shape", "op": way.op, "m": m, "n": n, "k": k, "dtype": way.dtype, "accumulate": way.accumulate,
           "vector": 1 if way.op == "sparse24" else None, "kernel": way.kernel, "device": device.name,
           "threads": device.threads, "median_ms": None, "min_ms": None, "max_ms": None, "samples": 0,
           "calls_per_sample": 0, "clock": way.clock, "effective_tflops": None, "executed_tflops": None,
           "speedup_vs_dense": None, "weight_bytes": way.weight_bytes(m, k), "error_over_bound": None,
           "checked_outputs": 0, "verified": False}
    rng = np.random.default_rng([args.seed, m, n, k])  # every way of a shape sees the same numbers
    whole = [rng.integers(-4, 5, size).astype(np.float32) for size in ((m, k), (n, k))]
    uniform = [rng.uniform(-1.0, 1.0, size).astype(np.float32) for size in ((m, k), (n, k))]
    try:
        _, off, _ = verify(way, *whole, True, args.break_weight, rng)
        built, row["error_over_bound"], row["checked_outputs"] = verify(way, *uniform, False, args.break_weight, rng)
        row.update(built.extra)
    except Exception as e:  # a library's refusal is this row's failure, not the others'
        failure = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
        off, built = 0.0, None
    else:
        failure = "an output is NaN, infinite or not written" if np.inf in (off, row["error_over_bound"]) else None
        if off > 0.0:
            failure = "a sum of whole numbers is wrong"
        elif row["error_over_bound"] > 1.0:
            failure = f"an error is {row['error_over_bound']:.2e} of the bound"
        if not np.isfinite(row["error_over_bound"]):
            row["error_over_bound"] = None
    row["verified"] = failure is None
    if failure:
        row["failure"] = failure
        log(f"failed: {way.op} {m}x{n}x{k} {way.dtype} {way.kernel}: {failure}")
    return row, built if row["verified"] else None


def calibrate(built, sample, warm_up):
    """Warms up, and finds how many calls make a sample."""
    built.time(1)  # what is made on first use
    spent, fastest, calls = 0.0, float("inf"), 1
    while fastest == float("inf") or spent < warm_up:
        once = built.time(calls)
        # Some clock must go on even if the device's stands still.
        spent += max(once, 1e-5)
        fastest = min(fastest, once / calls)
        calls = min(1000, 2 * calls) if once < 1e-3 else calls
    return int(min(max(np.ceil(sample / max(fastest, 1e-7)), 1), 100_000))


def summary(times):
    """Median, extremes, and the ends of the middle half: a quarter, rounded down, lies on either side."""
    times, quarter = sorted(times), len(times) // 4
    return {"median_ms": statistics.median(times), "min_ms": times[0], "max_ms": times[-1],
            "q1_ms": times[quarter], "q3_ms": times[-1 - quarter]}


def run(args, program, version, libraries, device, ways, reproduce=()):
    """Measures, writes the file, and returns the exit code. `reproduce`: further arguments of every row's command."""
    samples, sample, warm_up = policy(args)
    environment = environment_of(args, program, version, libraries, device)
    rows = []
    for shape in args.shapes:
        log("x".join(map(str, shape)))
        here = [(way, *row_of(way, shape, device, args)) for way in ways]
        timed = [(row, built, []) for _, row, built in here if built]
        for row, built, _ in timed:
            row["samples"], row["calls_per_sample"] = samples, calibrate(built, sample, warm_up)
        gc.collect()
        gc.disable()
        for _ in range(samples):
            for row, built, times in timed:
                times.append(built.time(row["calls_per_sample"]) * 1e3 / row["calls_per_sample"])
        gc.enable()
        for row, _, times in timed:
            row.update(summary(times))
            effective = 2.0 * shape[0] * shape[1] * shape[2] / row["median_ms"] / 1e9
            row["effective_tflops"] = effective
            row["executed_tflops"] = effective / (2.0 if row["op"] == "sparse24" else 1.0)
        for way, row, _ in here:
            dense = next((r["median_ms"] for w, r, _ in here if (w.op, w.dtype) == ("dense", way.dtype)), None)
            if dense and row["median_ms"]:
                row["speedup_vs_dense"] = dense / row["median_ms"]
            again = ["--shapes", "x".join(map(str, shape)), *reproduce, "--seed", str(args.seed)]
            if device.threads:
                again += ["--threads", str(device.threads)]
            row["command"] = command_line(*again, *(["--quick"] if args.quick else []))
            rows.append(row)
            log(f"  {way.op} {way.dtype} {way.kernel}: {row['median_ms']} ms, error {row['error_over_bound']}")
    write({"schema": "sparse24-bench/1", "environment": environment, "ceilings": {}, "rows": rows}, args.out)
    return FINE if all(row["verified"] for row in rows) else WRONG


def policy(args):
    """(samples, seconds of each, seconds of warming up)"""
    return (3, 2e-3, 0.0) if args.quick else (10, 20e-3, 0.1)


def environment_of(args, program, version, libraries, device):
    samples, sample, _ = policy(args)
    return {"program": program, "version": version, "libraries": libraries, "commit": None,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "os": {"Darwin": "macos"}.get(platform.system(), platform.system().lower()),
            "arch": {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()),
            "cpu": cpuinfo("model name") or platform.processor(), "device": device.name, "kind": device.kind,
            "driver": device.driver, "backend": device.backend, "simd": device.simd, "threads": device.threads,
            "seed": args.seed, "samples": samples, "sample_ms": sample * 1e3, "command": command_line(*sys.argv[1:])}


def write(report, out):
    """Writes whole files only."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if not out:
        sys.stdout.write(text)
        return
    partial = f"{out}.{os.getpid()}.tmp"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, out)
    except OSError:
        if os.path.exists(partial):
            os.remove(partial)
        raise
