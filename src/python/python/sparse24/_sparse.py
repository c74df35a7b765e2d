"""Pruning to 2:4, and compressed matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _native
from ._arrays import NAMES, Framework, made, matrix

if TYPE_CHECKING:
    from ._arrays import ArrayLike

#: Names of a layout's tensors.
_FILE_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def vector_of(pattern: str, vector: int) -> int:
    """The vector length that a pattern such as ``"2:4"`` or ``"32:2:4"`` and `vector` ask for together."""
    rows, _, rest = pattern.rpartition(":2:4") if pattern.endswith(":2:4") else ("", "", pattern)
    if rest not in ("", "2:4") or (not rest and not rows.isdecimal()):
        raise ValueError(f"pattern {pattern!r} is not 2:4 or V:2:4")
    if rows and vector != 1 and int(rows) != vector:
        raise ValueError(f"pattern {pattern!r} and vector={vector} both say how many rows share a pattern")
    return int(rows) if rows else vector


def prune(
    w: ArrayLike,
    pattern: str = "2:4",
    vector: int = 1,
    method: str = "magnitude",
    *,
    inputs: ArrayLike | None = None,
    seed: int = 24,
) -> ArrayLike:
    """Sets all but two of every four consecutive weights of a row to zero.

    Parameters
    ----------
    w : array of shape (m, k)
        Weights, [out features, in features]: float32, float16 or bfloat16, of
        numpy or torch. It stays as it is. Zeros stay zero, so that masks
        compose.
    pattern : str, default "2:4"
        ``"2:4"``, or ``"V:2:4"`` in place of `vector`.
    vector : int, default 1
        How many consecutive rows share a pattern: 1, 2, 4 ... 128. 1 keeps
        accuracy best; from 8 on 2:4 is fast on GPUs without hardware for it.
    method : str, default "magnitude"
        ``"magnitude"``, ``"magnitude-l2"``, ``"random"``, and by the layer's
        inputs ``"wanda"``, ``"obd"`` and ``"sparsegpt"``, which also changes the
        weights that stay.
    inputs : array of shape (n, k), optional
        Inputs of the layer, for the methods that need them.
    seed : int, default 24
        Of the method ``"random"``.

    Returns
    -------
    array of shape (m, k)
        The pruned weights, of the same library and type.

    Raises
    ------
    ValueError
        For a NaN among the weights, an unknown method, or shapes that do not
        fit. Ctrl-C ends the wait, and the computation goes on to its end in the
        background.

    Examples
    --------
    >>> w = np.array([[4.0, -3.0, 2.0, 1.0]], np.float32)
    >>> prune(w)
    array([[ 4., -3.,  0.,  0.]], dtype=float32)
    """
    weights = matrix(w, "w")
    x = None if inputs is None else matrix(inputs, "inputs")
    pruned = _native.prune(
        weights.data,
        weights.dtype,
        vector_of(pattern, vector),
        method,
        None if x is None else x.data,
        "f32" if x is None else x.dtype,
        seed,
    )
    return made(pruned, weights.dtype, weights.framework)


def compress(w: ArrayLike, vector: int | None = None) -> Sparse24:
    """Compresses a matrix that is 2:4 already, as `prune` makes it.

    Parameters
    ----------
    w : array of shape (m, k)
        Weights: float32, float16 or bfloat16, of numpy or torch.
    vector : int, optional
        How many rows share a pattern. The most that do unless given.

    Returns
    -------
    Sparse24

    Raises
    ------
    ValueError
        If the matrix is not 2:4. The message names the first row and group.
    """
    weights = matrix(w, "w")
    return Sparse24._of(_native.compress(weights.data, weights.dtype, vector))


def decompress(s: Sparse24, framework: Framework = "numpy") -> ArrayLike:
    """The dense matrix of a compressed one, with zeros where nothing is kept.

    Parameters
    ----------
    s : Sparse24
        The compressed matrix.
    framework : {"numpy", "torch"}, default "numpy"
        Whose array is wanted.

    Returns
    -------
    array of shape (m, k)
    """
    if not isinstance(s, Sparse24):
        raise TypeError(f"expected a Sparse24, not a {type(s).__name__}")
    return made(s._native.decompress(), s._native.dtype, framework)


class Sparse24:
    """A compressed 2:4 matrix: the kept values, and 4 bits for each group that say where they stood.

    Made by `compress`, by `load_file`, or of parts that were made elsewhere:

    Parameters
    ----------
    values : array of shape (m, 2 * ceil(k / 4))
        The two values of each group in increasing column.
    meta : array of shape (ceil(m / vector), ceil(k / 32)), uint32
        The codes, a nibble a group, group 0 in the low bits.
    shape : (int, int)
        Rows and columns of the dense matrix.
    vector : int, default 1
        How many rows share a code.

    Notes
    -----
    Nothing in it changes: `values` and `meta` are copies. It can be pickled,
    and compared with ``==``, by what is stored.
    """

    __slots__ = ("_native",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: ArrayLike, meta: Any, shape: tuple[int, int], vector: int = 1) -> None:
        kept = matrix(values, "values")
        words = np.ascontiguousarray(meta)
        if words.dtype.kind not in "ui" or words.dtype.itemsize != 4 or words.ndim != 2:
            raise TypeError(f"meta is of {words.dtype} and {words.ndim} dimensions, expected uint32 and 2")
        words = words.astype(words.dtype.newbyteorder("="), copy=False).view(np.uint32)
        self._native = _native.Sparse24.from_parts((shape[0], shape[1]), vector, kept.data, kept.dtype, words)

    @classmethod
    def _of(cls, native: Any) -> Sparse24:
        made = cls.__new__(cls)
        made._native = native
        return made

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the dense matrix."""
        return self._native.shape

    @property
    def vector(self) -> int:
        """How many consecutive rows share a pattern."""
        return self._native.vector

    @property
    def dtype(self) -> str:
        """``"float32"``, ``"float16"`` or ``"bfloat16"``."""
        return NAMES[self._native.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        return self._native.nbytes

    @property
    def values(self) -> np.ndarray[Any, Any]:
        """A copy of the kept values, as a numpy array."""
        return made(self._native.values, self._native.dtype, "numpy")

    @property
    def meta(self) -> np.ndarray[Any, Any]:
        """A copy of the codes."""
        return self._native.meta

    def decompress(self, framework: Framework = "numpy") -> ArrayLike:
        """See `sparse24.decompress`."""
        return decompress(self, framework)

    def with_vector(self, vector: int | None = None) -> Sparse24:
        """The same matrix with codes shared by `vector` rows, or by the most that can share them.

        Raises
        ------
        ValueError
            If so many rows have no pattern in common.
        """
        return Sparse24._of(self._native.with_vector(vector))

    def to_layout(self, layout: str, framework: Framework = "numpy") -> dict[str, Any]:
        """The tensors in which another program keeps this matrix.

        Parameters
        ----------
        layout : {"native", "dense", "bitmask", "cutlass"}
            ``"bitmask"`` is `sparse-24-bitmask` of compressed-tensors:
            ``compressed``, ``bitmask`` and ``shape``. ``"cutlass"`` is torch's
            `SparseSemiStructuredTensorCUTLASS` and CUTLASS: ``values`` and the
            reordered ``meta``, for float16 and bfloat16.
        framework : {"numpy", "torch"}, default "numpy"
            Whose arrays are wanted.

        Returns
        -------
        dict of str to array
        """
        tensors = {}
        for name, dtype, shape, data in self._native.encode(layout):
            name = name or "dense"
            if dtype in _FILE_DTYPES:
                short = _FILE_DTYPES[dtype]
                typed = data.view(np.float32 if short == "f32" else np.uint16).reshape(shape)
                tensors[name] = made(typed, short, framework)
                continue
            typed = data.view(_INTEGERS[dtype]).reshape(shape)
            if framework == "torch":
                import torch

                # torch computes little with unsigned 32 bits.
                typed = torch.from_numpy(typed.view(np.int32) if dtype == "U32" else typed)
            tensors[name] = typed
        return tensors

    @classmethod
    def from_layout(
        cls, layout: str, tensors: dict[str, Any], shape: tuple[int, int] | None = None, vector: int = 1
    ) -> Sparse24:
        """The inverse of `to_layout`.

        Parameters
        ----------
        layout : {"native", "dense", "bitmask", "cutlass"}
            How the matrix lies in `tensors`.
        tensors : dict of str to array
            By the names of `to_layout`. The ``shape`` of a bitmask may be left
            out.
        shape : (int, int), optional
            Rows and columns of the dense matrix. Unless given as many columns
            as the values have room for.
        vector : int, default 1
            How many rows share a pattern.

        Raises
        ------
        ValueError
            If the parts do not fit each other or are not 2:4.
        """
        names = {
            "native": ("values", "meta"),
            "dense": ("dense",),
            "bitmask": ("compressed", "bitmask"),
            "cutlass": ("values", "meta"),
        }.get(layout)
        if names is None:
            raise ValueError(f"layout {layout!r} is not native, dense, bitmask or cutlass")
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"the layout {layout} has a tensor {missing[0]!r}, which is not given")
        values = matrix(tensors[names[0]], names[0])
        if shape is None:
            m, columns = values.data.shape
            shape = (m, columns if layout == "dense" else 2 * columns)
        parts = [values.data.tobytes()]
        for name in names[1:]:
            codes = _codes(tensors[name], name)
            parts.append(codes.tobytes())
        return cls._of(_native.Sparse24.decode(layout, (shape[0], shape[1]), values.dtype, vector, parts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sparse24):
            return NotImplemented
        return self._native.equals(other._native)

    def __reduce__(self) -> Any:
        bits = self._native.values
        return _unpickled, (bits, self._native.dtype, self.meta, self.shape, self.vector)

    def __repr__(self) -> str:
        m, k = self.shape
        return f"<sparse24.Sparse24 {m} x {k}, {self.dtype}, V={self.vector}, {self.nbytes} bytes>"


#: Types of a layout's tensors that are no values.
_INTEGERS = {"U8": np.uint8, "U32": np.uint32, "I16": np.int16, "I32": np.int32, "I64": np.int64}


def _codes(array: Any, name: str) -> np.ndarray[Any, Any]:
    """Words of metadata as little-endian numpy."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise TypeError(f"{name} is on {array.device}, expected a tensor on the CPU: use {name}.cpu()")
        array = array.detach().numpy()
    codes = np.ascontiguousarray(array)
    if codes.dtype.kind not in "iu":
        raise TypeError(f"{name} is of {codes.dtype}, expected integers")
    return codes.astype(codes.dtype.newbyteorder("<"), copy=False)


def _unpickled(bits: Any, dtype: str, meta: Any, shape: tuple[int, int], vector: int) -> Sparse24:
    return Sparse24._of(_native.Sparse24.from_parts(shape, vector, bits, dtype, meta))
