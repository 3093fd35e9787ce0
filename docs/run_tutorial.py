"""Run docs/tutorial.md, and write what it printed into the page and into docs/tutorial.ipynb.

    python docs/run_tutorial.py        about ten minutes on two CPU cores

A block marked `python FILE` is written to that file, one marked `python` or `sh` is run, and the
block marked `text` behind it holds what it printed. The page is the source; the notebook is made
from it, one cell a block.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
_BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of the page: `kind` "markdown", "python", "sh" or "text"; `file` where it goes."""

    kind: str
    text: str
    file: str = ""

    @property
    def markdown(self) -> str:
        if self.kind == "markdown":
            return self.text
        return f"```{f'{self.kind} {self.file}'.strip()}\n{self.text}```\n"


def blocks(page: str) -> list[Block]:
    found, end = [], 0
    for match in _BLOCK.finditer(page):
        found.append(Block("markdown", page[end : match.start()]))
        found.append(Block(match[1], match[3], match[2]))
        end = match.end()
    return [*found, Block("markdown", page[end:])]


def run(block: Block, folder: Path, names: dict[str, Any]) -> str:
    """Run a block in a folder; what it printed. Raises CalledProcessError when a command fails."""
    if block.file:
        (folder / block.file).write_text(block.text)
        return ""
    if block.kind == "sh":
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(DOCS.parent)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.chdir(folder):
        exec(compile(block.text, "docs/tutorial.md", "exec"), names)
    return printed.getvalue()


def run_all(page: Sequence[Block], folder: Path, say: Callable[[str], None] = print) -> list[Block]:
    """Run a page from a folder, and return the page with what it printed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    done, printed = [], ""
    for block in page:
        if block.kind in ("python", "sh"):
            say(block.file or block.text.partition("\n")[0])
            printed = run(block, folder, names)
        done.append(Block("text", printed) if block.kind == "text" else block)
    return done


def work_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="jaxgrpo-tutorial-"))


def notebook(page: Sequence[Block]) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    for block in page:
        if block.kind == "markdown" and block.text.strip():
            source = block.text.strip()
            cells.append({"cell_type": "markdown", "metadata": {}, "source": source})
        elif block.kind == "text":
            output = {"output_type": "stream", "name": "stdout", "text": block.text}
            cells[-1]["outputs"] = [output]
        elif block.kind != "markdown":
            first = f"%%writefile {block.file}\n" if block.file else ""
            first = "%%bash\n" if block.kind == "sh" else first
            code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
            cells.append(code | {"source": first + block.text.rstrip()})
    numbered = [cell | {"id": f"cell-{i}"} for i, cell in enumerate(cells)]
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": numbered,
        "metadata": {"kernelspec": python, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    file = DOCS / "tutorial.md"
    page = run_all(blocks(file.read_text()), work_folder())
    file.write_text("".join(block.markdown for block in page))
    (DOCS / "tutorial.ipynb").write_text(json.dumps(notebook(page), indent=1) + "\n")


if __name__ == "__main__":
    main()
