"""The collectives of a bank that several ranks share.

In every shared call, the ranks first exchange headers of 88 bytes between their CPUs. A header contains the rank's
number of rows, so that no GPU has to be synchronized, and whether the rank has failed. If one has failed, all ranks
raise an error instead of waiting. Rows on CPUs are sent with the header, so that a call takes one exchange. The space
for them is chosen from the sizes in the last calls; a call with more rows takes a second exchange.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, ImportError, OSError, RuntimeError)
_AVAILABLE = dist.is_available()
_NUMBERS = 11
_HEADER_BYTES = 8 * _NUMBERS
MOST_FRAME_BYTES = 4 << 20  # maximum space for rows after a header; above it, bandwidth matters more than latency
# For each group without a backend for CPUs (NCCL only), a gloo group for its headers.
_host_groups: "WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = WeakKeyDictionary()
# The largest number of bytes from one rank in each of the last calls of a group. A message has space for the maximum of
# them. These numbers are the same on all ranks, so a rank that fails, or makes another call, sends as many bytes as the
# others.
_last_sizes: "WeakKeyDictionary[dist.ProcessGroup, deque[int]]" = WeakKeyDictionary()
Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """Exclude a function from `torch.compile`, like torch.compiler.disable, but without importing the compiler."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


class Ranks:
    """The ranks of a process group; None is the default group, which is looked up at each call.

    Raises:
        TypeError: if ``group`` is not a process group.
        ValueError: if this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        if group is not None:
            if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("group must have this process among its ranks")
            if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
                raise TypeError(f"group must be a torch.distributed process group or None, got {group!r}")
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self  # a group cannot be copied

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError("a bank with a group cannot be pickled: save its state_dict instead")
        return Ranks, ()

    @property
    def size(self) -> int:
        """Number of ranks; 1 while torch.distributed is not initialized."""
        return dist.get_world_size(self.group) if _AVAILABLE and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    @untraced
    def agree(
        self, call: str, *, same: dict[str, int | str], count: int = 0, problem: Exception | None = None
    ) -> list[int]:
        """Check that all ranks are in the same call and none has a problem; return every rank's ``count``.

        Args:
            call: the name of this rank's call.
            same: at most eight values by name, each a number or a word of at most 8 ASCII letters, that must be the
                same on all ranks.
            count: a number that may differ between ranks.
            problem: the error of this rank, if there is one.

        Raises:
            Exception: ``problem`` on this rank, and on the other ranks an error of the same type (one of `ERRORS`) that
                names this rank. ValueError if ``same`` differs, RuntimeError if the calls differ.
        """
        return self._agree(call, same, count, problem)[0]

    @untraced
    def bring(self, call: str, rows: Tensor, *, same: dict[str, int | str]) -> tuple[Tensor, list[int]]:
        """Check the call like `agree`, and gather the rows of all ranks; on CPUs, this takes one exchange.

        Args:
            call: as in `agree`.
            rows: [B, …]. B may differ between ranks; the other dimensions and the dtype must be the same.
            same: as in `agree`.

        Returns:
            The unchanged rows [Σ B, …] in rank order, and each rank's B.
        """
        if rows.device.type != "cpu":
            counts = self.agree(call, same=same, count=len(rows))
            return self.gather(rows, counts), counts
        payload = _packed(rows).view(-1).view(torch.uint8)
        counts, frames = self._agree(call, same, len(rows), None, payload)  # frames [W, room]
        row_bytes = rows.element_size() * rows.shape[1:].numel()
        most = max(counts) * row_bytes
        _sizes_of(self._host_group())[-1] = most if most <= MOST_FRAME_BYTES else 0
        if most > frames.shape[1]:
            return self.gather(rows, counts), counts
        parts = [frame[: count * row_bytes] for frame, count in zip(frames, counts, strict=True)]
        return torch.cat(parts).view(rows.dtype).view(-1, *rows.shape[1:]), counts

    @contextmanager
    def sharing_errors(self, call: str) -> Iterator[None]:
        """If the block raises an error, also raise it on the other ranks, which wait in `agree`."""
        try:
            yield
        except ERRORS as error:
            self.agree(call, same={}, problem=error)
            raise

    @untraced
    def gather(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """Gather rows from all ranks in rank order, unchanged: [counts[rank], …] here, [Σ counts, …] in the result."""
        most = max(counts)
        if most == 0:
            return tensor
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        rows = padded.flatten(1) if tensor.ndim > 1 else padded[:, None]
        everything = rows.new_empty(self.size * most, rows.shape[1])
        # The name in PyTorch 2.14 and newer, else the older name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(everything.view(torch.uint8), rows.view(torch.uint8), group=self.group)
        parts = [everything[rank * most : rank * most + count] for rank, count in enumerate(counts)]
        return torch.cat(parts).view(-1, *tensor.shape[1:])

    @untraced
    def exchange(
        self, call: str, parts: Sequence[Tensor], counts: list[int], problem: Exception | None = None
    ) -> list[Tensor]:
        """Send every rank the answers to its rows, and return the answers to this rank's rows.

        Args:
            call: as in `agree`.
            parts: the answers, [Σ counts, …] each, in rank order. A rank with a problem passes tensors of the same
                shape with arbitrary values.
            counts: number of rows of every rank.
            problem: the error of this rank, if there is one.

        Returns:
            For each part, the answers of all W ranks, [W, counts[own rank], …].

        Raises:
            Exception: as in `agree`.
        """
        own = counts[self.rank]
        packed = joined_bytes(parts)  # [Σ counts, bytes]
        width = packed.shape[1]
        if packed.device.type == "cpu":  # the header goes with the answers
            header = _header(call, {}, 0, problem)
            blocks = [torch.cat([header, block.flatten()]) for block in packed.split(counts)]
            sizes = [len(block) for block in blocks]
            received = packed.new_empty(self.size, _HEADER_BYTES + own * width)
            with _naming_who_is_missing(call):
                dist.all_to_all_single(
                    received.view(-1), torch.cat(blocks), [received.shape[1]] * self.size, sizes, self._host_group()
                )
            self._check_headers(received[:, :_HEADER_BYTES], call, {}, problem)
            answers = received[:, _HEADER_BYTES:].reshape(self.size * own, width)
        else:
            self._agree(call, {}, 0, problem)
            answers = packed.new_empty(self.size * own, width)
            if sum(counts):
                dist.all_to_all_single(answers, packed, [own] * self.size, counts, group=self.group)
        return [part.view(self.size, own, *part.shape[1:]) for part in split_bytes(answers, parts)]

    def _agree(
        self,
        call: str,
        same: dict[str, int | str],
        count: int,
        problem: Exception | None,
        payload: Tensor | None = None,
    ) -> tuple[list[int], Tensor]:
        """Do what `agree` does, and return the counts and the bytes sent after the headers, [W, room]."""
        sizes = _sizes_of(self._host_group())
        message = torch.zeros(_HEADER_BYTES + max(sizes), dtype=torch.uint8, device="cpu")
        message[:_HEADER_BYTES] = _header(call, same, count, problem)
        if payload is not None and _HEADER_BYTES + len(payload) <= len(message):
            message[_HEADER_BYTES : _HEADER_BYTES + len(payload)] = payload
        with _naming_who_is_missing(call):
            everything = self._gather_from_hosts(message)
        counts = self._check_headers(everything[:, :_HEADER_BYTES], call, same, problem)
        sizes.append(0)
        return counts, everything[:, _HEADER_BYTES:]

    def _check_headers(
        self, headers: Tensor, call: str, same: dict[str, int | str], problem: Exception | None
    ) -> list[int]:
        """Return every rank's count from the headers [W, bytes], or raise the errors of `agree`."""
        table = headers.contiguous().view(torch.int64).tolist()
        failed = {rank: (ERRORS[row[1] - 1], row[2]) for rank, row in enumerate(table) if row[1]}
        if failed:
            self._raise_everywhere(problem, failed)
        if len({row[0] for row in table}) > 1:
            raise RuntimeError(f"all ranks must make the same calls in the same order, got {_listed(table, 0, call)}")
        for column, (name, value) in enumerate(same.items(), start=3):
            if len({row[column] for row in table}) > 1:
                raise ValueError(f"{name} must be the same on all ranks, got {_listed(table, column, value)}")
        return [row[2] for row in table]

    def _gather_from_hosts(self, own: Tensor) -> Tensor:
        """Gather tensors [n] of all ranks to [W, n], in one round trip; gloo's all_gather would take W − 1."""
        everything = own.new_empty(self.size, len(own))
        dist.all_to_all_single(everything.view(-1), own.repeat(self.size), group=self._host_group())
        return everything

    def _host_group(self) -> Any:
        group = self.group if self.group is not None else dist.group.WORLD
        assert group is not None
        if "cpu:" in dist.get_backend_config(group):
            return group
        if group not in _host_groups:
            members = dist.get_process_group_ranks(group)
            hosts: Any = dist.new_group(members, backend="gloo", use_local_synchronization=True)
            _host_groups[group] = hosts
        return _host_groups[group]

    def _raise_everywhere(self, problem: Exception | None, failed: dict[int, tuple[type[Exception], int]]) -> NoReturn:
        """Raise an error on all ranks. ``failed`` maps each failed rank to the type and message length of its error."""
        text = _text_of(problem)
        padded = bytearray(text.ljust(max(length for _, length in failed.values())))
        texts = self._gather_from_hosts(torch.frombuffer(padded, dtype=torch.uint8)) if padded else None
        if problem is not None:
            raise problem
        rank, (kind, length) = next(iter(failed.items()))
        said = "" if texts is None else bytes(texts[rank, :length].tolist()).decode(errors="surrogatepass")
        raise kind(f"rank {rank}: {said}")


