"""Run tool calls on the simulators of one episode, and word results as the official executor does.

The official executor (`multi_turn_utils.execute_multi_turn_func_call` of the package) keeps its
instances in `globals()` and evaluates strings, so parallel episodes cannot share it. Here each
session owns its instances, and a call is a method with arguments.
"""

import ast
import contextlib
import copy
import dataclasses
import decimal
import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxgrpo.envs.bfcl import guards

# The first writes mpmath's constants and Python's limit on digits, the second a shared table.
_SHARED_STATE = frozenset({"logarithm", "get_outside_temperature_from_google"})
_SHARED_STATE_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Call:
    """One tool call: `Call("mv", {"source": "a.txt", "destination": "b"})`."""

    name: str
    arguments: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class CallResult:
    """The result of a call: the official text, and whether the call succeeded."""

    call: Call
    text: str
    ok: bool


class Session:
    """The simulators of one episode, for the policy or for the ground truth."""

    def __init__(self, instances: Mapping[str, object], documented: Sequence[str]) -> None:
        self.instances = instances
        self._owners = {
            name: instance
            for name in documented
            for instance in instances.values()
            if hasattr(type(instance), name)
        }

    def run(self, call: Call) -> CallResult:
        """Run one call. As in the official executor, an exception of a simulator is a result."""
        instance = self._owners.get(call.name)
        if instance is None:
            return CallResult(
                call,
                f"Error during execution: there is no tool named '{call.name[:100]}'",
                ok=False,
            )
        refused = guards.refusal(call.name, call.arguments, instance)
        if refused is not None:
            return CallResult(call, f"Error during execution: {refused}", ok=False)
        try:
            text, ok = _invoke(getattr(instance, call.name), copy.deepcopy(dict(call.arguments)))
        except Exception as error:
            return CallResult(call, f"Error during execution: {error}", ok=False)
        return CallResult(call, text, ok)


def _invoke(method: Callable[..., object], arguments: dict[str, object]) -> tuple[str, bool]:
    """Call the method, and word its result while the precision of decimals still holds."""
    for parameter in inspect.signature(method).parameters.values():
        if isinstance(parameter.default, list | dict) and parameter.name not in arguments:
            # otherwise all instances would share one mutable default
            arguments[parameter.name] = copy.deepcopy(parameter.default)
    shared = _shared_state() if method.__name__ in _SHARED_STATE else contextlib.nullcontext()
    with shared, decimal.localcontext():
        result = method(**arguments)
        return result_text(result), not _says_error(result)


@contextlib.contextmanager
def _shared_state() -> Iterator[None]:
    """Run one call at a time, and restore Python's limit on the digits of integers.

    mpmath lifts that limit to read a text. If it cannot read the text, it does not restore it.
    """
    with _SHARED_STATE_LOCK:
        limit = sys.get_int_max_str_digits()
        try:
            yield
        finally:
            sys.set_int_max_str_digits(limit)


def result_text(result: object) -> str:
    """Word a result officially: text as it is, a dict as JSON if possible, the rest by `str`."""
    if type(result) is str:
        return result
    if type(result) is dict:
        try:
            return json.dumps(result)
        except (TypeError, ValueError, RecursionError):
            return str(result)
    return str(result)


def _says_error(result: object) -> bool:
    """Whether a result reports a failure.

    It does if it is `{"error": ...}`, or a list of one such item or of one text "Error: ...".
    """
    if isinstance(result, dict):
        return "error" in result
    if isinstance(result, list) and len(result) == 1:
        return _says_error(result[0]) or (
            isinstance(result[0], str) and result[0].startswith("Error: ")
        )
    return False


def parse_call(text: str, signatures: Mapping[str, inspect.Signature]) -> Call:
    """Parse the text of a ground-truth call without evaluating it. Name positional arguments.

    >>> parse_call("cd('documents')", {"cd": inspect.signature(lambda folder: None)})
    Call(name='cd', arguments={'folder': 'documents'})
    """
    node = ast.parse(text.strip(), mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"not a tool call: {text!r}")
    names = [name for name in signatures[node.func.id].parameters if name != "self"]
    arguments = {
        name: ast.literal_eval(value) for name, value in zip(names, node.args, strict=False)
    }
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"a call with ** is not supported: {text!r}")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return Call(node.func.id, arguments)
