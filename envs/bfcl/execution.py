"""Running tool calls on the private simulators of one episode, with the results as the official executor words them.

The official executor (`multi_turn_utils.execute_multi_turn_func_call` of the package) keeps its instances in `globals()` and evaluates
strings; it must not be shared by parallel episodes. Here each session owns its instances, and a call is a method and its arguments.
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

from envs.bfcl import guards

# These two write state of the process while they run (mpmath's constants and Python's limit on digits; a shared weather table).
_SHARED_STATE = frozenset({"logarithm", "get_outside_temperature_from_google"})
_SHARED_STATE_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Call:
    """One tool call: `Call("mv", {"source": "a.txt", "destination": "b"})`."""

    name: str
    arguments: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class CallResult:
    """What a call gave: the official result string, and whether the call did what it was asked to."""

    call: Call
    text: str
    ok: bool


class Session:
    """The simulators of one side (the policy's or the ground truth's) of one episode, and the calls that may be made on them."""

    def __init__(self, instances: Mapping[str, object], documented: Sequence[str]) -> None:
        self.instances = instances
        self._owners = {
            name: instance
            for name in documented
            for instance in instances.values()
            if hasattr(type(instance), name)
        }

    def run(self, call: Call) -> CallResult:
        """Run one call. Whatever a simulator raises is a result too: official semantics, and the only place that catches everything."""
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
    """Call and word the result while the call's number precision is still in force; leave no trace outside the instance."""
    for parameter in inspect.signature(method).parameters.values():
        if isinstance(parameter.default, list | dict) and parameter.name not in arguments:
            arguments[parameter.name] = copy.deepcopy(
                parameter.default
            )  # else all instances share one default
    shared = _shared_state() if method.__name__ in _SHARED_STATE else contextlib.nullcontext()
    with shared, decimal.localcontext():
        result = method(**arguments)
        return result_text(result), not _says_error(result)


@contextlib.contextmanager
def _shared_state() -> Iterator[None]:
    """One call at a time. mpmath lifts Python's limit on the digits of whole numbers while it reads a text, and leaves it lifted where it
    cannot read it."""
    with _SHARED_STATE_LOCK:
        limit = sys.get_int_max_str_digits()
        try:
            yield
        finally:
            sys.set_int_max_str_digits(limit)


def result_text(result: object) -> str:
    """The official wording of a result: text as it is, a dict as JSON where JSON can say it, everything else by `str`."""
    if type(result) is str:
        return result
    if type(result) is dict:
        try:
            return json.dumps(result)
        except (TypeError, ValueError, RecursionError):
            return str(result)
    return str(result)


def _says_error(result: object) -> bool:
    """Whether a simulator reports failure: `{"error": ...}`, or a list that holds one such item or the text "Error: ..."."""
    if isinstance(result, dict):
        return "error" in result
    if isinstance(result, list) and len(result) == 1:
        return _says_error(result[0]) or (
            isinstance(result[0], str) and result[0].startswith("Error: ")
        )
    return False


def parse_call(text: str, signatures: Mapping[str, inspect.Signature]) -> Call:
    """A ground-truth call from its text, never evaluated; positional arguments get their names.

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
            raise ValueError(f"a call with ** cannot be read: {text!r}")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return Call(node.func.id, arguments)
