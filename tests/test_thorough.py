"""The table of tests that run only when they are asked for names tests that there are."""

import pytest
from thorough import TESTS, mark


def test_every_entry_is_in_the_name_of_a_test(request):
    items = request.session.items
    files = {item.path.name for item in items}
    if not all(file.rpartition("/")[2] in files for file in TESTS) or request.config.option.keyword:
        pytest.skip("not all of the suite was collected")
    assert mark(items) == []
