"""benchmarks/bank_ranks.py: its formula checked by hand, and that it would notice a difference."""

from typing import Any

import pytest
import torch

from benchmarks import bank_ranks

rank_main = bank_ranks.rank_main


def test_the_bytes_on_the_wire_are_those_counted_by_hand() -> None:
    # Two ranks with 3 rows each, D = 2, k = 1, float16. A push takes 3 rows of the other rank, of 2 halves and a label
    # each, and one header. A search takes 3 queries of 2 halves; 3 answers of a similarity, a slot, a label and 2
    # halves; and two headers.
    push = 3 * (2 * 2 + 8) + 88
    search = 3 * 2 * 2 + 3 * (4 + 8 + 8 + 2 * 2) + 2 * 88
    assert bank_ranks.wire_bytes(2, "replicated", 6, 2, 1, 2) == push
    assert bank_ranks.wire_bytes(2, "sharded", 6, 2, 1, 2) == push + search
    assert bank_ranks.wire_bytes(1, "sharded", 6, 2, 1, 2) == 0


def small_rank_main(*arguments: Any) -> None:
    """A rank of a small bank, in a process of its own."""
    bank_ranks.SIZE, bank_ranks.DIM, bank_ranks.BATCH, bank_ranks.STEPS = 8192, 32, 64, 2
    rank_main(*arguments)


@pytest.mark.slow
def test_two_ranks_keep_half_and_find_what_one_process_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_ranks, "rank_main", small_rank_main)
    alone = bank_ranks.measure(1, "replicated", torch.float32)
    shared = bank_ranks.measure(2, "sharded", torch.float32)
    assert alone["bytes_a_rank"] == 8192 * (32 * 4 + 8)
    assert shared["bytes_a_rank"] * 2 == alone["bytes_a_rank"]
    assert len(alone["index"]) == 64
    assert bank_ranks.equal(shared, alone)
    shared["index"][7][2] += 1
    assert not bank_ranks.equal(shared, alone)
