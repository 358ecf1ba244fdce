"""Fixtures of the tests of many processes."""

from collections.abc import Iterator

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes; those of another pytest worker have their own, started when it first runs something."""
    pool = Pool()
    yield pool
    pool.close()
