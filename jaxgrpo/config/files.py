"""Config files as modules: run with what lies beside them in reach, and what stands in them, or
anywhere else, found again by its name.

A config file is a module like any other: registered, so that dataclasses find the names in their
annotations, and under the name by which an import finds it, so that other processes can unpickle
what is of it.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import operator
import os
import pkgutil
import sys
import sysconfig
import traceback
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxgrpo.config.settings import ConfigError

CONFIG_FILE = "<config>"
"""Stands for the name of a config file's module, so that the file can be renamed."""
_OLD_PREFIX = "jaxgrpo_config_"  # how version 0.1.0 began it
_ROOT = Path(__file__).parents[2]
_OWN_PACKAGES = ("envs", "tools")
_INSTALLED = ("site-packages", "dist-packages")

_files: dict[str, Path] = {}  # the config files that were run, by their modules' names

Hint = Callable[[BaseException], str]


def _no_hint(_: BaseException) -> str:
    return ""


def run_file(path: Path, hint: Hint = _no_hint) -> types.ModuleType:
    """The module that a Python file makes, whatever its name ends in. The source is read each time:
    bytecode would go by whole seconds.

    Raises ConfigError that says in which line the file failed, with a hint.
    """
    with told(path, hint):
        name = _module_name(path, search_beside(path.parent))
        loader = importlib.machinery.SourceFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        code = loader.source_to_code(path.read_bytes(), str(path))
        with _registered(name, module):
            exec(code, vars(module))
    _files[name] = path
    return module


@contextlib.contextmanager
def _registered(name: str, module: types.ModuleType) -> Iterator[None]:
    """The module is the one of its name, and stays it unless the block raises."""
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
def told(path: Path, hint: Hint = _no_hint) -> Iterator[None]:
    """The edge to a user's file: whatever it raises becomes a ConfigError that says where."""
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
    """Have imports look in a folder first, as those of a script do, and, where it is of a package,
    in the folder that the package is in, which is returned."""
    root = folder
    while (root / "__init__.py").is_file():
        root = root.parent
    first = list(dict.fromkeys((str(folder), str(root))))
    sys.path[:] = [*first, *(entry for entry in sys.path if entry not in first)]
    _look_anew()
    return root


def search(folders: Iterable[str]) -> None:
    """Have imports look there, too, after all else."""
    sys.path.extend(one for one in folders if one not in sys.path and Path(one).is_dir())
    _look_anew()


def searched() -> list[str]:
    """The folders in which imports look for what is neither installed nor of this project: those of
    configs, the one that the program was started in, those of PYTHONPATH."""
    standard = Path(sysconfig.get_path("stdlib"))
    given = [folder for folder in map(Path, sys.path) if folder.is_absolute() and folder.is_dir()]
    own = {folder for folder in given if folder == _ROOT or standard in (folder, *folder.parents)}
    return [str(one) for one in given if one not in own and one.name not in _INSTALLED]


def _look_anew() -> None:
    importlib.invalidate_caches()
    for package in filter(None, map(sys.modules.get, _OWN_PACKAGES)):
        package.__path__ = pkgutil.extend_path(package.__path__, package.__name__)


def _module_name(path: Path, root: Path) -> str:
    """The name by which an import finds the file, unless it is another's: then one of its own."""
    parts = path.relative_to(root).with_suffix("").parts
    if path.suffix == ".py" and not any("." in part for part in parts):
        with contextlib.suppress(ImportError, ValueError):  # a parent that is no package
            spec = importlib.util.find_spec(".".join(parts))
            if spec is not None and spec.has_location and os.path.samefile(str(spec.origin), path):
                return spec.name
    return f"{_OLD_PREFIX}{zlib.crc32(bytes(path)):08x}"


def label_of(module: str, qualname: str) -> str:
    """What config.json calls a thing of a module: `envs.bfcl.suite:Bfcl`, or `<config>:Mine`."""
    return f"{CONFIG_FILE if module in _files else module}:{qualname}"


def place_of(module: str) -> str | None:
    """The config file that a module is of, if it is of one."""
    return str(_files[module]) if module in _files else None


def same_label(one: str, other: str) -> bool:
    """Whether two labels, of version 0.1.0 or later, name the same. What stands in a config file
    has only its own name."""
    one, other = _dotted(one), _dotted(other)
    if one.startswith(f"{CONFIG_FILE}."):
        return f".{other}".endswith(one.removeprefix(CONFIG_FILE))
    return one == other or (other.startswith(f"{CONFIG_FILE}.") and same_label(other, one))


def _dotted(label: str) -> str:
    module, _, rest = label.replace(":", ".").partition(".")
    return f"{CONFIG_FILE if module.startswith(_OLD_PREFIX) else module}.{rest}"


def find(label: str, place: str | None) -> Any:
    """What `label_of` and `place_of` named. Raises ConfigError that says what is not there, and
    what to do."""
    module_name, _, qualname = label.partition(":")
    if not qualname:  # version 0.1.0 wrote module.Name
        module_name, _, qualname = label.rpartition(".")
    if "<" in qualname:
        raise ConfigError(
            f"{label} was made within a function, where no name leads: give the config file itself "
            "as --config"
        )
    if module_name == CONFIG_FILE or module_name.startswith(_OLD_PREFIX):
        found: Any = _config_module(qualname, place)
    else:
        try:
            found = importlib.import_module(module_name)
        except Exception as error:  # the edge to a user's module
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{label} cannot be imported ({why})") from error
    try:
        return operator.attrgetter(qualname)(found)
    except AttributeError as error:
        raise ConfigError(f"{label} is not there any more: {error}") from error


def _config_module(qualname: str, place: str | None) -> types.ModuleType:
    give = "give that file, wherever it is now, as --config"
    if place is None:
        raise ConfigError(f"{qualname} stands in a config file, and nothing says in which: {give}")
    if not Path(place).is_file():
        raise ConfigError(
            f"{qualname} stands in the config file {place}, which is not there: {give}"
        )
    names = [name for name, file in _files.items() if str(file) == place and name in sys.modules]
    return sys.modules[names[-1]] if names else run_file(Path(place))
