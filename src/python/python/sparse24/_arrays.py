"""Arrays of any library in the one form that the native module takes, and back.

That form is a C-contiguous numpy array in the host's byte order: float32, or
the bits of float16 and bfloat16 as uint16. An array that has it is not copied.
numpy before version 3 knows no bfloat16; such arrays are torch's or ml_dtypes'.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union

import numpy as np

if TYPE_CHECKING:
    import torch

    ArrayLike = Union[np.ndarray[Any, Any], torch.Tensor]

Framework = Literal["numpy", "torch"]
DTypeName = Literal["f32", "f16", "bf16"]

#: What users call the element types, by the crate's names.
NAMES: dict[str, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_SHORT = {name: short for short, name in NAMES.items()} | {short: short for short in NAMES}

_F32 = np.dtype(np.float32)
_F16 = np.dtype(np.float16)
_BITS = np.dtype(np.uint16)


class Given(NamedTuple):
    """An array that a user gave.

    Attributes
    ----------
    data : numpy.ndarray
        In the form of the native module.
    dtype : {"f32", "f16", "bf16"}
        What it holds.
    framework : {"numpy", "torch"}
        Whose array it was.
    """

    data: np.ndarray[Any, Any]
    dtype: DTypeName
    framework: Framework


def short_dtype(dtype: object) -> DTypeName:
    """The crate's name of an element type that a user named, by any library's name."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or str(dtype)
    if isinstance(dtype, type):
        name = np.dtype(dtype).name
    short = _SHORT.get(name.removeprefix("torch."))
    if short is None:
        raise TypeError(f"dtype {name} is not one of float32, float16, bfloat16")
    return short  # type: ignore[return-value]


def given(array: object, what: str) -> Given:
    """Takes an array of numpy, torch, or anything that speaks DLPack or the buffer protocol.

    Parameters
    ----------
    array : object
        The array. Lists are refused: their numbers have no type.
    what : str
        What errors call it.

    Returns
    -------
    Given
        The numbers, copied only if they are strided or in the other byte order.
    """
    # The common case first: it is in every call of a layer.
    if type(array) is np.ndarray and array.dtype == _F32:
        flags = array.flags
        if flags.c_contiguous and flags.aligned:
            return Given(array, "f32", "numpy")
    framework: Framework = "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        framework = "torch"
        data, bfloat16 = _of_torch(array, what, torch)
        if bfloat16:
            return Given(_plain(data, _BITS), "bf16", framework)
    else:
        data = _of_others(array, what)
    dtype = data.dtype
    if dtype.newbyteorder("=") == _F32:
        return Given(_plain(data, _F32), "f32", framework)
    if dtype.newbyteorder("=") == _F16:
        return Given(_plain(data, _F16).view(_BITS), "f16", framework)
    if dtype.name == "bfloat16":
        return Given(_plain(data.view(_BITS), _BITS), "bf16", framework)
    raise TypeError(
        f"{what} is of {dtype}, expected float32, float16 or bfloat16: convert it first, as by {what}.astype('float32')"
    )


def _plain(data: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """C-contiguous, aligned, in the host's byte order and of no subclass; copied if it was not. 0 dimensions stay 0."""
    return np.require(data, dtype, ["C", "A", "E"])


def matrix(array: object, what: str) -> Given:
    """`given` of two dimensions."""
    taken = given(array, what)
    if taken.data.ndim != 2:
        raise ValueError(f"{what} has {taken.data.ndim} dimensions, expected 2")
    return taken


def made(data: np.ndarray[Any, Any], dtype: str, framework: str) -> Any:
    """The native module's array as the one that a user wants, on the same memory."""
    if framework == "torch":
        return _to_torch(data, dtype)
    if framework != "numpy":
        raise ValueError(f"framework {framework!r} is not one of numpy, torch")
    if dtype == "f32":
        return data
    if dtype == "f16":
        return data.view(_F16)
    return data.view(bfloat16())


def bfloat16() -> np.dtype[Any]:
    """numpy's bfloat16, which the package ml_dtypes brings."""
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            "numpy has no bfloat16 of its own: install ml_dtypes (pip install 'sparse24[bfloat16]'), "
            "or ask for torch's tensors by framework='torch'"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def _of_torch(tensor: Any, what: str, torch: Any) -> tuple[np.ndarray[Any, Any], bool]:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{what} is a tensor of layout {tensor.layout}, expected a dense one: use {what}.to_dense()")
    if tensor.device.type != "cpu":
        # Copies between devices are the caller's to see.
        raise TypeError(f"{what} is on {tensor.device}, expected a tensor on the CPU: use {what}.cpu()")
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BITS), True
    return tensor.numpy(), False


def _to_torch(data: np.ndarray[Any, Any], dtype: str) -> Any:
    import torch

    if dtype == "f32":
        return torch.from_numpy(data)
    # Older versions of torch know no unsigned 16 bits.
    bits = torch.from_numpy(data.view(np.int16))
    return bits.view(torch.float16 if dtype == "f16" else torch.bfloat16)


def _of_others(array: object, what: str) -> np.ndarray[Any, Any]:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array, whose mask would be lost: use {what}.filled(0)")
    if isinstance(array, (np.ndarray, np.generic)):
        return np.asarray(array)
    if isinstance(array, (list, tuple, str, bytes, int, float)) or array is None:
        raise TypeError(f"{what} is a {type(array).__name__}, expected an array of numpy or torch")
    if hasattr(array, "__dlpack__"):
        try:
            return np.from_dlpack(array)  # type: ignore[arg-type]
        except (BufferError, RuntimeError) as e:
            raise TypeError(f"{what}: {e}") from None
    try:
        data = np.asarray(memoryview(array)) if not hasattr(array, "__array__") else np.asarray(array)  # type: ignore
    except TypeError:
        raise TypeError(f"{what} is a {type(array).__name__}, expected an array of numpy or torch") from None
    return data
