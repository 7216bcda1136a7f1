"""Float32 values behind tensors of half precision, in which small steps would be rounded away."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msf_core.distributed import is_shard, placement

# How many values are averaged together, which bounds what this needs on top: 19 bytes for each. On CPUs they stay in
# the cache; elsewhere fewer, longer kernels are faster.
CHUNK = {"cpu": 1 << 20, "else": 1 << 23}


def needs_master(dtype: torch.dtype) -> bool:
    """Tell whether a dtype is floating, or complex, with less than float32's precision."""
    return dtype in _WIDE


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, or the tensor if it is none."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


class Masters(nn.Module):
    """The float32 values, a buffer for each tensor, under its name with "/" for ".".

    A buffer is made when it is first asked for. It goes to devices with the module, and is never cast with it. A
    ``state_dict`` of any tensors loads.
    """

    def of(self, name: str, f: Tensor) -> Tensor:
        """Return the master of ``f``: the one there is, if it fits, else a new one."""
        key, wide = name.replace(".", "/"), _WIDE[f.dtype]
        master = self._buffers.get(key)
        if master is not None and (master.dtype, master.shape) == (wide, f.shape):
            if placement(master) != placement(f):
                master = _placed(master, f)
        else:
            master = None
        if master is None or (master.is_meta and not f.is_meta):
            with torch.inference_mode(False):  # tensors made in that mode could never be updated outside of it
                master = f.detach().to(wide)
        elif master.device != f.device:
            master = master.to(f.device)
        self._buffers[key] = master
        return master

    def keep(self, names: Iterable[str]) -> None:
        """Forget all others."""
        kept = {name.replace(".", "/") for name in names}
        for key in list(self._buffers):
            if key not in kept:
                del self._buffers[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Masters":
        for key, master in list(self._buffers.items()):
            assert master is not None
            moved = fn(master)
            self._buffers[key] = moved if moved.dtype == master.dtype else master.to(moved.device)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *_: Any
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        loaded = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        for key, value in loaded.items():
            own = self._buffers.get(key)
            device = value.device if own is None or assign else own.device
            loaded[key] = value.detach() if assign else value.detach().to(device, copy=True)
        self._buffers.clear()
        self._buffers.update(loaded)


_WIDE = {
    dtype: torch.complex64 if dtype.is_complex else torch.float32
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and (dtype.is_floating_point or dtype.is_complex)
    and dtype.itemsize < (8 if dtype.is_complex else 4)
}


def _placed(master: Tensor, f: Tensor) -> Tensor | None:
    """Return the shard of a master that was loaded before the target was sharded."""
    if is_shard(master):
        return None
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = placement(f)
    everywhere = DTensor.from_local(master.to(f.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, placements)


def average_in_float32(halves: list[Tensor], masters: list[Tensor], online: list[Tensor], weight: float) -> None:
    """Move masters m ← m + weight·(g − m), and round them to the halves f, in place.

    Where m does not round to f, somebody has changed f since, and m starts there again.
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
    """Average tensors as one long row of values [n], since a kernel for each of many small ones takes longer."""
    # In the order of f's memory: then this permutes without copying, and channels_last costs nothing.
    orders = [sorted(range(f.ndim), key=f.stride, reverse=True) for f, _, _ in chunk]
    fs, ms, gs = ([t.permute(o) for t, o in zip(side, orders, strict=True)] for side in zip(*chunk, strict=True))
    f, m, g = (torch.cat([tensor.reshape(-1) for tensor in side]) for side in (fs, ms, gs))
    m = torch.where(m.to(f.dtype) == f, m, f.float())
    m.lerp_(g.float(), weight)
    parts = [part.view(f.shape) for part, f in zip(m.split([f.numel() for f in fs]), fs, strict=True)]
    torch._foreach_copy_(ms, parts)
    torch._foreach_copy_(fs, parts)
