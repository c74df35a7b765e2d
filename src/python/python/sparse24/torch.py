"""2:4 layers in torch's modules, for inference on the CPU's side of torch.

A product is computed by sparse24's own device, which may be a GPU that torch
knows nothing of; activations come from and go to tensors on the CPU. Nothing
here is differentiated.

Examples
--------
>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8))
>>> model = sparsify_(model, device="cpu")
>>> with torch.inference_mode():
...     model(torch.ones(2, 64)).shape
torch.Size([2, 8])
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._device import Device, opened
from ._linear import Linear
from ._sparse import Sparse24, compress, prune, vector_of

__all__ = ["SparseLinear", "from_semi_structured", "sparsify_", "to_semi_structured"]

#: Rows of inputs that are kept of a layer to decide by: as many as make a Gram matrix of thousands of features.
_CALIBRATION_ROWS = 8192


class SparseLinear(nn.Module):
    """`torch.nn.Linear` with 2:4 weights, for inference.

    Parameters
    ----------
    w : Sparse24
        Weights, [out features, in features].
    bias : torch.Tensor of shape (m,), optional
        What is added.
    device : sparse24.Device or str, default "auto"
        Where products are computed.
    dense_fallback : bool, default True
        Whether dense weights may take the place of 2:4 ones where the planner
        does not expect 2:4 to be faster.

    Notes
    -----
    The buffers `values` and `meta` are the compressed matrix, so that
    ``state_dict``, ``copy.deepcopy``, pickling and ``.half()`` work. Weights of
    a `state_dict` must have the same vector length.
    """

    def __init__(
        self,
        w: Sparse24,
        bias: torch.Tensor | None = None,
        *,
        device: Device | str = "auto",
        dense_fallback: bool = True,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = w.shape
        self.vector = w.vector
        self.device = device
        self.dense_fallback = dense_fallback
        parts = w.to_layout("native", "torch")
        self.register_buffer("values", parts["values"])
        self.register_buffer("meta", parts["meta"])
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._linear: tuple[list[torch.Tensor], list[int], Linear] | None = None

    @property
    def sparse24(self) -> Sparse24:
        """The compressed weights."""
        return Sparse24.from_layout(
            "native",
            {"values": self.values, "meta": self.meta},
            (self.out_features, self.in_features),
            self.vector,
        )

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weights."""
        return self.sparse24.decompress("torch")

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies.

        Raises
        ------
        RuntimeError
            If the gradient of `x` is asked for, which there is none of.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("SparseLinear has no gradient: run it under torch.inference_mode() or torch.no_grad()")
        return self._native()(x)

    def _native(self) -> Linear:
        # Loading a state and converting the module write into buffers or replace them.
        parts = [part for part in (self.values, self.meta, self.bias) if part is not None]
        versions = [_version(part) for part in parts]
        kept = self._linear
        same = kept is not None and len(kept[0]) == len(parts) and all(map(operator.is_, kept[0], parts))
        if kept is None or not same or kept[1] != versions:
            linear = Linear(self.sparse24, self.bias, device=self.device, dense_fallback=self.dense_fallback)
            # With the tensors, whose memory then is not given to others.
            self._linear = kept = (parts, versions, linear)
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        # What is on a device is made again where it is needed.
        return {**self.__dict__, "_linear": None}

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, V={self.vector}"
        )


def _version(tensor: torch.Tensor) -> int:
    # Those made in inference mode have none, and cannot be written into elsewhere.
    return 0 if tensor.is_inference() else tensor._version


