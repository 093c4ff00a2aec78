"""The faults that ``planted.py`` plants are still faults of this tree."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("planted", Path(__file__).with_name("planted.py"))
planted = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(planted)


@pytest.mark.parametrize("name", planted.FAULTS)
def test_each_applies_once(name):
    fault = planted.FAULTS[name]
    assert fault.new not in ("", fault.old) and fault.place(planted.ROOT)
    assert all((planted.ROOT / "tests" / f"{test}.py").is_file() for test in fault.tests.split())
