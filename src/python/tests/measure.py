"""What the bindings cost: run by hand on a quiet machine, each part prints JSON.

    python src/python/tests/measure.py call
    python src/python/tests/measure.py import
    python src/python/tests/measure.py encode model/minilm target/release/sparse24
    python src/python/tests/measure.py ray model/minilm

Everything is measured in rounds that take turns, and the medians compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]


def corpus(count: int) -> list[str]:
    """Sentences of the repository's sample, none of them twice the same."""
    lines = (ROOT / "tests" / "sample" / "texts.txt").read_text().splitlines()
    return [f"{lines[i % len(lines)]} {i // len(lines)}" for i in range(count)]


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def call() -> dict[str, Any]:
    """A layer's call: all of it, for a layer that computes next to nothing; and what Python does of it."""
    import sparse24
    from sparse24._arrays import given, made

    rng, results = np.random.default_rng(24), {}
    for m, n, k in [(4, 1, 4), (64, 1, 64), (384, 1, 384), (384, 16, 384)]:
        w = sparse24.prune(rng.standard_normal((m, k), dtype=np.float32), vector=32)
        layer = sparse24.Linear(sparse24.compress(w), device=sparse24.Device("cpu", threads=1))
        x = rng.standard_normal((n, k), dtype=np.float32)
        native, repeats = layer._native.forward, 2000
        parts = {
            "call": lambda: layer(x),  # noqa: B023
            "of that, native": lambda: native(x, "f32"),  # noqa: B023
            "of that, arrays": lambda: made(given(x, "x").data, "f32", "numpy"),  # noqa: B023
        }
        rounds: dict[str, list[float]] = {part: [] for part in parts}
        for _ in range(15):
            for part, work in parts.items():
                rounds[part].append(seconds(lambda: [work() for _ in range(repeats)]) / repeats * 1e6)  # noqa: B023
        results[f"{m}x{n}x{k}"] = {
            part: {"median_us": statistics.median(times), "min_us": min(times), "max_us": max(times)}
            for part, times in rounds.items()
        }
    return results


def import_() -> dict[str, Any]:
    """A Python that imports it, one that imports numpy, and one that imports nothing."""
    rounds: dict[str, list[float]] = {"pass": [], "import numpy": [], "import sparse24": []}
    for _ in range(15):
        for code, times in rounds.items():
            times.append(1e3 * seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True)))  # noqa: B023
    return {code: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)} for code, t in rounds.items()}


def encode(folder: str, command: str) -> dict[str, Any]:
    """Texts a second by `encode` and by `sparse24 embed`, two threads each: the longer corpus less the shorter one."""
    short, long = 256, 1024
    script = (
        "import sys, sparse24; e = sparse24.Encoder(sys.argv[1], device='cpu', threads=2); "
        "e.encode(open(sys.argv[2]).read().splitlines())"
    )
    with tempfile.TemporaryDirectory() as folder_of_texts:
        files = {}
        for count in (short, long):
            files[count] = Path(folder_of_texts) / f"{count}.txt"
            files[count].write_text("\n".join(corpus(count)) + "\n")
        out = str(Path(folder_of_texts) / "out.jsonl")
        flags = ["--device", "cpu", "--threads", "2", "--out", out]

        def by_python(count: int) -> float:
            return seconds(lambda: subprocess.run([sys.executable, "-c", script, folder, files[count]], check=True))

        def by_command(count: int) -> float:
            line = [command, "embed", folder, "--input", str(files[count]), *flags]
            return seconds(lambda: subprocess.run(line, check=True, stderr=subprocess.DEVNULL))

        rounds: dict[str, list[float]] = {"python": [], "command": []}
        for _ in range(5):
            rounds["python"].append((long - short) / (by_python(long) - by_python(short)))
            rounds["command"].append((long - short) / (by_command(long) - by_command(short)))
    medians = {who: statistics.median(rates) for who, rates in rounds.items()}
    return {"texts_per_second": rounds, "medians": medians, "ratio": medians["python"] / medians["command"]}


def ray_(folder: str) -> dict[str, Any]:
    """Texts a second of two workers of a thread each, and of one process of two threads."""
    import ray
    import sparse24

    sys.path.insert(0, str(ROOT / "src" / "python" / "examples"))
    import embed_ray

    packages = str(Path(sparse24.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join([packages, str(ROOT / "src" / "python" / "examples"), inherited])
    ray.init(num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": paths}}, include_dashboard=False, log_to_driver=False)
    options = type("Options", (), {"model": os.path.abspath(folder), "sparsity": "none", "device": "cpu", "threads": 1})
    options.batch_size, options.block, options.workers, options.gpus = 32, 256, 2, 0  # type: ignore[attr-defined]
    short, long = 1024, 4096

    def by_ray(count: int) -> float:
        texts = [{"text": text} for text in corpus(count)]
        data = ray.data.from_items(texts, override_num_blocks=count // 256).materialize()
        return seconds(lambda: embed_ray.embed(data, options).materialize())  # type: ignore[arg-type]

    encoder = sparse24.Encoder(folder, device="cpu", threads=2)
    rounds: dict[str, list[float]] = {"ray": [], "one process": []}
    for _ in range(3):
        rounds["ray"].append((long - short) / (by_ray(long) - by_ray(short)))
        texts = corpus(long - short)
        rounds["one process"].append((long - short) / seconds(lambda: encoder.encode(texts)))  # noqa: B023
    ray.shutdown()
    medians = {who: statistics.median(rates) for who, rates in rounds.items()}
    return {"texts_per_second": rounds, "medians": medians, "ratio": medians["ray"] / medians["one process"]}


if __name__ == "__main__":
    parts = {"call": call, "import": import_, "encode": encode, "ray": ray_}
    print(json.dumps(parts[sys.argv[1]](*sys.argv[2:]), indent=2))
