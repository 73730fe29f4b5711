"""docs/new-operation.md, followed to the letter in a clean copy of the checkout."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest

from tests.checkout import ROOT, copied

pytestmark = pytest.mark.timeout(300)

DOCUMENT = (ROOT / "docs" / "new-operation.md").read_text()
BLOCK = re.compile(
    r"(?:^ +`(?P<path>[^`\n]+)`(?:, (?P<where>after|before|at its end)(?: `(?P<anchor>[^`]+)`)?)?:\n\n)?"
    r"^ +```(?P<language>\w+)\n(?P<text>.*?)^ +```$",
    re.MULTILINE | re.DOTALL,
)


def write(path: Path, text: str, where: str | None, anchor: str | None) -> None:
    if where is None:
        path.write_text(text)
        return
    lines = path.read_text().splitlines(keepends=True)
    if where == "at its end":
        at = len(lines)
    else:
        (found,) = (number for number, line in enumerate(lines) if line.strip().startswith(anchor))
        at = found + (where == "after")
    path.write_text("".join([*lines[:at], text, *lines[at:]]))


def test_the_document_makes_an_operation(tmp_path):
    copy = copied(tmp_path / "atelier")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def shell(command: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", command],
            check=False,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    lines = []
    for block in BLOCK.finditer(DOCUMENT):
        text = "".join(line[3:] if line.strip() else line for line in block["text"].splitlines(keepends=True))
        if block["path"]:
            write(copy / block["path"], text, block["where"], block["anchor"])
            lines += [] if block["path"].startswith("tests/") else text.splitlines()
        else:
            said = shell(text)

    assert "passed" in said
    shell(".venv/bin/ruff format -q services && .venv/bin/ruff check services tests/unit")
    assert list_operations(shell) == "Makes it soft."
    assert len([line for line in lines if is_code(line)]) <= 10


def list_operations(shell) -> str:
    program = dedent("""\
        from mesh import contract
        from services.media import convert
        said = convert.comments(contract.IMAGE.read_bytes(), "atelier/media/v1/media.proto")
        print(*(each.description for each in convert.descriptions(said) if each.name == "blur"))
        """)
    return shell(f".venv/bin/python -c '{program}'").strip()


def is_code(line: str) -> bool:
    said = line.strip()
    return len(said) > 2 and not said.startswith(("//", '"""', "from ", "min:", "max:", "}"))
