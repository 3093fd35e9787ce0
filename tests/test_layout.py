"""Check that each folder imports only from the folders below it, and that imports form no cycle.

Imports inside functions and under TYPE_CHECKING count too."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("jaxgrpo", "envs", "tools", "configs", "benchmarks", "tests")

FLOORS = (
    ("jaxgrpo.starter",),
    ("jaxgrpo.tools",),
    ("jaxgrpo.configs",),
    ("jaxgrpo.envs",),
    ("jaxgrpo.commands", "jaxgrpo.init", "jaxgrpo.library"),
    ("jaxgrpo.train", "jaxgrpo.evaluate", "jaxgrpo.check"),
    ("jaxgrpo.viewer",),
    ("jaxgrpo.run",),
    ("jaxgrpo.rollout",),
    ("jaxgrpo.samplers.native", "jaxgrpo.samplers.vllm"),
    ("jaxgrpo.samplers",),
    ("jaxgrpo.storage",),
    ("jaxgrpo.learner",),
    ("jaxgrpo.models",),
    ("jaxgrpo.config",),
    ("jaxgrpo.rewards", "jaxgrpo.toolkit"),
    (
        "jaxgrpo.checked", "jaxgrpo.environment", "jaxgrpo.extensions", "jaxgrpo.interruptions",
        "jaxgrpo.json_files", "jaxgrpo.paths", "jaxgrpo.startup", "jaxgrpo.types",
    ),
)  # fmt: skip
"""From the top down. A module belongs to the longest of these names that its own name starts with.
Two folders on one floor do not import each other. The commands may, and so may the modules of the
lowest floor."""

FOR_ENVIRONMENTS = (
    "jaxgrpo.checked", "jaxgrpo.config", "jaxgrpo.environment", "jaxgrpo.extensions",
    "jaxgrpo.paths", "jaxgrpo.rewards", "jaxgrpo.toolkit", "jaxgrpo.types",
)  # fmt: skip
"""The parts of jaxgrpo that environments and configs may import. None of them imports jax."""


LINKED = ("envs", "tools", "configs")
"""Folders at the top that are packages of jaxgrpo, by links in `jaxgrpo/`."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in LINKED:
        parts = ("jaxgrpo", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for part in PARTS for path in (ROOT / part).rglob("*.py")}


