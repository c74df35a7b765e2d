"""Whole models of texts: encoders and language models, from their folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Union

import numpy as np

from . import _native
from ._arrays import made, short_dtype
from ._device import Device, opened

PathLike = Union[str, "os.PathLike[str]"]


def _folder(folder: PathLike) -> str:
    path = os.fspath(folder)
    if not isinstance(path, str):
        raise TypeError(f"folder is a {type(path).__name__}, expected a str or a path")
    return path


class Encoder:
    """A model that makes embeddings of texts (BERT, MPNet), dense or 2:4.

    Parameters
    ----------
    folder : path
        A folder of Hugging Face or of Sentence Transformers.
    sparsity : str, default "none"
        ``"2:4"`` or ``"V:2:4"`` prunes the dense linear layers by magnitude;
        ``"none"`` leaves them as they are.
    device : Device or str, default "auto"
        Where it computes.
    dtype : {"float32", "float16"}, default "float32"
        Of weights and activations.
    threads : int, optional
        Of the CPU device, if `device` is a name.
    weights : path, optional
        A safetensors file that is asked first for each tensor.
    prompt : str, optional
        Name of one of the model's prompts, or ``""`` for none. The model's
        default prompt unless given.

    Notes
    -----
    It is pickled as its folder and options, and opened again where it is
    unpickled. One object may be used by several threads.

    Examples
    --------
    >>> encoder = Encoder("model/minilm", sparsity="32:2:4")  # doctest: +SKIP
    >>> encoder.encode(["The cat sat on the mat.", "A cat was sitting."]).shape  # doctest: +SKIP
    (2, 384)
    """

    def __init__(
        self,
        folder: PathLike,
        sparsity: str = "none",
        *,
        device: Device | str = "auto",
        dtype: Any = "float32",
        threads: int | None = None,
        weights: PathLike | None = None,
        prompt: str | None = None,
    ) -> None:
        on = _opened_with(device, threads)
        path = _folder(folder)
        own = None if weights is None else os.fspath(weights)
        self._native = _native.Encoder(path, sparsity, on._native, short_dtype(dtype), own, prompt)
        self._device = on
        # What a pickle is made of. Another process may be in another folder.
        own = None if own is None else os.path.abspath(own)
        self._args = (os.path.abspath(path), sparsity, on, dtype, own, prompt)

    @property
    def device(self) -> Device:
        """Where it computes."""
        return self._device

    @property
    def dimension(self) -> int:
        """Features of an embedding."""
        return self._native.width

    @property
    def max_tokens(self) -> int:
        """Tokens of a text, at most; texts that have more lose their ends."""
        return self._native.max_tokens

    @property
    def prompt(self) -> str | None:
        """What is put in front of every text."""
        return self._native.prompt

    def get_sentence_embedding_dimension(self) -> int:
        """`dimension`, by the name that Sentence Transformers gives it."""
        return self._native.width

    def encode(self, texts: str | Iterable[str], batch_size: int = 32, *, convert_to_tensor: bool = False) -> Any:
        """Makes embeddings.

        Parameters
        ----------
        texts : str or iterable of str
            One text or several.
        batch_size : int, default 32
            Most texts that go through the model together. Texts are put
            together by their length, whatever their order.
        convert_to_tensor : bool, default False
            Whether torch's tensors are wanted.

        Returns
        -------
        array of shape (texts, dimension), float32
            In the order of the texts; of shape (dimension,) for one text that
            is no list.

        Raises
        ------
        TypeError
            If something is no text. The message says which.
        ValueError
            If a text has no tokens, or its activations overflow.
        """
        alone = isinstance(texts, str)
        if isinstance(texts, (bytes, bytearray)):
            raise TypeError("texts are bytes, expected str")
        listed: list[Any] = [texts] if alone else texts if type(texts) is list else list(texts)
        embeddings, _ = self._native.encode(listed, batch_size)
        if alone:
            embeddings = embeddings[0]
        return made(embeddings, "f32", "torch" if convert_to_tensor else "numpy")

    def similarity(self, a: Any, b: Any) -> np.ndarray[Any, Any]:
        """Similarities of each of `a` to each of `b`, as the model's folder says they are compared.

        Parameters
        ----------
        a : array of shape (n, dimension)
        b : array of shape (m, dimension)

        Returns
        -------
        numpy.ndarray of shape (n, m)
            Larger is more similar: distances have a minus.
        """
        a, b = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            raise ValueError(f"embeddings of shapes {a.shape} and {b.shape} have no similarity")
        kind = self._native.similarity
        if kind == "euclidean":
            squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * (a @ b.T)
            return -np.sqrt(np.maximum(squares, 0))
        if kind == "manhattan":
            return np.stack([-np.abs(b - row).sum(1) for row in a]) if len(a) else np.empty((0, len(b)), np.float32)
        if kind == "cosine":
            # A vector of zeros has no direction.
            a, b = (x / np.where(n == 0, 1, n) for x in (a, b) for n in [np.linalg.norm(x, axis=1, keepdims=True)])
        return a @ b.T

    def __reduce__(self) -> Any:
        return _encoder, self._args

    def __repr__(self) -> str:
        return f"<sparse24.Encoder {self._args[0]!r}, sparsity {self._args[1]!r}, on {self._device.name!r}>"


def _encoder(folder: str, sparsity: str, device: Device, dtype: Any, weights: Any, prompt: Any) -> Encoder:
    return Encoder(folder, sparsity, device=device, dtype=dtype, weights=weights, prompt=prompt)


def _opened_with(device: Device | str, threads: int | None) -> Device:
    if threads is None:
        return opened(device)
    if isinstance(device, Device):
        raise ValueError("threads are of a device that is opened by its name: give them to sparse24.Device")
    return Device(device, threads)


@dataclass(frozen=True)
class Generated:
    """What a language model went on with.

    Attributes
    ----------
    text : str
        The new text; ``str()`` of this object, too.
    tokens : list of int
        Its token ids, without the one that ended it.
    finish : {"eos", "max_tokens", "context", "stopped"}
        Why it ended.
    prompt_tokens : int
        Tokens of the prompt.
    prompt_seconds : float
        From the prompt to its last token's logits.
    decoded : int
        Passes after that, a token each.
    decode_seconds : float
        What they took.
    """

    text: str
    tokens: list[int] = field(repr=False)
    finish: Literal["eos", "max_tokens", "context", "stopped"]
    prompt_tokens: int
    prompt_seconds: float = field(repr=False, compare=False)
    decoded: int = field(repr=False)
    decode_seconds: float = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.text


class Generator:
    """A language model (Llama, Mistral, Qwen2, Qwen3, SmolLM), dense or 2:4.

    Parameters
    ----------
    folder : path
        A folder of Hugging Face.
    sparsity, device, dtype, threads, weights
        As of `Encoder`.

    Notes
    -----
    It is pickled as its folder and options.

    Examples
    --------
    >>> generator = Generator("model/smollm2")  # doctest: +SKIP
    >>> print(generator.generate("What is a sparse matrix?", max_tokens=40))  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: PathLike,
        sparsity: str = "none",
        *,
        device: Device | str = "auto",
        dtype: Any = "float32",
        threads: int | None = None,
        weights: PathLike | None = None,
    ) -> None:
        on = _opened_with(device, threads)
        path = _folder(folder)
        own = None if weights is None else os.fspath(weights)
        self._native = _native.Generator(path, sparsity, on._native, short_dtype(dtype), own)
        self._device = on
        own = None if own is None else os.path.abspath(own)
        self._args = (os.path.abspath(path), sparsity, on, dtype, own)

    @property
    def device(self) -> Device:
        """Where it computes."""
        return self._device

    @property
    def has_chat_template(self) -> bool:
        """Whether a prompt becomes what a user says, which the model answers."""
        return self._native.has_chat_template

    @property
    def max_tokens(self) -> int:
        """Tokens of a text, at most, the prompt included."""
        return self._native.max_tokens

    def generate(
        self,
        prompt: str,
        max_tokens: int = 128,
        *,
        system: str | None = None,
        raw: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 24,
        on_text: Callable[[str], Any] | None = None,
    ) -> Generated:
        """Goes on with a prompt.

        Parameters
        ----------
        prompt : str
            What the model is asked, or with `raw` the text that it goes on with.
        max_tokens : int, default 128
            The most new tokens.
        system : str, optional
            What the model is told before, where its chat template has a place
            for it.
        raw : bool, default False
            Whether the prompt is given as it is, without the chat template.
        temperature : float, default 0.0
            What logits are divided by before a token is drawn; at 0 the most
            likely one is taken.
        top_p : float, default 1.0
            Draws from the most likely tokens only, whose probabilities together
            reach this share.
        seed : int, default 24
            Of the draws.
        on_text : callable, optional
            Called with each new piece of text as soon as it is known. The text
            ends if it returns False.

        Returns
        -------
        Generated
        """
        return Generated(**self._native.generate(prompt, system, raw, max_tokens, temperature, top_p, seed, on_text))

    def __reduce__(self) -> Any:
        return _generator, self._args

    def __repr__(self) -> str:
        return f"<sparse24.Generator {self._args[0]!r}, sparsity {self._args[1]!r}, on {self._device.name!r}>"


def _generator(folder: str, sparsity: str, device: Device, dtype: Any, weights: Any) -> Generator:
    return Generator(folder, sparsity, device=device, dtype=dtype, weights=weights)
