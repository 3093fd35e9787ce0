"""Check, while a test runs, that arrays have the axes in their names.

`loss_weights_NGC` has three axes. Within one call of a function, N, G and C have one size each, in
parameters and other variables. A digit is a size (`seeds_B2`). Functions are checked when they
return a value, because one that raises may have refused its input. Records are checked when they
are created. Under jit these are the traced arrays, so compiled code costs nothing.

`tests/conftest.py` calls `watch_imports`, which adds the checks to modules as they are imported. A
profiler (`sys.setprofile`) would see the same calls, but all of jax's too: tracing took twice as
long with one.
"""

import ast
import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import numpy as np

PACKAGE = "jaxgrpo"
_RETURNED = "__axes_when_returned__"
_SUFFIX = re.compile(r"\w*[a-z0-9]_([A-Z][A-Zh0-9]*)")
_found: list[str] | None = None  # what does not fit, while calls are checked


def axes(name: str) -> str:
    """Return the axes in a name: "NGC" for `loss_weights_NGC`, "" without a suffix."""
    found = _SUFFIX.fullmatch(name)
    return found[1] if found else ""


def contradictions(variables: Mapping[str, object]) -> list[str]:
    """Describe the arrays among a function's variables that do not fit their names."""
    import jax  # reads the environment, so not before tests/conftest.py has set it

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


@contextlib.contextmanager
def axes_checked() -> Iterator[None]:
    """Check calls into the package.

    Raises AssertionError at the end, with all arrays that do not fit their names.
    """
    global _found
    before, _found = _found, []
    try:
        yield
    finally:
        found, _found = _found, before
    assert not found, "arrays do not fit their names:\n" + "\n".join(dict.fromkeys(found))


def _check(where: str, variables: Mapping[str, object]) -> None:
    if _found is not None:
        _found.extend(f"{where}: {what}" for what in contradictions(variables))


def _when_returned(value: object) -> object:
    """Check the variables of the function that returns a value."""
    if _found is not None and value is not None:
        frame = sys._getframe(1)
        module = frame.f_globals["__name__"]
        _check(f"{module}.{frame.f_code.co_qualname}", frame.f_locals)
    return value


class _Returns(ast.NodeTransformer):
    """Pass what functions return or yield through `_when_returned`."""

    def _passed(self, value: ast.expr) -> ast.expr:
        call = ast.Call(ast.Name(_RETURNED, ast.Load()), [value], [])
        return ast.fix_missing_locations(ast.copy_location(call, value))

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is not None:
            node.value = self._passed(node.value)
        return node

    def visit_Yield(self, node: ast.Yield) -> ast.AST:
        self.generic_visit(node)
        if node.value is not None:
            node.value = self._passed(node.value)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self.generic_visit(node)
        node.body = self._passed(node.body)
        return node


def _created(where: str, init: Callable[..., None]) -> Callable[..., None]:
    """Check the arguments of a class's `__init__`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: Any, **options: Any) -> None:
        if _found is not None:
            given = signature.bind(*args, **options)
            given.apply_defaults()
            _check(where, given.arguments)
        init(*args, **options)

    return checked


class _Loader(SourceFileLoader):
    """Load a module with its calls checked. The bytecode is not cached, because it is another."""

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        tree = ast.parse(source, self.path)
        if any(axes(name) for name in set(re.findall(r"\w+", source.decode()))):
            tree = _Returns().visit(tree)
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _RETURNED, _when_returned)
        super().exec_module(module)
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == module.__name__:
                init = vars(value).get("__init__")
                if inspect.isfunction(init) and any(map(axes, init.__code__.co_varnames)):
                    value.__init__ = _created(f"{module.__name__}.{name}", init)  # type: ignore[misc]


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def watch_imports() -> None:
    """Add the checks to every module of the package that is imported from now on."""
    sys.meta_path.insert(0, _Finder())
