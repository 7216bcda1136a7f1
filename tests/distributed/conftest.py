"""The ranks that the tests of this folder run on."""

from collections.abc import Iterator

import pytest
from processes import Processes, Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def two_ranks(workers: Workers) -> Processes:
    return Processes(2, workers)


@pytest.fixture(scope="session")
def four_ranks(workers: Workers) -> Processes:
    return Processes(4, workers)


@pytest.fixture(scope="session", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, workers: Workers) -> Processes:
    return Processes(request.param, workers)
