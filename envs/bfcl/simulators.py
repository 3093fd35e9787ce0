"""BFCL's simulator classes, loaded from the unpacked package into private modules.

Isolation: the modules enter neither `sys.modules` nor `sys.path`. Four things in them depend on the process in the original and
are made private or fixed here, because episodes run in many threads, and runs are resumed:

- the precision of `mpmath` (`MathAPI.logarithm` sets it): the module gets an mpmath context of its own;
- today's date (`TravelAPI.verify_traveler_information`): fixed to the day of the package's release, so that the same actions always give
  the same observations, and midnight cannot fall between the policy's call and the ground truth's;
- sets, which print in an order that depends on the process, are replaced by ones that do not (`stable_sets.py`);
- module-level tables that long-context scenarios hand out by reference: instances get deep copies (`create_instances`).
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

from envs.bfcl import stable_sets
from envs.bfcl.source import RELEASES, Package, SourceError

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
    """`datetime` whose today is always this day."""

    class FixedToday(datetime.datetime):
        @classmethod
        def today(cls) -> "FixedToday":
            return cls(day.year, day.month, day.day)

    return FixedToday


def load_classes(package: Package) -> Mapping[str, type]:
    """The simulator classes by their names in the data; loaded once a package. Raises SourceError when one is not as expected."""
    with _LOADING:
        return _load_classes(package)


@functools.cache
def _load_classes(package: Package) -> Mapping[str, type]:
    try:
        return _load_all(package)
    except (OSError, ImportError, SyntaxError, AttributeError) as error:
        raise SourceError(
            f"the simulators in {package.folder} are not understood ({type(error).__name__}: {error}); "
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
    """Execute one file as a module of its own. Its imports of sibling files are answered from `siblings`."""

    def private_import(target: str, *rest: Any, **named: Any) -> types.ModuleType:
        return (
            siblings[target] if target in siblings else builtins.__import__(target, *rest, **named)
        )

    file = folder / f"{name}.py"
    module = types.ModuleType(f"{__package__}.isolated.{name}")
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": private_import}
    module.__dict__[stable_sets.NAME] = stable_sets.StableSet
    exec(stable_sets.stabilized(file.read_bytes(), str(file)), module.__dict__)
    return module


def create_instances(
    classes: Mapping[str, type], involved: Sequence[str], config: str, long_context: bool
) -> dict[str, object]:
    """Fresh private instances of the involved classes, from the JSON text of the initial configuration (which they mutate)."""
    scenario = json.loads(config)
    instances = {}
    for name in involved:
        instance = classes[name]()
        if name not in STATELESS:
            instance._load_scenario(scenario.get(name, {}), long_context=long_context)
        instances[name] = copy.deepcopy(instance) if long_context else instance
    return instances
