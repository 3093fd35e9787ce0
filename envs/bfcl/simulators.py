"""Load BFCL's simulator classes from the unpacked package into private modules.

The modules enter neither `sys.modules` nor `sys.path`. Episodes run in many threads, and runs are
resumed. Therefore four things that depend on the process in the original do not here:

- The precision of `mpmath`, which `MathAPI.logarithm` sets: the module gets an mpmath context of
  its own.
- Today's date, which `TravelAPI.verify_traveler_information` reads: it is the day of the package's
  release. Observations do not depend on the day, and midnight cannot fall between the policy's call
  and the ground truth's.
- The order in which sets print: they are replaced by sets with a fixed order (`stable_sets.py`).
- Module-level tables that long-context scenarios hand out by reference: instances get deep copies
  (`create_instances`).
"""

import builtins
import copy
import datetime
import functools
import json
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mpmath

from jaxgrpo.envs.bfcl import stable_sets
from jaxgrpo.envs.bfcl.source import RELEASES, Package, SourceError

MODULES = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
DOCS = {name: f"{module}.json" for name, module in MODULES.items()}
STATELESS = ("MathAPI",)  # has no scenario to load

_ORIGINAL_PREFIX = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
_LOADING = threading.Lock()


def _datetime_on(day: datetime.date) -> type[datetime.datetime]:
    """Return a `datetime` class whose `today()` is always this day."""

    class FixedToday(datetime.datetime):
        @classmethod
        def today(cls) -> "FixedToday":
            return cls(day.year, day.month, day.day)

    return FixedToday


def load_classes(package: Package) -> Mapping[str, type]:
    """Return the simulator classes by their names in the data. They are loaded once per package.

    Raises SourceError if one is not as expected.
    """
    with _LOADING:
        return _load_classes(package)


@functools.cache
def _load_classes(package: Package) -> Mapping[str, type]:
    try:
        return _load_all(package)
    except (OSError, ImportError, SyntaxError, AttributeError) as error:
        raise SourceError(
            f"the simulators in {package.folder} are not as expected "
            f"({type(error).__name__}: {error}); "
            f"known releases: {', '.join(r.version for r in RELEASES.values())}"
        ) from error


def _load_all(package: Package) -> Mapping[str, type]:
    folder = package.folder / "eval_checker" / "multi_turn_eval" / "func_source_code"
    siblings = {f"{_ORIGINAL_PREFIX}.long_context": _load_module("long_context", folder, {})}
    loaded = {name: _load_module(module, folder, siblings) for name, module in MODULES.items()}
    context = mpmath.MPContext()
    loaded["MathAPI"].__dict__["mpmath"] = types.SimpleNamespace(mp=context, log=context.log)
    loaded["TravelAPI"].__dict__["datetime"] = _datetime_on(package.release.published)
    return types.MappingProxyType({name: getattr(module, name) for name, module in loaded.items()})


def _load_module(
    name: str, folder: Path, siblings: Mapping[str, types.ModuleType]
) -> types.ModuleType:
    """Execute one file as a private module. `siblings` answers its imports of sibling files."""

    def private_import(target: str, *rest: Any, **named: Any) -> types.ModuleType:
        if target in siblings:
            return siblings[target]
        return builtins.__import__(target, *rest, **named)

    file = folder / f"{name}.py"
    module = types.ModuleType(f"{__package__}.isolated.{name}")
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": private_import}
    module.__dict__[stable_sets.NAME] = stable_sets.StableSet
    exec(stable_sets.stabilized(file.read_bytes(), str(file)), module.__dict__)
    return module


def create_instances(
    classes: Mapping[str, type], involved: Sequence[str], config: str, long_context: bool
) -> dict[str, object]:
    """Create instances of the involved classes from the JSON text of the initial configuration."""
    scenario = json.loads(config)
    instances = {}
    for name in involved:
        instance = classes[name]()
        if name not in STATELESS:
            instance._load_scenario(scenario.get(name, {}), long_context=long_context)
        instances[name] = copy.deepcopy(instance) if long_context else instance
    return instances
