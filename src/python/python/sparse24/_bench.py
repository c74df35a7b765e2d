"""Measurements, each of a result that was verified first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Union

from . import _native
from ._arrays import short_dtype
from ._device import Device, opened

Shape = Union[str, tuple[int, int, int]]


def bench(
    shapes: Shape | Iterable[Shape],
    *,
    ops: Sequence[str] = ("dense", "sparse24", "masked"),
    vector: int | Sequence[int] = (1, 32),
    tokens: int | Sequence[int] = 128,
    dtype: Any = "float32",
    device: Device | str = "auto",
    quick: bool = False,
    seed: int = 24,
) -> list[dict[str, Any]]:
    """Measures products of random weights, dense and 2:4 side by side, as `sparse24 bench` does.

    Parameters
    ----------
    shapes : str, tuple of int, or several
        Out features, tokens and in features, as ``"768x512x3072"`` or
        ``(768, 512, 3072)``, or a known model: ``"minilm"``, ``"bert-base"``,
        ``"bert-large"``, ``"llama-8b"``.
    ops : sequence of str
        Of ``"dense"``, ``"sparse24"``, ``"auto"``, ``"masked"`` and
        ``"masked24"``. ``"dense"`` is what others are compared with.
    vector : int or sequence of int, default (1, 32)
        Vector lengths of the 2:4 products.
    tokens : int or sequence of int, default 128
        For the layers of a known model.
    dtype : {"float32", "float16"}, default "float32"
        Of weights and activations.
    device : Device or str, default "auto"
        Where to measure.
    quick : bool, default False
        Three short samples, enough to see that everything runs.
    seed : int, default 24
        Of the numbers.

    Returns
    -------
    list of dict
        A record for each product, ``pandas.DataFrame(records)`` as they are:
        the fields of a row of `sparse24 bench --json`, such as ``op``,
        ``vector``, ``median_ms``, ``speedup_vs_dense`` and ``verified``. What
        was not verified has no times.
    """
    on = opened(device)
    short = short_dtype(dtype)
    vectors = [vector] if isinstance(vector, int) else list(vector)
    asked: list[tuple[str, Any]] = []
    for op in ops:
        asked += [(op, v) for v in vectors] if op in ("sparse24", "auto") else [(op, None)]
    if not asked:
        raise ValueError("ops names no operation")
    records: list[dict[str, Any]] = []
    for name, shape in _layers(shapes, [tokens] if isinstance(tokens, int) else list(tokens)):
        records += json.loads(_native.bench(on._native, name, shape, short, asked, quick, seed))
    for record in records:
        # What measures this row again.
        record["command"] = "sparse24.bench"
    return records


def _layers(shapes: Any, tokens: list[int]) -> list[tuple[str, tuple[int, int, int]]]:
    """Names and shapes of what is to be measured."""
    if isinstance(shapes, str) or (isinstance(shapes, tuple) and all(isinstance(n, int) for n in shapes)):
        shapes = [shapes]
    known = dict(_native.layer_shapes())
    layers = []
    for shape in shapes:
        if isinstance(shape, str) and shape in known:
            for n in tokens:
                layers += [(f"{shape}.{name}", (m, n, k)) for name, m, k in known[shape]]
            continue
        sizes = shape.split("x") if isinstance(shape, str) else shape
        try:
            m, n, k = (int(size) for size in sizes)
        except (TypeError, ValueError):
            names = ", ".join(known)
            raise ValueError(
                f"shape {shape!r} is not out features x tokens x in features, nor one of {names}"
            ) from None
        if min(m, n, k) < 1:
            raise ValueError(f"shape {shape!r} has a size of zero or less")
        layers.append((f"{m}x{n}x{k}", (m, n, k)))
    return layers
