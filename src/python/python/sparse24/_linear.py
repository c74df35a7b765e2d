"""A layer that multiplies by 2:4 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _native
from ._arrays import NAMES, given, made, matrix
from ._device import Device, opened
from ._sparse import Sparse24

if TYPE_CHECKING:
    from ._arrays import ArrayLike


class Linear:
    """A linear layer, ``y = activation(x @ w.T + bias)``, on a device.

    Parameters
    ----------
    w : Sparse24 or array of shape (m, k)
        Weights, [out features, in features]. An array stays dense.
    bias : array of shape (m,), optional
        What is added.
    activation : {"relu", "relu6", "gelu", "gelu_tanh", "silu"}, optional
        What is applied.
    device : Device or str, default "auto"
        Where it computes.
    dense_fallback : bool, default True
        Whether dense weights may take the place of 2:4 ones where the planner
        does not expect 2:4 to be faster.

    Notes
    -----
    float32 weights take float32 activations, float16 ones float16. bfloat16 is
    widened to float32 for both. Several threads may call a layer; they take
    turns. Its operands stay bound for the last four numbers of tokens. It can be
    pickled, for which it keeps the weights that it was made of.

    Examples
    --------
    >>> layer = Linear(np.eye(4, dtype=np.float32), np.ones(4, np.float32), device="cpu")
    >>> layer(np.zeros((1, 4), np.float32))
    array([[1., 1., 1., 1.]], dtype=float32)
    """

    __slots__ = ("_activation", "_args", "_forward", "_native")

    def __init__(
        self,
        w: Sparse24 | ArrayLike,
        bias: ArrayLike | None = None,
        activation: str | None = None,
        *,
        device: Device | str = "auto",
        dense_fallback: bool = True,
    ) -> None:
        weights: Any
        if isinstance(w, Sparse24):
            weights, dtype = w._native, w._native.dtype
        else:
            taken = matrix(w, "w")
            weights, dtype = taken.data, taken.dtype
        if bias is not None:
            added = given(bias, "bias")
            if added.data.ndim != 1:
                raise ValueError(f"bias has {added.data.ndim} dimensions, expected 1")
            bias = np.ascontiguousarray(_widened(added.data, added.dtype))
        on = opened(device)
        self._activation = activation
        self._native = _native.Linear(on._native, weights, dtype, bias, activation or "none", dense_fallback)
        self._forward = self._native.forward
        # What a pickle is made of.
        self._args = (w, bias, on, dense_fallback)

    @property
    def in_features(self) -> int:
        """Features of an input."""
        return self._native.shape[1]

    @property
    def out_features(self) -> int:
        """Features of an output."""
        return self._native.shape[0]

    @property
    def dtype(self) -> str:
        """Type of the activations that it takes."""
        return NAMES[self._native.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of its weights on the device: none before the first call."""
        return self._native.nbytes

    def __call__(self, x: ArrayLike) -> ArrayLike:
        """Multiplies.

        Parameters
        ----------
        x : array of shape (..., k)
            Activations, of numpy or torch.

        Returns
        -------
        array of shape (..., m)
            Of the same library and type.
        """
        taken = given(x, "x")
        data = taken.data
        shape = data.shape
        if len(shape) == 2:
            return made(self._forward(data, taken.dtype), taken.dtype, taken.framework)
        if not shape:
            raise ValueError("x has 0 dimensions, expected 1 or more")
        flat = data.reshape(-1, shape[-1]) if data.size else data.reshape(int(np.prod(shape[:-1])), shape[-1])
        y = self._forward(flat, taken.dtype)
        return made(y.reshape(*shape[:-1], y.shape[1]), taken.dtype, taken.framework)

    def explain(self, tokens: int) -> str:
        """Which kernel would take so many tokens, and why."""
        return self._native.explain(tokens)

    def __reduce__(self) -> Any:
        w, bias, device, dense_fallback = self._args
        return _unpickled, (w, bias, self._activation, device, dense_fallback)

    def __repr__(self) -> str:
        m, k = self._native.shape
        return f"<sparse24.Linear {k} -> {m}, {self._activation or 'no activation'}>"


def _widened(data: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The numbers as float32."""
    if dtype == "f32":
        return data
    if dtype == "f16":
        return data.view(np.float16).astype(np.float32)
    # bfloat16 is the upper half of a float32.
    return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _unpickled(w: Any, bias: Any, activation: str | None, device: Device, dense_fallback: bool) -> Linear:
    return Linear(w, bias, activation, device=device, dense_fallback=dense_fallback)
