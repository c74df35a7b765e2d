"""The example on a local cluster of two workers: vectors, lost workers, memory."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sparse24
from conftest import ROOT

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[data]'")
pytest.importorskip("pyarrow", reason="Ray Data needs pyarrow: pip install 'ray[data]'")

EXAMPLE = ROOT / "src" / "python" / "examples" / "embed_ray.py"
SESSION = Path("/tmp/ray/session_latest")
PACKAGES = Path(sparse24.__file__).parents[1]
WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran"]


def texts(count):
    rng = np.random.default_rng(24)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 8))) for _ in range(count)]


@pytest.fixture(scope="module")
def cluster():
    # Workers find the package as this process did.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(PACKAGES), str(EXAMPLE.parent)])}}
    ray.init(
        num_cpus=2, runtime_env=environment, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def example(cluster):
    sys.path.insert(0, str(EXAMPLE.parent))
    yield importlib.import_module("embed_ray")
    sys.path.remove(str(EXAMPLE.parent))


def options(example, model, **changes):
    base = {"model": str(model), "sparsity": "8:2:4", "device": "cpu", "threads": 1, "batch_size": 32, "block": 64}
    base |= {"workers": 2, "gpus": 0, "address": None}
    return type("Arguments", (), base | changes)


def by_text(rows):
    return {row["text"]: np.asarray(row["embedding"]) for row in rows}


def test_two_workers_make_the_vectors_of_one_process(example, tiny_bert):
    corpus = texts(600)
    data = ray.data.from_items([{"text": text} for text in corpus], override_num_blocks=12)
    rows = example.embed(data, options(example, tiny_bert.folder)).take_all()
    assert sorted(row["text"] for row in rows) == sorted(corpus)
    expected = sparse24.Encoder(tiny_bert.folder, "8:2:4", device="cpu").encode(corpus)
    found = by_text(rows)
    # Other texts in a batch may change the kernel, and so the order of sums.
    for text, vector in zip(corpus, expected, strict=True):
        np.testing.assert_allclose(found[text], vector, atol=1e-6)


def test_memory_stays_bounded_while_a_corpus_streams(example, tiny_bert, monkeypatch):
    # A corpus of 160 MiB, each text with the page that it is of, through a store of 80 MiB.
    size, count = 256 << 10, 640
    # What a task is expected to bring: more than the store by default, which makes Ray wait at every step.
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 4 << 20)
    data = ray.data.range(count, override_num_blocks=40).map_batches(
        lambda batch: {
            "text": [f"cat dog mat {i % 7}" for i in batch["id"]],
            "page": np.ones((len(batch["id"]), size), np.uint8),
        },
        batch_size=16,
    )
    seen, most = 0, 0
    total = ray.cluster_resources()["object_store_memory"]
    for batch in example.embed(data, options(example, tiny_bert.folder, block=16)).iter_batches(batch_size=16):
        seen += len(batch["embedding"])
        most = max(most, total - ray.available_resources().get("object_store_memory", 0))
    assert seen == count
    # What does not fit would be spilled to disk, or the worker killed.
    spilled = sum(file.stat().st_size for file in SESSION.rglob("*ray_spilled*/*"))
    assert most <= total and spilled < 32 << 20, (most, spilled)


def test_a_killed_workers_share_is_done_again(example, tiny_bert, tmp_path, monkeypatch):
    corpus = texts(400)
    marker = tmp_path / "killed"

    class Dies(example.Embed):
        """The first worker that comes to its second batch is gone, as by a signal."""

        calls = 0

        def __call__(self, batch):
            self.calls += 1
            if self.calls == 2:
                try:
                    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                    os._exit(9)
                except FileExistsError:
                    pass
            return super().__call__(batch)

    monkeypatch.setattr(example, "Embed", Dies)
    data = ray.data.from_items([{"text": text} for text in corpus], override_num_blocks=8)
    rows = example.embed(data, options(example, tiny_bert.folder, block=50)).take_all()
    assert marker.exists(), "no worker died"
    assert sorted(row["text"] for row in rows) == sorted(corpus)
    expected = dict(zip(corpus, sparse24.Encoder(tiny_bert.folder, "8:2:4", device="cpu").encode(corpus), strict=True))
    for text, vector in by_text(rows).items():
        np.testing.assert_allclose(vector, expected[text], atol=1e-6)


def test_the_script_reports_its_throughput(tiny_bert, tmp_path):
    corpus = texts(300)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(corpus) + "\n")
    # On a cluster of its own.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(PACKAGES)
    command = [sys.executable, str(EXAMPLE), str(tiny_bert.folder), str(file), str(tmp_path / "out"), "--device", "cpu"]
    started = time.perf_counter()
    run = subprocess.run([*command, "--block", "64"], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.strip().splitlines()[-1])
    assert report["texts"] == 300 and report["workers"] == 2
    assert report["texts_per_second"] > 300 / (time.perf_counter() - started)