def imports_in(source: str) -> Iterator[str]:
    """Yield the dotted names that a source imports, of modules and of what they define."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_in(source: str) -> list[str]:
    """Return the modules of the project that a source imports."""
    names = {
        name if name in FILES else name.rpartition(".")[0]
        for name in imports_in(source)
        if name.partition(".")[0] in PARTS
    }
    assert names <= FILES.keys(), f"no such modules: {names - FILES.keys()}"
    return sorted(names)


PACKAGES = [module for module, path in FILES.items() if path.name == "__init__.py"]


@functools.cache
def all_imports() -> dict[str, list[str]]:
    """Return the modules of the project that each of its modules imports."""
    return {module: modules_in(path.read_text()) for module, path in FILES.items()}


def is_of(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}.")


def place(module: str) -> tuple[int, str]:
    """Return the floor, counted from the top, and the folder on it."""
    found = [
        (floor, folder)
        for floor, folders in enumerate(FLOORS)
        for folder in folders
        if is_of(module, folder)
    ]
    assert found, f"{module} has no place in FLOORS"
    return max(found, key=lambda one: len(one[1]))


def is_upward(module: str, imported: str) -> bool:
    (here, folder), (there, other) = place(module), place(imported)
    beside = there == here and other != folder and folder in PACKAGES
    return there < here or beside


def upward(imports: dict[str, list[str]]) -> list[str]:
    return [
        f"{module} imports {imported}"
        for module, all_imported in imports.items()
        if is_of(module, "jaxgrpo") and module != "jaxgrpo"
        for imported in all_imported
        if imported != "jaxgrpo"
        if is_of(imported, "jaxgrpo") and is_upward(module, imported)
    ]


def cycle(imports: dict[str, list[str]]) -> list[str]:
    """Return modules that import each other in a cycle, or nothing if there is no cycle."""
    done: set[str] = set()

    def walk(module: str, above: list[str]) -> list[str]:
        if module in above:
            return [*above[above.index(module) :], module]
        if module in done:
            return []
        found = next(
            (c for one in imports.get(module, ()) if (c := walk(one, [*above, module]))), []
        )
        done.add(module)
        return found

    return next((found for module in imports if (found := walk(module, []))), [])


def test_each_folder_imports_from_those_below_it() -> None:
    inside = [module for module in FILES if is_of(module, "jaxgrpo") and module not in PACKAGES]
    assert len(inside) > 70
    assert all(place(module) for module in inside)
    assert upward(all_imports()) == []


def test_only_the_starter_uses_the_library() -> None:
    """The library imports everything else, so nothing below may import it."""
    users = [m for m, names in all_imports().items() if is_of(m, "jaxgrpo") and "jaxgrpo" in names]
    assert users and [m for m in users if not is_of(m, "jaxgrpo.starter")] == []


def test_imports_form_no_cycle() -> None:
    assert cycle(all_imports()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from jaxgrpo.run import setup",
        "import typing\nif typing.TYPE_CHECKING:\n    from jaxgrpo.run.setup import ModelAssets",
        "def assets():\n    import jaxgrpo.run.setup",
    ],
)
def test_an_upward_import_is_found(line: str) -> None:
    assert upward({"jaxgrpo.learner.update": modules_in(line)}) == [
        "jaxgrpo.learner.update imports jaxgrpo.run.setup"
    ]


def test_a_cycle_is_found() -> None:
    assert cycle({"a": ["b"], "b": ["c", "d"], "c": [], "d": ["b"]}) == ["b", "d", "b"]


def test_jaxgrpo_imports_no_benchmarks_and_no_tests() -> None:
    beside = [
        f"{m} imports {i}"
        for m in all_imports()
        if is_of(m, "jaxgrpo")
        for i in all_imports()[m]
        if not is_of(i, "jaxgrpo")
    ]
    assert beside == []


@pytest.mark.parametrize("part", ["jaxgrpo.envs", "jaxgrpo.configs"])
def test_environments_and_configs_import_only_what_they_may(part: str) -> None:
    allowed = (*FOR_ENVIRONMENTS, "jaxgrpo.envs", part)
    wrong = [
        f"{m} imports {i}"
        for m in all_imports()
        if is_of(m, part)
        for i in all_imports()[m]
        if not any(is_of(i, one) for one in allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("part", ["jaxgrpo.tools", "benchmarks"])
def test_only_tests_and_benchmarks_import_tools_and_benchmarks(part: str) -> None:
    assert [
        m
        for m in all_imports()
        if not any(is_of(m, one) for one in (part, "benchmarks", "tests"))
        if any(is_of(i, part) for i in all_imports()[m])
    ] == []


JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
NEEDED = {
    "configs and environments": [
        m
        for m in FILES
        if any(is_of(m, part) for part in ("jaxgrpo.configs", "jaxgrpo.envs", *FOR_ENVIRONMENTS))
    ],
    "vLLM's side": [m for m in FILES if is_of(m, "jaxgrpo.samplers.vllm")],
    "readers of run folders": [
        "jaxgrpo.run.records",
        "jaxgrpo.run.metrics",
        "jaxgrpo.run.pass_rates",
        "jaxgrpo.run.paired",
    ],
}
WITHOUT_JAX = f"""
import importlib, sys
sys.modules |= dict.fromkeys({JAX})  # an import of any fails
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


@pytest.mark.parametrize("side", NEEDED)
def test_these_need_no_jax(side: str) -> None:
    modules = [m for m in NEEDED[side] if m != PLUGIN]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX, *modules], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


PLUGIN = "jaxgrpo.samplers.vllm.plugin"
"""It imports vLLM, which is not installed beside jax."""


def test_the_plugin_imports_no_jax_even_indirectly() -> None:
    reached, left = set(), [PLUGIN]
    while left:
        module = left.pop()
        reached.add(module)
        left += [one for one in all_imports()[module] if one not in reached]
    assert {"jaxgrpo.storage.published_manifest", "jaxgrpo.storage.published_reader"} < reached
    wanted = {
        m: [name for name in imports_in(FILES[m].read_text()) if name.partition(".")[0] in JAX]
        for m in reached
    }
    assert not any(wanted.values()), wanted


def test_packages_are_empty() -> None:
    """Importing one module of a folder must not import the others."""
    filled = [m for m in PACKAGES if is_of(m, "jaxgrpo") and FILES[m].read_text().strip()]
    library = [m for m in filled if not is_of(m, "jaxgrpo.envs")]  # which name classes for configs
    assert library == ["jaxgrpo"]


def test_the_folders_at_the_top_are_packages_of_jaxgrpo_and_no_others() -> None:
    """With an `__init__.py`, a checkout on PYTHONPATH would hide a user's folder of the name."""
    for name in (*LINKED, "assets"):
        assert (ROOT / "jaxgrpo" / name).readlink() == Path("..", name)
        assert not (ROOT / name / "__init__.py").exists()
