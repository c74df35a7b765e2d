"""Embeds a corpus with Ray Data: one encoder for each worker, on one machine or on many.

    pip install 'ray[data]' ./src/python
    python src/python/examples/embed_ray.py model/minilm texts.txt embeddings --workers 2

Reads text files of a text a line (or parquet with a column `text`) and writes
parquet with `text` and `embedding`. Ray starts the workers, gives each its
share, does a lost worker's share again, and holds back readers when workers
are behind, so that memory stays bounded. On a cluster, run it on the head node
with `--address auto`; the model's folder must be at the same path everywhere.
With GPUs that wgpu reaches, `--gpus 1` gives each worker one of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import ray


class Embed:
    """The actor: an encoder that lives as long as its worker."""

    def __init__(self, folder: str, sparsity: str, device: str, threads: int, batch_size: int) -> None:
        import sparse24

        # The threads that Ray counts are those that it takes.
        on = sparse24.Device(device, threads=threads)
        self.encoder = sparse24.Encoder(folder, sparsity, device=on)
        self.batch_size = batch_size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"text": batch["text"], "embedding": self.encoder.encode(list(batch["text"]), self.batch_size)}


def embed(texts: ray.data.Dataset, args: argparse.Namespace) -> ray.data.Dataset:
    """The texts with their embeddings.

    Ray Data spreads the workers over the nodes, starts lost ones again, and
    does their batches again.
    """
    return texts.map_batches(
        Embed,
        fn_constructor_args=(args.model, args.sparsity, args.device, args.threads, args.batch_size),
        batch_size=args.block,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        # Half of what it takes: readers and writers find room beside as many workers as there are cores.
        num_cpus=args.threads / 2,
        num_gpus=args.gpus or None,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder of Hugging Face or Sentence Transformers, an absolute path on clusters")
    parser.add_argument("texts", help="a text file or a folder of them, or *.parquet with a column `text`")
    parser.add_argument("out", help="folder of the parquet files that are written")
    parser.add_argument("--sparsity", default="none", help="none, 2:4 or V:2:4")
    parser.add_argument("--device", default="auto", help="auto, cpu, or a part of a GPU's name")
    parser.add_argument("--workers", type=int, default=2, help="encoders, all nodes together")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each")
    parser.add_argument("--batch-size", type=int, default=32, help="texts that go through a model together")
    parser.add_argument("--block", type=int, default=1024, help="texts that a worker takes at once")
    parser.add_argument("--address", help="of a cluster that is there; `auto` for this node's")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    ray.init(address=args.address)
    texts = ray.data.read_parquet(args.texts) if args.texts.endswith("parquet") else ray.data.read_text(args.texts)
    # Shares small enough for all workers, whatever the files.
    texts = texts.repartition(target_num_rows_per_block=args.block)
    started = time.perf_counter()
    done = embed(texts, args)
    done.write_parquet(args.out)
    seconds = time.perf_counter() - started
    rows = ray.data.read_parquet(args.out, columns=["text"]).count()
    report = {"texts": rows, "seconds": round(seconds, 3), "texts_per_second": round(rows / seconds, 1)}
    print(json.dumps({**report, "workers": args.workers, "threads": args.threads}))


if __name__ == "__main__":
    main()