def sparsify_(
    module: nn.Module,
    pattern: str = "2:4",
    vector: int = 1,
    method: str = "magnitude",
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    calibrate: Callable[[nn.Module], Any] | None = None,
    device: Device | str = "auto",
    dense_fallback: bool = True,
) -> nn.Module:
    """Replaces the `torch.nn.Linear` layers of a module by 2:4 ones, in place, for inference.

    Parameters
    ----------
    module : torch.nn.Module
        What is changed.
    pattern, vector, method
        As of `sparse24.prune`. Weights that are 2:4 already stay as they are,
        but by ``"sparsegpt"``. Masks of `torch.nn.utils.prune` are applied,
        parametrizations computed, and weights of
        `torch.sparse.to_sparse_semi_structured` taken over.
    include, exclude : str or sequence of str
        Patterns of layers' names, as of `fnmatch`. A layer is replaced if one
        of the first and none of the second matches.
    calibrate : callable, optional
        Called with the module, which it runs on text like the user's, for the
        methods that need inputs. The first 8192 inputs of each layer count.
    device, dense_fallback
        As of `SparseLinear`.

    Returns
    -------
    torch.nn.Module
        The same module; if it is a `torch.nn.Linear` itself, what replaces it.

    Notes
    -----
    Weights that belong to several modules stay as they are, and so do layers of
    subclasses, such as that within `torch.nn.MultiheadAttention`.

    Raises
    ------
    ValueError
        If no layer matches, with the module unchanged. An error of a layer has
        its name.
    """
    included, excluded = ([p] if isinstance(p, str) else list(p) for p in (include, exclude))
    rows = vector_of(pattern, vector)

    def chosen(name: str) -> bool:
        match = lambda patterns: any(fnmatch.fnmatchcase(name, p) for p in patterns)
        return match(included) and not match(excluded)

    layers = {name: layer for name, layer in _linears(module) if chosen(name)}
    if not layers:
        raise ValueError("no torch.nn.Linear of the module is selected")
    inputs = _inputs(module, layers, calibrate) if calibrate is not None else {}
    on = opened(device)
    # All are made before any is replaced, so that an error leaves the module as it was.
    made = {}
    for name, layer in layers.items():
        try:
            made[name] = _sparse(layer, rows, method, inputs.get(name), on, dense_fallback)
        except (TypeError, ValueError) as e:
            raise type(e)(f"{name or 'the layer'}: {e}") from None
    for name, layer in made.items():
        if not name:
            return layer
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, layer)
    return module


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that can be replaced."""
    # By name: a layer that two names lead to would be replaced at one of them.
    owners: dict[int, int] = {}
    for _, part in module.named_modules(remove_duplicate=False):
        for parameter in part.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, part in module.named_modules():
        if type(part) is not nn.Linear and not (parametrize.is_parametrized(part, "weight") and _is_linear(part)):
            continue
        if all(owners[id(parameter)] == 1 for parameter in part.parameters(recurse=False)):
            yield name, part


def _is_linear(part: nn.Module) -> bool:
    # A parametrized module is of a class of its own, below that which it had.
    return nn.Linear in type(part).__bases__


def _weights(layer: nn.Linear) -> torch.Tensor | Sparse24:
    """The weights of a layer, with its mask."""
    if hasattr(layer, "weight_orig") and hasattr(layer, "weight_mask"):
        return (layer.weight_orig * layer.weight_mask).detach()
    weight = layer.weight.detach()
    if _is_semi_structured(weight):
        return from_semi_structured(weight)
    return weight


def _sparse(
    layer: nn.Linear, vector: int, method: str, inputs: Any, device: Device, dense_fallback: bool
) -> SparseLinear:
    w = _weights(layer)
    if isinstance(w, Sparse24):
        s = w
    else:
        s = compress(prune(w, vector=vector, method=method, inputs=inputs), vector)
    made = SparseLinear(s, layer.bias, device=device, dense_fallback=dense_fallback)
    return made.train(layer.training)


def _inputs(
    module: nn.Module, layers: dict[str, nn.Linear], calibrate: Callable[[nn.Module], Any]
) -> dict[str, torch.Tensor]:
    """The inputs of layers while the module is run."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            room = _CALIBRATION_ROWS - sum(len(x) for x in seen[name])
            if room > 0:
                seen[name].append(given[0].detach().reshape(-1, given[0].shape[-1])[:room].float().cpu())

        return keep

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            calibrate(module)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}


def _is_semi_structured(tensor: torch.Tensor) -> bool:
    from torch.sparse import SparseSemiStructuredTensor

    return isinstance(tensor, SparseSemiStructuredTensor)


def from_semi_structured(tensor: torch.Tensor) -> Sparse24:
    """The matrix of torch's `SparseSemiStructuredTensor`.

    Parameters
    ----------
    tensor : torch.sparse.SparseSemiStructuredTensor
        As `torch.sparse.to_sparse_semi_structured` makes it. CUTLASS's form is
        taken over value for value and code for code; cuSPARSELt's, which NVIDIA
        does not document, goes through a dense matrix on its GPU.

    Returns
    -------
    Sparse24
    """
    if not _is_semi_structured(tensor):
        raise TypeError(f"expected a SparseSemiStructuredTensor, not a {type(tensor).__name__}")
    packed, meta = tensor.packed, tensor.meta
    if packed is None or meta is None:
        return compress(tensor.to_dense().cpu(), 1)
    m, k = tensor.shape
    return Sparse24.from_layout("cutlass", {"values": packed.cpu(), "meta": meta.cpu()}, (m, k))


def to_semi_structured(s: Sparse24, device: Any = "cpu") -> torch.Tensor:
    """torch's `SparseSemiStructuredTensor` of a matrix, in CUTLASS's form.

    Parameters
    ----------
    s : Sparse24
        Of float16 or bfloat16, its rows and columns multiples of 32.
    device : torch.device or str, default "cpu"
        Where torch is to have it. torch multiplies by it on NVIDIA's GPUs only.

    Returns
    -------
    torch.sparse.SparseSemiStructuredTensor
    """
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    parts = s.to_layout("cutlass", "torch")
    return SparseSemiStructuredTensorCUTLASS(
        torch.Size(s.shape), parts["values"].to(device), parts["meta"].to(device), None, None, None
    )
