"""Checks, while a test runs, that arrays have the axes that their names say.

`loss_weights_NGC` has three axes, and within one call of a function N, G and C have one size each,
in parameters and other variables. A digit is a size (`seeds_B2`). Looked at are functions when they
return a value (one that raises may just have refused what it was given) and records when they are
made. Under jit these are the traced arrays, so compiled code costs nothing.
"""

import contextlib
import functools
import re
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType

import jax
import numpy as np

_SUFFIX = re.compile(r"\w*[a-z0-9]_([A-Z][A-Zh0-9]*)")


def axes(name: str) -> str:
    """The axes that a name says: "NGC" of `loss_weights_NGC`; "" of a name without a suffix."""
    found = _SUFFIX.fullmatch(name)
    return found[1] if found else ""


def contradictions(variables: Mapping[str, object]) -> list[str]:
    """Where arrays among a function's variables are not as they are named."""
    problems: list[str] = []
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in variables.items():
        letters = axes(name)
        if not letters or not isinstance(value, (np.ndarray, jax.Array)):
            continue
        if len(letters) != value.ndim:
            problems.append(f"{name} has shape {value.shape}")
            continue
        for letter, size in zip(letters, value.shape, strict=True):
            known = (int(letter), "its name") if letter.isdigit() else (size, name)
            expected, where = sizes.setdefault(letter, known)
            if size != expected:
                problems.append(f"{name}: {letter} is {size}, and {expected} in {where}")
    return problems


@functools.cache
def _has_axes(code: CodeType) -> bool:
    return any(map(axes, code.co_varnames + code.co_freevars + code.co_cellvars))


@contextlib.contextmanager
def axes_checked(package: str = "jaxgrpo") -> Iterator[None]:
    """Within it, calls of this thread into a package are watched; raises AssertionError at its end
    that lists what was found."""
    found: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        made = event == "call" and frame.f_code.co_name == "__init__"
        returned = event == "return" and argument is not None
        if not (made or returned) or not _has_axes(frame.f_code):
            return
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] == package:
            where = f"{module}.{frame.f_code.co_qualname}"
            found.extend(f"{where}: {what}" for what in contradictions(frame.f_locals))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
    assert not found, "arrays that are not as they are named:\n" + "\n".join(dict.fromkeys(found))
