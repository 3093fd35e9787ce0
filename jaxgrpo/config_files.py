"""Config files as modules: run with what lies beside them in reach, and what stands in them, or anywhere, found again by its name.

A config file is a module like any other: registered, so that dataclasses find the names in their annotations, and under the name by which
an import finds it, so that other processes can unpickle what is of it.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import operator
import os
import pkgutil
import sys
import traceback
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CONFIG_FILE = "<config>"
"""Stands for the name of a config file's module, so that the file can be renamed."""
_OLD_PREFIX = "jaxgrpo_config_"  # how version 0.1.0 began it
_ROOT = Path(__file__).parents[1]
_OWN_PACKAGES = ("envs", "tools")
_INSTALLED = ("site-packages", "dist-packages")

_files: dict[str, Path] = {}  # the config files that were run, by their modules' names


class ConfigError(ValueError):
    """Something the user gave that cannot be: says what was given, what is allowed and what to do."""


def run_file(path: Path, hint: Callable[[BaseException], str] = lambda error: "") -> types.ModuleType:
    """The module that a Python file makes, whatever its name ends in. Its source is read anew each time: bytecode goes by whole seconds.

    Raises ConfigError that says in which line the file failed, with a hint.
    """
    with told(path, hint):
        loader = importlib.machinery.SourceFileLoader(_module_name(path, search_beside(path.parent)), str(path))
        spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        before = sys.modules.get(loader.name)
        sys.modules[loader.name] = module
        try:
            exec(loader.source_to_code(loader.get_data(str(path)), str(path)), vars(module))
        except BaseException:
            del sys.modules[loader.name]
            if before is not None:
                sys.modules[loader.name] = before
            raise
    _files[loader.name] = path
    return module


@contextlib.contextmanager
def told(path: Path, hint: Callable[[BaseException], str] = lambda error: "") -> Iterator[None]:
    """The edge to a user's file: whatever it raises becomes a ConfigError that says where."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{_place(path, error)}: {type(error).__name__}: {error}{hint(error)}") from error


def _place(path: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def search_beside(folder: Path) -> Path:
    """Have imports look in a folder first, as those of a script do, and, where it is within a package, in the folder that the package is
    in, which is returned."""
    root = folder
    while (root / "__init__.py").is_file():
        root = root.parent
    first = list(dict.fromkeys((str(folder), str(root))))
    sys.path[:] = [*first, *(entry for entry in sys.path if entry not in first)]
    importlib.invalidate_caches()
    for package in filter(None, map(sys.modules.get, _OWN_PACKAGES)):
        package.__path__ = pkgutil.extend_path(package.__path__, package.__name__)
    return root


def _module_name(path: Path, root: Path) -> str:
    """The name by which an import finds the file; where there is none, because something else has it, one that nothing else has."""
    parts = path.relative_to(root).with_suffix("").parts
    if path.suffix == ".py" and all(part.isidentifier() for part in parts):
        with contextlib.suppress(ImportError, ValueError):  # of a parent that is no package, of a module without a spec
            spec = importlib.util.find_spec(".".join(parts))
            if spec is not None and spec.has_location and os.path.samefile(str(spec.origin), path):
                return spec.name
    return f"{_OLD_PREFIX}{zlib.crc32(bytes(path)):08x}"


def label_of(module: str, qualname: str) -> str:
    """How what is called `qualname` in a module is named in config.json, e.g. `envs.bfcl.suite:Bfcl`, or `<config>:Mine`."""
    return f"{CONFIG_FILE if module in _files else module}:{qualname}"


def same_label(one: str, other: str) -> bool:
    """Whether two labels, those of version 0.1.0 included, name the same. What stands in a config file has only its own name."""
    one, other = _dotted(one), _dotted(other)
    in_file = f"{CONFIG_FILE}."
    if one.startswith(in_file):
        return f".{other}".endswith(one.removeprefix(CONFIG_FILE))
    return one == other or (other.startswith(in_file) and same_label(other, one))


def _dotted(label: str) -> str:
    module, _, rest = label.replace(":", ".").partition(".")
    return f"{CONFIG_FILE if module.startswith(_OLD_PREFIX) else module}.{rest}"


def place_of(module: str) -> str | None:
    """Where a module is to be found: the config file that it is of, or the folder to look in; None for what is installed, or built in."""
    if module in _files:
        return str(_files[module])
    found = sys.modules.get(module)
    file = vars(found).get("__file__") if found is not None else None
    if file is None or module == "__main__" or module.partition(".")[0] in sys.stdlib_module_names:
        return None
    folder = Path(file).parent
    for _ in range(module.count(".") + ("__path__" in vars(found))):
        folder = folder.parent
    return None if folder == _ROOT or folder.name in _INSTALLED else str(folder)


def find(label: str, place: str | None) -> Any:
    """What has this label, in the place that `place_of` said. Raises ConfigError that says what is not there and what to do."""
    module_name, _, qualname = (label if ":" in label else ":".join(label.rsplit(".", 1))).partition(":")
    if "<" in qualname:
        raise ConfigError(f"{label} was made within a function, where no name leads: give the config file itself as --config")
    if module_name == CONFIG_FILE or module_name.startswith(_OLD_PREFIX):
        found: Any = _config_module(qualname, place)
    else:
        if place is not None and place not in sys.path and Path(place).is_dir():
            search_beside(Path(place))
        try:
            found = importlib.import_module(module_name)
        except Exception as error:  # the edge to a user's module
            where = "" if place is None else f" from {place}"
            raise ConfigError(f"{label} cannot be imported{where} ({type(error).__name__}: {error})") from error
    try:
        return operator.attrgetter(qualname)(found)
    except AttributeError as error:
        raise ConfigError(f"{label} is not there any more: {error}") from error


def _config_module(qualname: str, place: str | None) -> types.ModuleType:
    give = "give that file, wherever it is now, as --config"
    if place is None:
        raise ConfigError(f"{qualname} stands in a config file, and nothing says in which: {give}")
    if not Path(place).is_file():
        raise ConfigError(f"{qualname} stands in the config file {place}, which is not there: {give}")
    ran = [sys.modules[name] for name, path in _files.items() if str(path) == place and name in sys.modules]
    return ran[-1] if ran else run_file(Path(place))
