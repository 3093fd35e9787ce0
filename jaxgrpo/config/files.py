"""Run config files as modules, and find their classes and functions again by name.

A config file can import what lies beside it. Its module is registered, so that dataclasses find the
names in their annotations. It has the name by which an import finds it, so that other processes can
unpickle its objects.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import operator
import os
import sys
import sysconfig
import traceback
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxgrpo.config.renamed import FOLDERS, current_module
from jaxgrpo.config.settings import ConfigError
from jaxgrpo.paths import PACKAGE

CONFIG_FILE = "<config>"
"""Replaces the module name of a config file, so that the file can be renamed."""
_OLD_PREFIX = "jaxgrpo_config_"  # version 0.1.0 wrote such names
_ROOT = PACKAGE.parent
_CONFIGS = Path(os.path.realpath(PACKAGE / "configs"))
_INSTALLED = ("site-packages", "dist-packages")

_files: dict[str, Path] = {}  # the config files that were run, by module name

Hint = Callable[[BaseException], str]


def _no_hint(_: BaseException) -> str:
    return ""


def run_file(path: Path, hint: Hint = _no_hint) -> types.ModuleType:
    """Run a Python file and return its module. The name may have any suffix.

    The source is compiled each time, because cached bytecode is checked by whole seconds only.
    Raise ConfigError with the line in which the file failed, and the hint.
    """
    with located_errors(path, lambda error: hint(error) or _moved_import(error)):
        name = _own_name(path) or _module_name(path, search_beside(path.parent))
        loader = importlib.machinery.SourceFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        code = loader.source_to_code(path.read_bytes(), str(path))
        with _registered(name, module):
            exec(code, vars(module))
    _refuse_old_names(path)
    _files[name] = path
    return module


def packaged_configs() -> dict[str, Path]:
    """Return the config files that come with jaxgrpo by name, such as `article/final`."""
    files = sorted(_CONFIGS.rglob("*.py"))
    return {path.relative_to(_CONFIGS).with_suffix("").as_posix(): path for path in files}


def _own_name(path: Path) -> str:
    """Return the module name of a config that comes with jaxgrpo, or "" for any other file."""
    real = Path(os.path.realpath(path))
    if path.suffix != ".py" or _CONFIGS not in real.parents:
        return ""
    return ".".join(("jaxgrpo", "configs", *real.relative_to(_CONFIGS).with_suffix("").parts))


def _moved_import(error: BaseException) -> str:
    """Return a hint for an import of a module by the name that it had before 0.2.0."""
    old = error.name if isinstance(error, ModuleNotFoundError) else None
    new = current_module(old or "")
    return f". It is now called {new}" if old and new != old else ""


def _refuse_old_names(path: Path) -> None:
    """Raise ConfigError if a file imported a module of jaxgrpo by the name that it had before
    0.2.0, which works in a checkout. Its classes would exist twice."""
    for name in (name for name in sys.modules if name.partition(".")[0] in FOLDERS):
        file = vars(sys.modules[name]).get("__file__")
        ours = Path(os.path.realpath(PACKAGE / name.partition(".")[0]))
        if file is not None and ours in Path(os.path.realpath(file)).parents:
            raise ConfigError(
                f"{path} imports {name}, which is now called {current_module(name)}: "
                "change the import"
            )


@contextlib.contextmanager
def _registered(name: str, module: types.ModuleType) -> Iterator[None]:
    """Register a module under a name. If the block raises, restore the one from before."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise


