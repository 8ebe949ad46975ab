"""Fixtures of the pytest-benchmark suites."""

from __future__ import annotations

import pytest

from bench.suite import TIMER, Pools, Rates


@pytest.fixture(scope="session")
def rates() -> Rates:
    """What the device does in a second."""
    return Rates.of_this_device()


@pytest.fixture(scope="session")
def pools() -> Pools:
    """Caches that cases of one geometry share."""
    return Pools()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=TIMER))
