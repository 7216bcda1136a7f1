"""The ranks that the tests of this folder run on."""

from collections.abc import Iterator

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.stop()


@pytest.fixture(scope="session", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest) -> Processes:
    return request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[request.param])
