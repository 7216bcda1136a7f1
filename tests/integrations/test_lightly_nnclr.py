"""The drop-in bank of examples/integrations/lightly_nnclr.py, against lightly's own and in lightly's NNCLR step."""

import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("lightly", reason="lightly is what this example plugs into: pip install lightly")
pytest.importorskip("sklearn", reason="the example's digits are scikit-learn's")

from lightly.data import LightlyDataset
from lightly.models.modules import NNMemoryBankModule
from PIL import Image

from integrations import lightly_nnclr
from integrations.lightly_nnclr import NNCLR, Digits, MSFMemoryBankModule

SIZE, DIM, BATCH = 64, 16, 16


def batch(number: int, rows: int = BATCH, dim: int = DIM) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(number)) * 3


def full_pair() -> tuple[MSFMemoryBankModule, NNMemoryBankModule]:
    ours, theirs = MSFMemoryBankModule(size=(SIZE, DIM)), NNMemoryBankModule(size=(SIZE, DIM))
    for number in range(SIZE // BATCH):
        ours(batch(number), update=True)
        theirs(batch(number), update=True)
    return ours, theirs


@pytest.mark.parametrize("update", [False, True])
def test_answers_are_lightlys_where_the_batch_divides_the_size(update: bool) -> None:
    ours, theirs = full_pair()
    for number in range(10, 20):
        found, expected = ours(batch(number), update=update), theirs(batch(number), update=update)
        torch.testing.assert_close(found, F.normalize(expected, dim=1), rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.bank.rows, F.normalize(theirs.bank, dim=1), rtol=0, atol=1e-6)
    newest = 19 if update else SIZE // BATCH - 1
    torch.testing.assert_close(theirs(batch(newest)), batch(newest), rtol=0, atol=0)
    torch.testing.assert_close(ours(batch(newest)), F.normalize(batch(newest), dim=1), rtol=0, atol=1e-6)


def test_the_answer_is_of_the_bank_before_the_update() -> None:
    ours, _ = full_pair()
    before = ours(batch(30))
    assert torch.equal(ours(batch(30), update=True), before)
    assert not torch.equal(ours(batch(30)), before)


def test_lightly_loses_rows_at_the_wrap_around_and_ours_is_a_deque() -> None:
    size, rows = 20, 8
    ours, theirs = MSFMemoryBankModule(size=(size, DIM)), NNMemoryBankModule(size=(size, DIM))
    expected: deque[Tensor] = deque(maxlen=size)
    lost = []
    for number in range(12):
        new = F.normalize(batch(number, rows), dim=1)
        ours(new, update=True)
        theirs(new, update=True)
        expected.extend(new)
        newest = torch.stack(list(expected))
        slots = torch.arange(rows * (number + 1) - len(newest), rows * (number + 1)) % size
        torch.testing.assert_close(ours.bank.rows[slots], newest, rtol=0, atol=1e-6)
        assert len(ours.bank) == len(newest)
        # A row that a bank holds is its own neighbor.
        torch.testing.assert_close(ours(newest), newest, rtol=0, atol=1e-6)
        lost.append(int(((theirs(newest) - newest).abs().amax(dim=1) > 1e-6).sum()))
    # Of the eight rows of the third batch, four still fit and the other four are dropped; later, this happens again.
    assert lost == [0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4], "lightly has changed: the docstring says what it does in 1.6"


def test_an_unfilled_slot_is_never_returned() -> None:
    ours, theirs = MSFMemoryBankModule(size=(SIZE, DIM)), NNMemoryBankModule(size=(SIZE, DIM))
    first = batch(0)
    torch.testing.assert_close(ours(first), F.normalize(first, dim=1), rtol=0, atol=1e-6)  # empty: the output itself
    for module in (ours, theirs):
        module(first[:3], update=True)
    queries = -first[:3]  # far from all rows
    unit = F.normalize(first[:3], dim=1)
    expected = unit[(F.normalize(queries, dim=1) @ unit.T).argmax(dim=1)]
    torch.testing.assert_close(ours(queries), expected, rtol=0, atol=1e-6)
    theirs_unit = F.normalize(theirs(queries), dim=1)
    assert (theirs_unit - expected).abs().amax(dim=1).min() > 0.01, "lightly no longer starts with random rows?"


def test_a_saved_bank_goes_on_and_lightlys_is_not_saved(tmp_path: Path) -> None:
    ours, theirs = full_pair()
    torch.save(ours.state_dict(), tmp_path / "bank.pt")
    again = MSFMemoryBankModule(size=(SIZE, DIM))
    again.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    for number in range(40, 44):
        assert torch.equal(again(batch(number, 10), update=True), ours(batch(number, 10), update=True))
    assert torch.equal(again.bank.rows, ours.bank.rows)
    assert len(theirs.state_dict()) == 0
    assert len(MSFMemoryBankModule(size=(4, 2), persistent=False).state_dict()) == 0


def test_rows_that_are_not_finite_are_never_returned() -> None:
    module = MSFMemoryBankModule(size=(4, 2))
    module(torch.full((1, 2), torch.nan), update=True)
    query = torch.tensor([[0.0, 2.0]])
    assert torch.equal(module(query), torch.tensor([[0.0, 1.0]]))
    module(torch.tensor([[3.0, 0.0]]), update=True)
    assert torch.equal(module(query), torch.tensor([[1.0, 0.0]]))


def test_options_go_to_the_bank_and_no_gradient_comes_out() -> None:
    module = MSFMemoryBankModule(size=[32, 8], dtype=torch.float16, backend="torch")
    assert module.size == (32, 8)
    assert module.bank.dtype == torch.float16
    output = batch(0, 4, 8).requires_grad_()
    for update in (False, True):
        answer = module(output.bfloat16(), update=update)
        assert answer.dtype == torch.float32
        assert not answer.requires_grad


@pytest.mark.parametrize("size", [4096, (4096,), (4096, 8, 8)])
def test_a_size_without_dimensions_is_refused_by_both(size: Any) -> None:
    with pytest.raises(ValueError, match="size must be"):
        MSFMemoryBankModule(size=size)
    with pytest.raises(ValueError, match="size"):
        NNMemoryBankModule(size=size)


def steps(module: nn.Module) -> tuple[list[float], NNCLR]:
    torch.manual_seed(1)
    model = NNCLR(nn.Linear(8, 512))
    loader: Any = [((batch(n, 16, 8), batch(n, 16, 8) + 0.1 * batch(n + 50, 16, 8)), None, None) for n in range(4)]
    return lightly_nnclr.train(model, module, loader, 3, "cpu"), model


def test_nnclr_learns_the_same_with_either_bank() -> None:
    ours, theirs = MSFMemoryBankModule(size=(64, 128)), NNMemoryBankModule(size=(64, 128))
    ours(theirs.bank, update=True)  # start with lightly's random rows, so that nothing differs
    our_losses, our_model = steps(ours)
    their_losses, their_model = steps(theirs)
    assert our_losses[-1] < our_losses[0] - 0.1
    assert our_losses == pytest.approx(their_losses, abs=1e-4)
    for ours_, theirs_ in zip(our_model.parameters(), their_model.parameters(), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=0, atol=1e-4)


def test_the_example_runs_on_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        pixels = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    command = f"x.py --data {tmp_path} --size 16 --batch-size 4 --bank-size 6 --epochs 2".split()
    monkeypatch.setattr(sys, "argv", command)
    lightly_nnclr.main()
    printed = capsys.readouterr().out
    assert "epoch: 01, loss: " in printed
    assert "MemoryBank(size=6, dim=128, dtype=float32, filled=6" in printed


def test_the_digits_are_pictures_for_lightly() -> None:
    dataset = LightlyDataset.from_torch_dataset(Digits(), transform=lambda image: image.getpixel((4, 3)))
    values = [dataset[index][0] for index in range(60)]
    assert len(dataset) == 1797
    assert [dataset[index][1] for index in range(3)] == [0, 1, 2]
    assert {len(value) for value in values} == {3}
    assert max(value[0] for value in values) == 255


def test_each_prediction_meets_the_other_views_neighbor(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[tuple[float, float]] = []

    class Pairs(nn.Module):
        def forward(self, z: Tensor, p: Tensor) -> Tensor:
            pairs.append((float(z.mean()), float(p.mean())))
            return p.sum() * 0

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x * self.one

    monkeypatch.setattr(lightly_nnclr, "NTXentLoss", lambda temperature: Pairs())
    updates: list[tuple[float, bool]] = []

    def bank(z: Tensor, update: bool) -> Tensor:
        updates.append((float(z.mean()), update))
        return z + 10

    loader: Any = [((torch.zeros(2, 4), torch.ones(2, 4)), None, None)]
    lightly_nnclr.train(Model(), bank, loader, 1, "cpu")  # type: ignore[arg-type]
    assert updates == [(0, False), (1, True)]
    assert pairs == [(10, 1), (11, 0)]