@contextmanager
def _naming_who_is_missing(call: str) -> Iterator[None]:
    """Explain a communication error of the backend, whose message is only about sockets or timeouts."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"not all ranks came to this {call} of a shared bank: {error}\n"
            "A rank has exited, or makes fewer calls than the others. For uneven inputs, use drop_last=True, "
            "layout='local' or DDP.join(throw_on_early_termination=True); DDP.join() alone does not cover the bank."
        ) from error


def _sizes_of(group: Any) -> "deque[int]":
    return _last_sizes.setdefault(group, deque([0], maxlen=8))


def joined_bytes(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the bytes of tensors [B, …] row by row to [B, bytes] uint8."""
    lines = (part.flatten(1) if part.ndim > 1 else part[:, None] for part in parts)
    return torch.cat([_packed(line).view(torch.uint8) for line in lines], dim=1)


def split_bytes(together: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `joined_bytes`: split [B', bytes] into tensors [B', …] with the dtypes and shapes of ``like``."""
    widths = [part.element_size() * part.shape[1:].numel() for part in like]
    return [
        _packed(piece).view(part.dtype).view(len(together), *part.shape[1:])
        for piece, part in zip(together.split(widths, dim=1), like, strict=True)
    ]


def shard_bounds(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the slots [begin, end) of a rank's shard: ⌈size / ranks⌉ as in DTensor, fewer for the last ranks."""
    share = -(-size // ranks)
    return min(rank * share, size), min((rank + 1) * share, size)


def as_shard(local: Tensor, size: int, group: Any) -> Tensor:
    """Return the DTensor of ``size`` rows whose local part is ``local``, for torch.distributed.checkpoint."""
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard  # slow to import, and rarely needed

    default: Any = dist.group.WORLD
    mesh = DeviceMesh.from_group(default if group is None else group, local.device.type)
    shape = torch.Size((size, *local.shape[1:]))
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride())


def blocks_of(rows: Tensor, device: torch.device, most: int = 1 << 26) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, block): a plain tensor as one block, a DTensor in blocks of at most ``most`` bytes.

    Every rank gets all blocks of a DTensor, which are broadcast on ``device``.
    """
    if not is_shard(rows):
        yield 0, rows
        return
    group, local = rows.device_mesh.get_group(), rows.to_local()  # type: ignore[attr-defined]
    ranks = dist.get_world_size(group)
    step = max(1, most // (rows.shape[1:].numel() * rows.element_size()))
    for rank in range(ranks):
        begin, end = shard_bounds(rows.shape[0], ranks, rank)
        for first in range(begin, end, step):
            block = local.new_empty(min(step, end - first), *local.shape[1:], device=device)
            if rank == dist.get_rank(group):
                block.copy_(local[first - begin : first - begin + len(block)])
            dist.broadcast(block.view(torch.uint8), dist.get_global_rank(group, rank), group=group)
            yield first, block


def is_shard(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing DTensor."""
    return hasattr(tensor, "placements")


