"""What tests of the suite share: small cases, and a run of some of them in a folder."""

import json

from bench import suite_run
from bench.suite_run import Case, Suite


def case(name, code, slot="a", **options):
    command = ("-c", code, "{out}")
    values = {"what": "", "command": command, "rehearsal": command, "expect": 0.1, "limit": 30.0} | options
    return Case(name=name, slot=slot, **values)


def run(cases, tmp_path, seconds=60.0, resume=False, **options):
    said = []
    suite = Suite(tmp_path / "suite.json", {"commit": "x"}, resume)
    suite_run.run_all(cases, suite, seconds, said.append, **options)
    return json.loads((tmp_path / "suite.json").read_text())["cases"], said
