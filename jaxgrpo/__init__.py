import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from jaxgrpo import startup  # noqa: F401 - takes Ctrl-C while the rest is imported


def _import_beside(name: str) -> None:
    """Import the package that lies beside this one. `python -m` looks in the current folder first,
    where a user may have a folder of that name; its modules are found too, after this project's
    (see the package's `__path__`)."""
    beside = [str(Path(__file__).parents[1])]
    spec = importlib.machinery.PathFinder.find_spec(name, beside)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return
    if name in sys.modules:  # this project's modules come first in it all the same
        ours, known = list(spec.submodule_search_locations), vars(sys.modules[name])
        known["__path__"] = [*ours, *(one for one in known.get("__path__", ()) if one not in ours)]
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_import_beside("envs")
