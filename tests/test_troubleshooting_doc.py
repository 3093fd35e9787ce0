"""Every message that docs/troubleshooting.md quotes is one that the program has."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
OF_PYTHON = {"No module named jaxgrpo"}


def quoted(page: str) -> list[str]:
    blocks = re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line.rstrip() for block in blocks for line in block.splitlines()]


def texts() -> str:
    """All texts of the source, also those between the fields of formatted ones."""
    found = []
    for folder in ("jaxgrpo", "envs", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.walk(ast.parse(path.read_text()))
            found += [
                n.value for n in tree if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
    return "\0".join(found)


def test_quoted_messages_are_in_the_source() -> None:
    lines, source = quoted(PAGE), texts()
    assert len(lines) > 40
    pieces = [
        piece.strip() for line in lines if line not in OF_PYTHON for piece in line.split("...")
    ]
    assert [piece for piece in pieces if len(piece) > 3 and piece not in source] == []
