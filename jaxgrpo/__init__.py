import importlib.machinery
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType


def _end(*_: int | FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # One of this package's programs is being imported, which takes seconds and leaves nothing to clean
    # up. Its `run_program` (jaxgrpo.background) takes over from here.
    signal.signal(signal.SIGINT, _end)


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
