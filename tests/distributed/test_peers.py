"""examples/pipeline/running/peers.py names missing ranks and their hosts. In test_hosts.py, hosts really vanish."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from msf_core.distributed import Ranks
from pipeline.running.ending import status_of, telling
from pipeline.running.peers import LostRank, Peers, lost_touch
from pipeline.running.ranks import joined

SILENCE = 1.5
ERROR = RuntimeError("gloo: Timed out\nand more")
NAMES = ["left", "middle", "right"]


def on_each(places: list[int], call: Callable[[int], object]) -> dict[int, object]:
    """Call a function for several ranks at once, in threads named after their hosts."""
    answers: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda at: answers.update({at: call(at)}), args=(place,), name=NAMES[place])
        for place in places
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Peers]]:
    """Three ranks on three hosts named after their threads; the first one hosts the store, in a thread of its own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setattr("pipeline.running.peers.socket.gethostname", lambda: threading.current_thread().name)
    made = on_each([0, 1, 2], lambda place: Peers(place, 3, "start", SILENCE))
    found = [made[place] for place in range(3)]
    assert all(one.hosts == NAMES and one.keepers == [0] for one in found)
    found[0].server = store
    del store
    yield found
    for one in found:
        one.stop()


def found_by(peers: list[Peers], *places: int) -> list[str]:
    answers = on_each(list(places), lambda place: peers[place].find(ERROR))
    assert all(isinstance(answer, LostRank) for answer in answers.values())
    return [str(answers[place]) for place in places]


def test_a_rank_without_a_sign_of_life_is_named_with_its_host(peers: list[Peers]) -> None:
    peers[1].stop()
    assert found_by(peers, 0, 2) == [
        "lost rank 1 on middle: no answer to rank 0 on left",
        "lost rank 1 on middle: no answer to rank 2 on right",
    ]


def test_one_that_lives_and_has_not_noticed_yet_is_not_taken_for_lost(peers: list[Peers]) -> None:
    peers[2].stop()
    assert found_by(peers, 0) == ["lost rank 2 on right: no answer to rank 0 on left"]


def test_a_rank_that_lives_and_does_not_come_is_named_and_one_that_waits_is_not(peers: list[Peers]) -> None:
    began = time.monotonic()
    assert found_by(peers, 0, 1) == [
        "lost rank 2 on right: no answer to rank 0 on left",
        "lost rank 2 on right: no answer to rank 1 on middle",
    ]
    assert time.monotonic() - began > SILENCE, "a rank may come later than the others"


def test_where_all_wait_for_one_another_none_is_named(peers: list[Peers]) -> None:
    for said in found_by(peers, 0, 1, 2):
        assert said.endswith("but all of them are alive; was the network cut? gloo: Timed out")


def test_where_the_store_is_gone_its_keeper_is(peers: list[Peers]) -> None:
    peers[0].stop()
    del peers[0].server
    assert found_by(peers, 2) == ["lost rank 0 on left: it hosts the store, and does not answer rank 2 on right"]


def test_a_lost_rank_ends_the_process_with_one_line_and_other_errors_are_not_taken_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "size", 2)
    with pytest.raises(RuntimeError, match="gloo"), telling("train.py", Ranks()):
        raise RuntimeError("gloo: closed by peer")  # `joined` finds out which rank it was

    def lose() -> int:
        raise LostRank("lost rank 1 on host2: no answer")

    assert status_of("train.py", lose) == 1
    assert capsys.readouterr().err == "\ntrain.py: error: lost rank 1 on host2: no answer\n"
    for error in (RuntimeError("shapes do not match"), OSError("gloo.jpg is no image"), ValueError("NCCL")):
        assert not lost_touch(error)
    for text in ("[gloo/pair.cc:5] Connection closed by peer", "Application timeout caused pair closure"):
        assert lost_touch(RuntimeError(text))
    assert lost_touch(dist.DistNetworkError("reset"))


def test_restarts_on_several_hosts_need_a_store_for_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RUN_ID": "1", "USE_AGENT_STORE": "True", "MAX_RESTARTS": "3", "RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), joined("cpu", 25):
        pass