def placement(tensor: Tensor) -> tuple[Any, Any]:
    """Return the mesh and the placements of a DTensor; both are None for a plain tensor."""
    return getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)


def _packed(tensor: Tensor) -> Tensor:
    """Return a contiguous copy, whose strides and alignment allow a view of another dtype."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _header(call: str, same: dict[str, int | str], count: int, problem: Exception | None) -> Tensor:
    """Return the header of a rank, [bytes]. If there is a problem, the count is the length of its message in bytes."""
    kind = 0
    if problem is not None:
        kind = 1 + next(i for i, kind in enumerate(ERRORS) if isinstance(problem, kind))
        count = len(_text_of(problem))
    numbers = [_coded(call), kind, count, *map(_coded, same.values())]
    numbers += [0] * (_NUMBERS - len(numbers))
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").view(torch.uint8)


def _text_of(problem: Exception | None) -> bytes:
    """Return a message as bytes; keep surrogates, which represent the bytes of names that are not UTF-8."""
    return str(problem or "").encode(errors="surrogatepass")


def _coded(value: int | str) -> int:
    return value if isinstance(value, int) else int.from_bytes(value.encode("ascii")[:8].ljust(8), "big")


def _listed(table: list[list[int]], column: int, like: int | str) -> str:
    """Describe a column of the headers; its values have the type of ``like``."""
    values = [row[column] if isinstance(like, int) else row[column].to_bytes(8, "big").decode() for row in table]
    shown = [f"{str(value).strip()} on rank {rank}" for rank, value in enumerate(values)]
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "")
