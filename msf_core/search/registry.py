"""Search backends by name, which are imported when first used."""

from functools import cache
from importlib import import_module

import torch

from msf_core.search.base import SearchBackend

_CLASSES = {
    "auto": ("msf_core.search.auto", "AutoSearch"),
    "torch": ("msf_core.search.torch_backend", "TorchSearch"),
    "faiss": ("msf_core.search.faiss_backend", "FaissSearch"),
    "triton": ("msf_core.search.triton_backend", "TritonSearch"),
}
_REMEDY = {
    "faiss": "pip install 'msf_core[faiss-gpu]' (Linux x86-64, CPU and CUDA) or 'msf_core[faiss-cpu]'",
    "triton": "PyTorch for CUDA on Linux includes Triton; elsewhere, pip install triton if your platform has it",
}


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Return which search backends work here, and why the others do not.

    Args:
        device: the bank's device; by default "cuda" if it is available, else "cpu".

    Returns:
        A dict that maps each name to None if the backend works, else to the reason and how to fix it.

    Raises:
        ValueError: if PyTorch has no such device.

    >>> available_backends("cpu")["torch"] is None
    True
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device_type = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device must be a PyTorch device, got {device!r}") from error
    return {name: why_not(name, device_type) for name in _CLASSES if name != "auto"}


def load_backend(name: str, device: torch.device | None = None) -> SearchBackend:
    """Return the backend with this name, for tensors on ``device`` if one is given.

    Raises:
        ValueError: if no backend has this name.
        ImportError: if the backend is not installed, cannot be imported, or does not support the device. The message
            says how to fix it.
    """
    if name not in _CLASSES:
        raise ValueError(f"unknown search backend {name!r}; known: {', '.join(map(repr, _CLASSES))}")
    backend, reason = _try_load(name)
    if device is not None:
        reason = why_not(name, device.type)
    if backend is None or reason is not None:
        raise ImportError(f"search backend {name!r} does not work here: {reason}")
    return backend


def find_backend(backend: str | SearchBackend, device: torch.device) -> SearchBackend:
    """Return the backend for a ``backend=`` argument ("auto", a name, or an object) on a device.

    Raises:
        ValueError, ImportError: as in `load_backend`.
        TypeError: if an object has no ``topk``.
    """
    if not isinstance(backend, str):
        if isinstance(backend, type) or not isinstance(backend, SearchBackend):
            raise TypeError(f"backend must be a name or have a method topk(queries, rows, k), got {backend!r}")
        return backend
    return load_backend(backend, device)


def check_anywhere(backend: str | SearchBackend, device: torch.device | str | int | None) -> None:
    """Raise unless the backend works on the device or, if the device is None or meta, on the CPU or on CUDA.

    Raises:
        ValueError, ImportError, TypeError: as in `find_backend`.
    """
    if device is not None and (asked := torch.device(device)).type != "meta":
        find_backend(backend, asked)
        return
    try:
        find_backend(backend, torch.device("cpu"))
    except ImportError:
        if not torch.cuda.is_available():
            raise
        find_backend(backend, torch.device("cuda"))


def check_backend(backend: str | SearchBackend, device: torch.device, k: int) -> None:
    """Raise unless the backend for a ``backend=`` argument can find k neighbors on a device.

    Raises:
        ValueError, ImportError, TypeError: as in `find_backend`; also ValueError if k is larger than the backend
            supports.
    """
    most = most_neighbors(find_backend(backend, device), device.type)
    if most is not None and k > most:
        raise ValueError(f"k must be at most {most} for this backend on {device}, got {k}")


def most_neighbors(backend: SearchBackend, device_type: str) -> int | None:
    """Return the largest k that a backend supports on a type of device, or None if there is no limit."""
    most: int | None = getattr(backend, "most_neighbors", {}).get(device_type)
    return most


# The same as torch.compiler.assume_constant_result, but without importing the compiler, which takes seconds:
# torch.compile calls the function once, while tracing.
check_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(name: str, device_type: str) -> str | None:
    """Return None if a backend works on this type of device here, else the reason and how to fix it."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    backend, reason = _try_load(name)
    if backend is None:
        return reason
    why = getattr(backend, "why_not", None)
    return why(device_type) if why else None


@cache
def _try_load(name: str) -> tuple[SearchBackend | None, str | None]:
    module, class_name = _CLASSES[name]
    try:
        return getattr(import_module(module), class_name)(), None
    except Exception as error:  # a broken binary package fails in more ways than ImportError
        return None, f"{type(error).__name__}: {error}; {_REMEDY.get(name, '')}"
