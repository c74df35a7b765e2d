"""Safetensors files, with 2:4 matrices in this crate's format and in those of others."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, Union

import numpy as np

from . import _native
from ._arrays import Framework, bfloat16
from ._sparse import Sparse24

#: numpy's types by safetensors' names.
_NUMPY = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}
_SAFETENSORS = {np.dtype(dtype): name for name, dtype in _NUMPY.items()}
#: Types that packages add to numpy.
_ADDED = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}

PathLike = Union[str, "os.PathLike[str]"]


def load_file(path: PathLike, framework: Framework = "numpy") -> dict[str, Any]:
    """Reads a safetensors file, an index of several, or a model's folder.

    Parameters
    ----------
    path : path
        What to read.
    framework : {"numpy", "torch"}, default "numpy"
        Whose arrays dense tensors become. numpy needs the package ml_dtypes for
        bfloat16.

    Returns
    -------
    dict of str to Sparse24 or array
        By the names that tensors have when they are dense. What is stored
        compressed, in this crate's format, as `sparse-24-bitmask` of
        compressed-tensors or in torch's layout for CUTLASS, is a `Sparse24`, if
        its type is float32, float16 or bfloat16. Everything else is dense, with
        the masks of `torch.nn.utils.prune` and of NVIDIA's ASP applied.
    """
    if framework not in ("numpy", "torch"):
        raise ValueError(f"framework {framework!r} is not one of numpy, torch")
    source = _native.Source(os.fspath(path))
    tensors: dict[str, Any] = {}
    for name, dtype, shape, _ in source.items():
        if source.is_sparse24(name):
            tensors[name] = Sparse24._of(source.sparse24(name))
        else:
            make = _torch_of if framework == "torch" else _numpy_of
            tensors[name] = make(source.dense(name), dtype, shape, name)
    return tensors


def save_file(
    tensors: Mapping[str, Any],
    path: PathLike,
    layout: str = "native",
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, which appears complete or not at all.

    Parameters
    ----------
    tensors : mapping of str to Sparse24 or array
        By name. Arrays are of numpy or torch, of any type that safetensors has.
    path : path
        Where to. A file that is there is replaced.
    layout : {"native", "dense", "bitmask", "cutlass"}, default "native"
        How the compressed matrices lie in the file: see `Sparse24.to_layout`.
    metadata : mapping of str to str, optional
        Strings to keep beside them.

    Raises
    ------
    ValueError
        If a layout has no place for a matrix, or a name is used twice.
    """
    dense, compressed = [], []
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"a tensor is called {name!r}, expected a str")
        if isinstance(tensor, Sparse24):
            compressed.append((name, tensor._native))
            continue
        dtype, shape, data = _bytes_of(tensor, name)
        dense.append((name, dtype, shape, data))
    _native.save(os.fspath(path), dense, compressed, layout, dict(metadata or {}))


def _numpy_of(data: Any, dtype: str, shape: list[int], name: str) -> Any:
    if dtype in _NUMPY:
        # Files are little-endian.
        return data.view(np.dtype(_NUMPY[dtype]).newbyteorder("<")).reshape(shape)
    if dtype == "BF16":
        return data.view(bfloat16()).reshape(shape)
    added = next((own for own, named in _ADDED.items() if named == dtype), None)
    try:
        import ml_dtypes
    except ImportError:
        added = None
    if added is None:
        raise TypeError(f"{name} is of {dtype}, which numpy does not have: ask for framework='torch'")
    return data.view(np.dtype(getattr(ml_dtypes, added))).reshape(shape)


def _torch_of(data: Any, dtype: str, shape: list[int], name: str) -> Any:
    import torch

    names = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    own = names.get(dtype) or (np.dtype(_NUMPY[dtype]).name if dtype in _NUMPY else None)
    kind = getattr(torch, "bool" if own == "bool" else own, None) if own else None
    if kind is None:
        raise TypeError(f"{name} is of {dtype}, which this torch does not have")
    if not data.size:
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(data).view(kind).reshape(shape)


def _bytes_of(tensor: Any, name: str) -> tuple[str, list[int], Any]:
    """Type, shape and little-endian bytes of an array."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise TypeError(f"{name} is {tensor.layout} on {tensor.device}, expected a dense tensor on the CPU")
        flat = tensor.detach().resolve_neg().contiguous()
        kind = str(flat.dtype).removeprefix("torch.")
        dtype = _ADDED.get(kind) or _SAFETENSORS.get(np.dtype(kind))
        if dtype is None:
            raise TypeError(f"{name} is of {kind}, which safetensors does not have")
        # A view by bytes needs a dimension.
        return dtype, list(flat.shape), flat.reshape(-1).view(torch.uint8).numpy()
    if isinstance(tensor, np.ma.MaskedArray) or not isinstance(tensor, (np.ndarray, np.generic)):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected an array of numpy or torch, or a Sparse24")
    array = np.asarray(tensor)
    dtype = _ADDED.get(array.dtype.name) or _SAFETENSORS.get(array.dtype.newbyteorder("="))
    if dtype is None:
        raise TypeError(f"{name} is of {array.dtype}, which safetensors does not have")
    shape = list(array.shape)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return dtype, shape, np.ascontiguousarray(little).reshape(-1).view(np.uint8)
