"""Prunes a layer, checks it, and plots what it gains and what it costs.

    python src/python/examples/prune_layer.py --out layer.svg

Needs matplotlib. For each vector length: how much of the output is lost by
magnitude and by SparseGPT, and how long the product takes beside dense.
"""

from __future__ import annotations

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import sparse24

VECTORS = [1, 4, 32]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="layer.svg", help="file of the plot")
    parser.add_argument("--size", type=int, default=768, help="features")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a product")
    parser.add_argument("--device", default="auto", help="auto, cpu, or a part of a GPU's name")
    parser.add_argument("--quick", action="store_true", help="few samples, to see that it runs")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rng = np.random.default_rng(24)
    w = rng.standard_normal((args.size, args.size), dtype=np.float32)
    # Inputs that hang together, as those of a real layer do: what SparseGPT makes use of.
    factors = rng.standard_normal((args.size // 4, args.size), dtype=np.float32)
    x = rng.standard_normal((4 * args.size, args.size // 4), dtype=np.float32) @ factors
    dense = x @ w.T

    lost: dict[str, list[float]] = {}
    for method in ["magnitude", "sparsegpt"]:
        for vector in VECTORS:
            pruned = sparse24.prune(w, vector=vector, method=method, inputs=x)
            compressed = sparse24.compress(pruned, vector)
            # The check: what the layer computes is the product of the pruned weights.
            y = sparse24.Linear(compressed, device=args.device, dense_fallback=False)(x)
            expected = x @ pruned.T
            assert np.allclose(y, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
            assert (sparse24.decompress(compressed) == pruned).all()
            lost.setdefault(method, []).append(float(np.linalg.norm(y - dense) / np.linalg.norm(dense)))

    records = sparse24.bench(
        (args.size, args.tokens, args.size),
        ops=["dense", "sparse24"],
        vector=VECTORS,
        device=args.device,
        quick=args.quick,
    )
    for record in records:
        vector = f"V={record['vector']}" if record["vector"] else ""
        ratio = record["speedup_vs_dense"]
        print(f"{record['op']:9} {vector:5} {record['median_ms']:8.3f} ms  {ratio:.2f}x dense")

    figure, (speed, error) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = ["dense"] + [f"2:4 V={vector}" for vector in VECTORS]
    speed.barh(names[::-1], [record["median_ms"] for record in records[::-1]])
    speed.set_xlabel(f"ms, {args.size} x {args.tokens} x {args.size}, {records[0]['device']}")
    for method, losses in lost.items():
        error.plot([str(vector) for vector in VECTORS], losses, marker="o", label=method)
    error.set_xlabel("rows that share a pattern (V)")
    error.set_ylabel("lost of the output")
    error.set_ylim(bottom=0)
    error.legend()
    figure.savefig(args.out)
    print(f"{args.out} written")


if __name__ == "__main__":
    main()
