"""Float32 master copies of half-precision tensors, which would otherwise round small updates away."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msf_core.distributed import is_shard, placement

# Number of values averaged at once. This bounds the extra memory, which is 19 bytes per value. On CPUs, a small number
# keeps the values in the cache; on other devices, fewer and longer kernels are faster.
CHUNK = {"cpu": 1 << 20, "else": 1 << 23}


def needs_master(dtype: torch.dtype) -> bool:
    """Return whether a dtype is floating point or complex, with less precision than float32."""
    return dtype in _WIDE


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or the tensor itself if it is not a DTensor."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


class Masters(nn.Module):
    """The float32 master of each half-precision tensor, created when it is first needed.

    Masters move to other devices with the module, but keep their dtype if the module is cast. The key of a master in
    the ``state_dict`` is the tensor's name with "/" instead of "."; loading replaces all masters with those in the
    ``state_dict``. They are not buffers, because DDP would broadcast buffers from rank 0 at every forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.values)

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint looks up each entry of a state_dict as an attribute.
        values: dict[str, Tensor] = self.__dict__.get("values", {})
        return values[name] if name in values else super().__getattr__(name)

    def of(self, name: str, f: Tensor) -> Tensor:
        """Return the master of ``f``; create a new one if there is none with its shape and dtype."""
        key, wide = name.replace(".", "/"), _WIDE[f.dtype]
        master = self.values.get(key)
        with torch.inference_mode(False):  # tensors created in inference mode cannot be updated outside of it
            if master is not None and (master.dtype, master.shape) == (wide, f.shape):
                if placement(master) != placement(f):
                    master = _placed(master, f)
            else:
                master = None
            if master is None or (master.is_meta and not f.is_meta):
                master = f.detach().to(wide)
            elif master.device != f.device:
                master = master.to(f.device)
        self.values[key] = master
        return master

    def keep(self, names: Iterable[str]) -> None:
        """Remove all masters except those with the given names."""
        kept = {name.replace(".", "/") for name in names}
        for key in list(self.values):
            if key not in kept:
                del self.values[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Masters":
        with torch.inference_mode(False):
            for key, master in list(self.values.items()):
                moved = fn(master)
                self.values[key] = moved if moved.dtype == master.dtype else master.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update((prefix + key, master) for key, master in self.values.items())

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *_: Any
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        loaded = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        with torch.inference_mode(False):
            for key, value in loaded.items():
                own = self.values.get(key)
                device = value.device if own is None or assign else own.device
                keeps = assign and not value.is_inference()
                loaded[key] = value.detach() if keeps else value.detach().to(device, copy=True)
        self.values = loaded


_WIDE = {
    dtype: torch.complex64 if dtype.is_complex else torch.float32
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and (dtype.is_floating_point or dtype.is_complex)
    and dtype.itemsize < (8 if dtype.is_complex else 4)
}


def _placed(master: Tensor, f: Tensor) -> Tensor | None:
    """Shard a master that was loaded before the target was sharded; return None if it is already sharded."""
    if is_shard(master):
        return None
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = placement(f)
    everywhere = DTensor.from_local(master.to(f.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, placements)


def average_in_float32(halves: list[Tensor], masters: list[Tensor], online: list[Tensor], weight: float) -> None:
    """Update the masters m ← m + weight·(g − m), and round them to the half-precision tensors f, in place.

    If a value of m does not round to that of f, other code has changed f, and m restarts from f.
    """
    groups: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for f, m, g in zip(halves, masters, online, strict=True):
        if f.is_complex():
            f, m, g = torch.view_as_real(f), torch.view_as_real(m), torch.view_as_real(g.to(m.dtype))
        groups.setdefault((f.device, f.dtype, g.dtype), []).append((f, m, g))
    for group in groups.values():
        most = CHUNK.get(group[0][0].device.type, CHUNK["else"])
        chunk: list[tuple[Tensor, Tensor, Tensor]] = []
        values = 0
        for triple in group:
            values += triple[0].numel()
            if chunk and values > most:
                _average_chunk(chunk, weight)
                chunk, values = [], triple[0].numel()
            chunk.append(triple)
        _average_chunk(chunk, weight)


def _average_chunk(chunk: list[tuple[Tensor, Tensor, Tensor]], weight: float) -> None:
    """Average all tensors of a chunk as one flat tensor [n], which is faster than one kernel per small tensor."""
    # Flatten in the order of f's memory, which needs no copy of f, even for channels_last.
    orders = [sorted(range(f.ndim), key=f.stride, reverse=True) for f, _, _ in chunk]
    fs, ms, gs = ([t.permute(o) for t, o in zip(side, orders, strict=True)] for side in zip(*chunk, strict=True))
    f, m, g = (torch.cat([tensor.reshape(-1) for tensor in side]) for side in (fs, ms, gs))
    m = torch.where(m.to(f.dtype) == f, m, f.float())
    m.lerp_(g.float(), weight)
    parts = [part.view(f.shape) for part, f in zip(m.split([f.numel() for f in fs]), fs, strict=True)]
    torch._foreach_copy_(ms, parts)
    torch._foreach_copy_(fs, parts)
