"""What a run of the tests makes of tests that fail."""

from __future__ import annotations

import pytest

from scripts.local import test as runner

ALWAYS = "def test_always(): assert False\n"
ONCE = """
from pathlib import Path

def test_once():
    ran = Path(__file__).with_name("ran")
    before = ran.exists()
    ran.touch()
    assert before
"""


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Run tests of these texts as scripts/test does; return the exit code."""
    monkeypatch.setattr(runner, "ROOT", tmp_path)

    def run(*texts: str) -> int:
        for number, text in enumerate(texts):
            (tmp_path / f"test_{number}.py").write_text(text)
        return runner.tested(["--quiet"])

    return run


def test_failed_once_is_named_and_does_not_fail_the_run(ran, capfd) -> None:
    assert ran(ONCE, "def test_sound(): pass\n") == 0
    assert capfd.readouterr().out.rstrip().endswith("test_0.py::test_once")


def test_failed_twice_fails_the_run(ran, capfd) -> None:
    assert ran(ONCE, ALWAYS) == 1
    assert "FLAKY" not in capfd.readouterr().out


def test_many_that_fail_are_not_run_again(ran) -> None:
    assert ran(*[ONCE.replace('"ran"', f'"ran{number}"') for number in range(11)]) == 1