@contextlib.contextmanager
def located_errors(path: Path, hint: Hint = _no_hint) -> Iterator[None]:
    """Turn every error of a user's file into a ConfigError that says where it was raised."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}{hint(error)}"
        raise ConfigError(f"{_place(path, error)}: {said}") from error


def _place(path: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def search_beside(folder: Path) -> Path:
    """Let imports search a folder first, as for a script. If the folder belongs to a package, also
    search the folder that holds the package. Return the last one."""
    root = folder
    while (root / "__init__.py").is_file():
        root = root.parent
    first = list(dict.fromkeys((str(folder), str(root))))
    sys.path[:] = [*first, *(entry for entry in sys.path if entry not in first)]
    importlib.invalidate_caches()
    return root


def add_import_folders(folders: Iterable[str]) -> None:
    """Let imports search these folders too, after all others."""
    sys.path.extend(one for one in folders if one not in sys.path and Path(one).is_dir())
    importlib.invalidate_caches()


def import_folders() -> list[str]:
    """Return the folders that imports search for the user's modules: those of configs, of
    PYTHONPATH, and the one in which the program was started."""
    standard = Path(sysconfig.get_path("stdlib"))
    given = [folder for folder in map(Path, sys.path) if folder.is_absolute() and folder.is_dir()]
    own = {folder for folder in given if folder == _ROOT or standard in (folder, *folder.parents)}
    return [str(one) for one in given if one not in own and one.name not in _INSTALLED]


def _module_name(path: Path, root: Path) -> str:
    """Return the name by which an import finds the file, or a new name if there is none."""
    parts = path.relative_to(root).with_suffix("").parts
    if path.suffix == ".py" and not any("." in part for part in parts):
        # a parent is not a package; the file of a module that was imported before is gone
        with contextlib.suppress(ImportError, ValueError, FileNotFoundError):
            spec = importlib.util.find_spec(".".join(parts))
            if spec is not None and spec.has_location and os.path.samefile(str(spec.origin), path):
                return spec.name
    return f"{_OLD_PREFIX}{zlib.crc32(bytes(path)):08x}"


def label_of(module: str, qualname: str) -> str:
    """Return a name for config.json, such as `jaxgrpo.envs.bfcl.suite:Bfcl` or `<config>:Mine`."""
    return f"{CONFIG_FILE if module in _files else module}:{qualname}"


def place_of(module: str) -> str | None:
    """Return the config file of a module, or None if it has none."""
    return str(_files[module]) if module in _files else None


def same_label(one: str, other: str) -> bool:
    """Return whether two labels name the same object. They may be of version 0.1.0. An object of a
    config file is compared by its own name alone."""
    one, other = _dotted(one), _dotted(other)
    if one.startswith(f"{CONFIG_FILE}."):
        return f".{other}".endswith(one.removeprefix(CONFIG_FILE))
    return one == other or (other.startswith(f"{CONFIG_FILE}.") and same_label(other, one))


def _dotted(label: str) -> str:
    module, _, rest = label.replace(":", ".").partition(".")
    return f"{CONFIG_FILE if module.startswith(_OLD_PREFIX) else module}.{rest}"


def find(label: str, place: str | None) -> Any:
    """Return the object that `label_of` and `place_of` named. Raise ConfigError if it is gone."""
    module_name, _, qualname = label.partition(":")
    if not qualname:  # version 0.1.0 wrote module.Name
        module_name, _, qualname = label.rpartition(".")
    if "<" in qualname:
        raise ConfigError(
            f"{label} was defined inside a function, so it cannot be found by name: "
            "pass the config file itself as --config"
        )
    if module_name == CONFIG_FILE or module_name.startswith(_OLD_PREFIX):
        found: Any = _config_module(qualname, place)
    else:
        try:
            found = importlib.import_module(module_name)
        except Exception as error:  # anything that a user's module raises
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{label} cannot be imported ({why})") from error
    try:
        return operator.attrgetter(qualname)(found)
    except AttributeError as error:
        raise ConfigError(f"{label} no longer exists: {error}") from error


def _config_module(qualname: str, place: str | None) -> types.ModuleType:
    advice = "pass that file, wherever it is now, as --config"
    if place is None:
        raise ConfigError(
            f"{qualname} is defined in a config file, but not said in which: {advice}"
        )
    if not Path(place).is_file():
        raise ConfigError(
            f"{qualname} is defined in the config file {place}, which does not exist: {advice}"
        )
    names = [name for name, file in _files.items() if str(file) == place and name in sys.modules]
    return sys.modules[names[-1]] if names else run_file(Path(place))
