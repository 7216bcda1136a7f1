"""The memory bank of MSF (paper section 2): a first-in-first-out ring of target embeddings, searched exactly."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from msf_core.checks import check_labels, check_tensor
from msf_core.distributed import ERRORS, Ranks, problem_of, untraced
from msf_core.ring import Ring
from msf_core.rows import UNKNOWN, Neighbors, unit_rows, unpacked
from msf_core.search import Queries, SearchBackend, check_backend, find_backend
from msf_core.search.base import ROW_DTYPES

LAYOUTS = ("replicated", "sharded", "local")


class MemoryBank(Ring):
    """The newest ``size`` embeddings as unit rows, each with a label and an id, and exact search among them.

    Contents always equal a ``collections.deque(maxlen=size)`` of everything pushed. All of it is in the
    ``state_dict``: save, load and go on is bit-equal. A saved bank of another size gives the newest rows that
    fit, in order; one of another ``dim`` is an error that leaves the bank as it was.

    Args:
        size: rows that it holds, N. The paper uses 1,024,000 and finds 128,000 as good (section 3.4).
        dim: dimensions of an embedding, D.
        dtype: of the stored rows: float32, float16, bfloat16, or int8 with a float32 scale for each row. Queries are
            rounded to a floating one, and stay float32 for int8; similarities are accumulated in float32.
        backend: "auto", "torch", "faiss", "triton", or any object with a `SearchBackend.topk`.
        layout: who keeps what where torch.distributed runs. "replicated": every rank keeps all rows of all ranks.
            "sharded": each rank keeps 1/W of them and answers for it, with the same results; the ``state_dict`` then
            holds DTensors, for torch.distributed.checkpoint. "local": each rank keeps its own. With one process all
            three are the same.
        group: process group of the ranks that share the bank; None is the default group.
        persistent: False leaves the bank out of the ``state_dict``.

    Raises:
        ValueError: ``size`` or ``dim`` below 1, an unknown backend or layout, a group without this process.
        TypeError: another ``dtype``, a backend without ``topk``, a group that is none.
        ImportError: the backend asked for by name does not work here.

    >>> bank = MemoryBank(size=4, dim=2)
    >>> slots = bank.push(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), labels=torch.tensor([7, 8]))
    >>> found = bank.search(torch.tensor([[0.0, 1.0]]), k=2)
    >>> found.label, found.similarity
    (tensor([[8, 7]]), tensor([[1.0000, 0.8000]]))
    >>> bank
    MemoryBank(size=4, dim=2, dtype=float32, filled=2, backend='auto', bytes=64)
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str | SearchBackend = "auto",
        layout: str = "replicated",
        group: Any = None,
        persistent: bool = True,
    ) -> None:
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dtype not in (*ROW_DTYPES, torch.int8):
            raise TypeError(f"dtype must be torch.float32, float16, bfloat16 or int8, got {dtype}")
        find_backend(backend, torch.device("cpu"))  # says now if it does not work here
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        super().__init__(size, dim, dtype, layout, Ranks(group), persistent)
        self.backend = backend

    @property
    def full(self) -> bool:
        """Whether every slot is filled."""
        return len(self) == self.size

    def waits_for_others(self, *, pushing: bool) -> bool:
        """Tell whether a push, or else a search, is one that all ranks have to make together.

        Raises:
            RuntimeError: a sharded bank was made for another number of ranks.
        """
        if self.layout == "local":
            return False
        ranks = self._ranks.size
        if self.layout == "sharded" and ranks != self._shards:
            raise RuntimeError(
                f"the bank was sharded for {self._shards} ranks, now there are {ranks}: "
                "make it after torch.distributed.init_process_group"
            )
        return ranks > 1 and (pushing or self.layout == "sharded")

    def sharing_errors(self, *, pushing: bool) -> AbstractContextManager[None]:
        """Tell the ranks that wait for this one in a push, or a search, of an error in the block, and raise it."""
        return self._ranks.sharing_errors("push" if pushing else "search")

    @torch.no_grad()
    def push(self, embeddings: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Store a batch, over the oldest rows once the bank is full. Never waits for the device.

        Under torch.distributed all ranks push together, each a batch of its own, which may differ in B: the rows of
        rank 0 come first. A rank whose batch does not fit makes it an error on all of them.

        Args:
            embeddings: [B, D], any float dtype and scale; normalized in float32 on the way in (a row shorter than
                1e-12 stays short). B may be 0 or above ``size``. A row whose norm is not finite takes its slot,
                but is never found by a search, and ``nonfinite`` counts it.
            labels: [B], integers; a negative one, or no labels at all, is unknown.
            ids: [B], integers: which image, say, each is an embedding of; negative: unknown. From the first ones on the
                bank keeps an id beside each row. All ranks give them, or none.

        Returns:
            The slots of these rows, [B] int64; −1 for those that later rows pushed out at once.

        Raises:
            ValueError: a shape or device that does not fit.
            TypeError: embeddings that are not floating, labels or ids that are not integers.
            RuntimeError: other ranks are not in a push.
        """
        if self.waits_for_others(pushing=True):
            return self._push_together(embeddings, labels, ids)
        self._check_batch(embeddings, labels, ids)
        return self._store(embeddings, labels, ids)

    @torch.no_grad()
    def search(
        self, queries: Tensor, k: int, *, labels: Tensor | None = None, exclude_ids: Tensor | None = None
    ) -> Neighbors:
        """Find the k most similar rows of every query, exactly, or of those rows that it may find.

        In a sharded bank all ranks search together, each with queries of its own, which may differ in number.

        Args:
            queries: [Q, D], any float dtype and scale.
            k: between 1 and ``len(bank)``.
            labels: [Q], integers: only rows with a query's label are its neighbors; negative: any label.
            exclude_ids: [Q], integers: rows with that id are none of a query's neighbors; negative: none are excluded.

        Returns:
            `Neighbors`. Unfilled slots are never among them.

        Raises:
            ValueError: k out of range, a shape or device that does not fit, or ``exclude_ids`` where no ids are kept.
            TypeError: queries that are not floating, labels or ids that are not integers, or a k that is no int.
            RuntimeError: other ranks of a sharded bank are not in a search.
        """
        if self.waits_for_others(pushing=False):
            with self.sharing_errors(pushing=False):
                self._check_search(queries, k, labels, exclude_ids)
        else:
            self._check_search(queries, k, labels, exclude_ids)
        return self.find(queries, k, labels=labels, exclude_ids=exclude_ids)

    @torch.no_grad()
    def find(
        self,
        queries: Tensor,
        k: int,
        leave_out: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        exclude_ids: Tensor | None = None,
    ) -> Neighbors:
        """Do the search of `search` for arguments known to be right.

        Args:
            queries: [Q, D].
            k: as there.
            leave_out: [Q] slots; one that is among a query's k neighbors is left out, else the last neighbor is.
            labels: as there.
            exclude_ids: as there.

        Returns:
            `Neighbors`, with ``leave_out`` one fewer.
        """
        whole = (None if part is None else part.to(torch.int64) for part in (labels, exclude_ids))
        asked = Queries(unit_rows(queries).to(self._query_dtype), *whole)
        if self.waits_for_others(pushing=False):
            found = self._search_together(asked, k)
        else:
            found = self._take(*self._nearest(asked, k))
        return found if leave_out is None else found.without(leave_out)

    def age(self, slots: Tensor) -> Tensor:
        """Return how many rows were pushed after those in these slots, [...] int64; −1 for −1. Does not wait."""
        return ((self.pushed - 1 - slots) % self.size).masked_fill(slots < 0, -1)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget every row, as if newly made; ids that are kept are kept on."""
        self._forget()
        for count in (self.pushed, self.nonfinite, self._pushed):
            count.zero_()

    @untraced
    def _push_together(self, embeddings: Tensor, labels: Tensor | None, ids: Tensor | None) -> Tensor:
        problem = problem_of(self._check_batch, embeddings, labels, ids)
        dtype, count = (_name(embeddings.dtype), len(embeddings)) if problem is None else ("", 0)
        same = {"dtype of embeddings": dtype, "presence of ids": "without" if ids is None else "with"}
        counts = self._agree("push", count, problem, **same)
        if labels is None:
            labels = self.labels.new_full((len(embeddings),), UNKNOWN)
        first = sum(counts[: self._ranks.rank])
        # As they came, not normalized: so the bank of one process that pushes the whole batch has the same bits.
        rows = self._ranks.gather(embeddings.detach(), counts)
        labels, ids = (
            None if part is None else self._ranks.gather(part.to(torch.int64), counts) for part in (labels, ids)
        )
        slots = self._store(rows, labels, ids)
        return slots[first : first + len(embeddings)]

    @untraced
    def _search_together(self, queries: Queries, k: int) -> Neighbors:
        """Ask every shard for the neighbors of all ranks' queries, and keep the best of the answers to one's own."""
        limits = {(True, True): "nothing", (False, True): "labels", (True, False): "ids", (False, False): "both"}
        limit = limits[queries.labels is None, queries.ids is None]
        counts = self._agree("search", len(queries.values), None, k=k, **{"what limits the search": limit})
        problem: Exception | None = None
        answers: tuple[Tensor, ...] = ()
        given = (None if part is None else self._ranks.gather(part, counts) for part in queries)
        asked = Queries(*given)  # type: ignore[arg-type]  # values are never None
        try:
            answers = self._answer(asked, k)
        except Exception as error:
            problem = error if isinstance(error, ERRORS) else RuntimeError(f"{type(error).__name__}: {error}")
        self._ranks.agree("answer", same={}, problem=problem)
        candidates = self._ranks.exchange(answers, counts)  # [W, Q, k, …] each
        similarity, *others = (part.transpose(0, 1).flatten(1, 2) for part in candidates)  # [Q, W·k, …]
        similarity, best = similarity.topk(k, dim=1)
        query = torch.arange(len(best), device=best.device)[:, None]
        index, label, rows, *scale = (part[query, best] for part in others)
        return Neighbors(similarity, index, unpacked(rows, scale[0] if scale else None), label)

    def _agree(self, call: str, count: int, problem: Exception | None, **same: int | str) -> list[int]:
        """Return how many rows each rank brings."""
        ours: dict[str, int | str] = {
            "size": self.size,
            "dim": self.dim,
            "dtype of the bank": _name(self.dtype),
            "number of rows pushed so far": int(self._pushed),
        }
        return self._ranks.agree(call, same={**ours, **same}, count=count, problem=problem)

    def check_backend(self, k: int = 1) -> None:
        """Raise unless the search backend finds k neighbors on the bank's present device.

        Raises:
            ImportError: one asked for by name does not work on that device.
            ValueError: it does not find that many.
        """
        check_backend(self.backend, self.rows.device, k)

    def check(self, name: str, embeddings: Tensor) -> None:
        """Raise ValueError or TypeError, naming ``name``, unless these are [any, D] floats on the bank's device."""
        check_tensor(name, embeddings)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(
                f"{name} must be [B, {self.dim}] as the bank has dim={self.dim}, got {list(embeddings.shape)}"
            )
        if not embeddings.is_floating_point():
            raise TypeError(f"{name} must be floating, got {embeddings.dtype}")
        if embeddings.device != self.rows.device:
            raise ValueError(
                f"{name} must be on the bank's device, {self.rows.device}, got {embeddings.device}; "
                f"move the bank with .to({str(embeddings.device)!r})"
            )

    def _check_batch(self, embeddings: Tensor, labels: Tensor | None, ids: Tensor | None) -> None:
        self.check("embeddings", embeddings)
        check_labels(labels, embeddings)
        check_labels(ids, embeddings, "ids")

    def _check_search(self, queries: Tensor, k: int, labels: Tensor | None, exclude_ids: Tensor | None) -> None:
        self.check("queries", queries)
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int, got {k!r}")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be between 1 and the {len(self)} rows in the bank, got {k}")
        check_labels(labels, queries)
        check_labels(exclude_ids, queries, "exclude_ids")
        if exclude_ids is not None and self.ids is None:
            raise ValueError("exclude_ids needs rows that have ids, and no ids were pushed")
        self.check_backend(k)

    def extra_repr(self) -> str:
        """Describe size, fill and cost; bytes are those of this process."""
        backend = self.backend if isinstance(self.backend, str) else type(self.backend).__name__
        layout = "" if self.layout == "replicated" else f" layout={self.layout!r},"
        return (
            f"size={self.size}, dim={self.dim}, dtype={_name(self.dtype)}, "
            f"filled={len(self)}, backend={backend!r},{layout} bytes={self.nbytes}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
