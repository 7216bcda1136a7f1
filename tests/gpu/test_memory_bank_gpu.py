"""MemoryBank on a CUDA device: contents, streams, and moving between devices."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from msf_core import MemoryBank

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_bank_on_cuda_equals_the_list_of_its_newest_rows(
    backend_name: str, dtype: torch.dtype, assert_k_nearest: Callable[..., None]
) -> None:
    bank = MemoryBank(size=50, dim=33, dtype=dtype, backend=backend_name).cuda()
    rows, labels = torch.randn(130, 33, device="cuda"), torch.arange(130, device="cuda")
    rows[100, 0] = torch.inf
    for start, stop in ((0, 7), (7, 7), (7, 40), (40, 130)):
        slots = bank.push(rows[start:stop], labels[start:stop])
    assert slots.tolist() == [-1] * 40 + [i % 50 for i in range(80, 130)]
    assert len(bank) == 50
    assert bank.nonfinite.item() == 1
    newest = F.normalize(rows[40:], dim=1)[40:].to(dtype)  # normalized in the shape that was pushed, for the same bits
    newest[20] = torch.nan
    in_order = torch.arange(80, 130) % 50
    torch.testing.assert_close(bank.rows[in_order], newest, rtol=0, atol=0, equal_nan=True)
    assert bank.labels[in_order].tolist() == list(range(80, 130))

    queries = torch.randn(9, 33, device="cuda")
    found = bank.search(queries, k=50)
    assert_k_nearest(found.similarity, found.index, F.normalize(queries, dim=1).to(dtype), bank.rows, 50, 1.0)
    assert (found.index[:, -1] == -1).all()
    assert torch.equal(found.label[:, :-1], bank.labels[found.index[:, :-1]])
    lengths = found.embedding[:, :-1].norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)


def test_push_and_search_on_another_stream_wait_for_what_is_queued_there(
    backend_name: str, assert_k_nearest: Callable[..., None]
) -> None:
    bank = MemoryBank(size=1000, dim=64, backend=backend_name).cuda()
    bank.push(torch.randn(1000, 64, device="cuda"))
    embeddings, fresh = torch.zeros(500, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    queries = torch.randn(16, 64, device="cuda")
    bank.search(queries, k=5)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s during which the embeddings are zeros
        embeddings.copy_(fresh)
        bank.push(embeddings)
        found = bank.search(queries, k=5)
    stream.synchronize()
    torch.testing.assert_close(bank.rows[:500], F.normalize(fresh, dim=1), rtol=0, atol=0)
    assert_k_nearest(found.similarity, found.index, F.normalize(queries, dim=1), bank.rows, 5, 1.0)


def test_embeddings_queries_and_labels_on_the_cpu_are_refused_and_nothing_changes() -> None:
    bank = MemoryBank(size=4, dim=3).cuda()
    bank.push(torch.eye(3, device="cuda"), torch.arange(3, device="cuda"))
    before = {name: buffer.clone() for name, buffer in bank.state_dict().items()}
    with pytest.raises(ValueError, match=r"embeddings .*cuda:0.*cpu"):
        bank.push(torch.eye(3))
    with pytest.raises(ValueError, match=r"labels .*cuda:0.*cpu"):
        bank.push(torch.eye(3, device="cuda"), torch.arange(3))
    with pytest.raises(ValueError, match=r"queries .*cuda:0.*cpu"):
        bank.search(torch.eye(3), k=1)
    assert len(bank) == 3
    for name, buffer in bank.state_dict().items():
        assert torch.equal(buffer, before[name])


def test_moving_to_cuda_and_back_keeps_everything(backend_name: str) -> None:
    bank = MemoryBank(size=6, dim=3)
    bank.push(torch.randn(8, 3), torch.arange(8))
    before = {name: buffer.clone() for name, buffer in bank.state_dict().items()}
    bank.backend = backend_name
    bank.cuda()
    assert bank.search(bank.rows, k=1).index[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    bank.cpu()
    bank.backend = "auto"
    for name, buffer in bank.state_dict().items():
        assert torch.equal(buffer, before[name])
    assert bank.push(torch.eye(3)).tolist() == [2, 3, 4]
    assert bank.search(torch.eye(3), k=1).index[:, 0].tolist() == [2, 3, 4]


@pytest.mark.parametrize("size", [6, 4, 9])
@pytest.mark.parametrize(("source", "destination"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_bank_saved_on_one_device_loads_on_the_other(
    source: str, destination: str, size: int, tmp_path: Path
) -> None:
    saved = MemoryBank(size=6, dim=3).to(source)
    saved.push(torch.randn(8, 3, device=source), torch.arange(8, device=source))
    torch.save(saved.state_dict(), tmp_path / "bank.pt")
    bank = MemoryBank(size=size, dim=3).to(destination)
    bank.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    assert {buffer.device.type for buffer in bank.state_dict().values()} == {destination}
    newest = torch.arange(8 - len(bank), 8)
    here = newest % 6 if size == 6 else torch.arange(len(bank))
    assert len(bank) == min(size, 6)
    assert bank.labels[here].tolist() == newest.tolist()
    assert torch.equal(bank.rows[here].cpu(), saved.rows[newest % 6].cpu())


def test_a_bank_on_a_second_cuda_device_works_there(backend_name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, there are {torch.cuda.device_count()}")
    bank = MemoryBank(size=6, dim=3, backend=backend_name).to("cuda:1")
    slots = bank.push(torch.eye(3, device="cuda:1"))
    found = bank.search(torch.eye(3, device="cuda:1"), k=1)
    assert {tensor.device for tensor in (slots, *found)} == {torch.device("cuda:1")}
    assert found.index[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"embeddings .*cuda:1.*cuda:0"):
        bank.push(torch.eye(3, device="cuda:0"))
