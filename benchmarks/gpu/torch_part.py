"""Part "torch": the same optimizer step in PyTorch (torch_step.py), where PyTorch is installed."""

import importlib.util
from collections.abc import Iterator

from benchmarks.gpu.rows import Context, Row


def run(unit: str, context: Context) -> Iterator[Row]:
    if importlib.util.find_spec("torch") is None:
        yield {"row": "left out", "why": "PyTorch is not installed"}
        return
    from benchmarks.gpu import torch_step

    yield from torch_step.run(unit, context)
