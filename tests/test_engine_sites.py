"""Every place where the engine waits or records has a name of its own, so that tests can break them singly."""

import re
from collections import Counter
from pathlib import Path

CORE = Path(__file__).parent.parent / "csrc"
CALLS = re.compile(r"backend_->(wait|synchronize|record)\(")


def engine():
    return "".join(path.read_text() for path in sorted(CORE.glob("engine*.cpp")))


def named(kind):
    text = (CORE / "backend.h").read_text()
    body = re.search(rf"enum class {kind} {{(.*?)}};", text, re.DOTALL).group(1)
    return re.findall(r"^\s*(k\w+),", body, re.MULTILINE)


def test_no_two_places_share_a_name():
    for kind in ("WaitSite", "RecordSite"):
        used = Counter(re.findall(rf"{kind}::(k\w+)", engine()))
        assert used == Counter(name for name in named(kind) if name != "kTimes")


def test_every_call_names_its_place():
    text = engine()
    calls = [text[found.start() : text.index(";", found.start())] for found in CALLS.finditer(text)]
    assert len(calls) >= 16
    for call in calls:
        # acquire() waits in one place for one of three reasons, chosen just before
        assert re.search(r"Site::k\w+\)|, site\)", call), call
    assert sum(", site)" in call for call in calls) == 1
