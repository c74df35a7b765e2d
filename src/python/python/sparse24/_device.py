"""Devices: where products are computed."""

from __future__ import annotations

from typing import Any

from . import _native


class Device:
    """A GPU that wgpu reaches, or this process's CPU.

    Parameters
    ----------
    name : str, default "auto"
        ``"auto"`` takes the first GPU that is no software, or else the CPU;
        ``"cpu"`` takes the CPU; anything else is a part of a GPU's name.
    threads : int, optional
        Threads of the CPU device, and of what the host computes beside it. One
        for each core unless given.

    Raises
    ------
    ValueError
        If there is no such device. The message lists those that there are.

    Examples
    --------
    >>> Device("cpu", threads=1).threads
    1
    """

    __slots__ = ("_native",)

    def __init__(self, name: str = "auto", threads: int | None = None) -> None:
        self._native = _native.Device(name, threads)

    @property
    def name(self) -> str:
        """Name of the hardware."""
        return self._native.name

    @property
    def kind(self) -> str:
        """``"cpu"``, or of a GPU ``"discrete"``, ``"integrated"``, ``"virtual"``, ``"software"`` or ``"other"``."""
        return self._native.kind

    @property
    def threads(self) -> int | None:
        """Threads of the CPU device; None for a GPU."""
        return self._native.threads

    def __reduce__(self) -> Any:
        return Device, self._native.asked

    def __repr__(self) -> str:
        return f"<sparse24.Device {self.name!r}, {self.kind}>"


_opened: dict[str, Device] = {}


def opened(device: Device | str) -> Device:
    """The device that a user asked for; by the same name always the same one."""
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise TypeError(f"device is a {type(device).__name__}, expected a name or a sparse24.Device")
    if device not in _opened:
        _opened[device] = Device(device)
    return _opened[device]


def devices() -> list[dict[str, str]]:
    """Every device of this machine.

    Returns
    -------
    list of dict
        ``name`` and ``kind`` of each, the CPU first.
    """
    return [{"name": name, "kind": kind} for name, kind in _native.device_names()]
