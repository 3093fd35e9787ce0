"""Call environments and reward functions. Users' code is called here and nowhere else.

Each call has a thread and a deadline. Its result is checked, and its exception described, in the
same thread, because both may run code of a user's class.
"""

import functools
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxgrpo import checked
from jaxgrpo.rollout.background import BlockingCalls, DeadlineError, StuckCallsError

T = TypeVar("T")

MAX_LINE_CHARS = 500  # of an error's own text
MAX_TRACE_CHARS = 20_000
_MAX_CAUSES = 10

_HERE = Path(__file__).resolve().parents[1]
_OURS = (
    "<",  # generated code, such as a dataclass's __init__
    *(  # not the environments that come with jaxgrpo
        f"{path}/" if path.is_dir() else str(path)
        for path in _HERE.iterdir()
        if path.name not in ("envs", "configs")
    ),
)
_INSTALLED = tuple(
    f"{sysconfig.get_path(kind)}/" for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)
_METHODS: dict[str, tuple[str, ...]] = {"observe": (), "step": ("action",), "score": ()}
_OPTIONAL = {"close": ()}


class FaultyEnvironmentError(Exception):
    """The environment or a reward function raised, exceeded its deadline, or broke its contract.

    The message is one line: the exception and its place, then the call. `trace` is the whole
    traceback, for the records, and `what` names the call.
    """

    def __init__(self, line: str, trace: str = "", what: str = ""):
        super().__init__(line)
        self.trace, self.what = trace, what

    @property
    def recorded(self) -> str:
        """The line, and the traceback below it, if any."""
        return f"{self}\n\n{self.trace}" if self.trace else str(self)


class LateError(FaultyEnvironmentError):
    """A call exceeded its deadline."""


class BrokenContractError(TypeError):
    """The result of a call is not what its contract requires. A check raises it; the message
    continues the description of the call."""


async def call_user_code(
    calls: BlockingCalls,
    what: str,
    check: Callable[[object], T],
    function: Callable[..., Any],
    *args: object,
) -> T:
    """Return `check(function(*args))`, called in a thread within the deadline. `what` names the
    call in messages.

    Raises FaultyEnvironmentError for any failure, and StuckCallsError if too many calls hang.
    """
    try:
        return await calls.run(functools.partial(_guarded, what, check, function, args), what=what)
    except (FaultyEnvironmentError, StuckCallsError):
        raise
    except DeadlineError as error:
        place = _place(error.stack)
        line = f"{error}{f': it waits at {place}' if place else ''}"
        raise LateError(line, what=what) from None
    except Exception as error:  # no thread could be started
        raise FaultyEnvironmentError(f"{_line(error)}: {what} failed", what=what) from error


def _guarded(
    what: str, check: Callable[[object], T], function: Callable[..., Any], args: tuple[object, ...]
) -> T:
    """Call and check, in the thread. Turn any exception into a line and a traceback."""
    try:
        return check(function(*args))
    except BrokenContractError as error:
        place = definition(function)
        line = f"{what} {error}{f' ({place})' if place else ''}"
        raise FaultyEnvironmentError(line, what=what) from None
    except BaseException as error:  # the edge to users' code: SystemExit and KeyboardInterrupt too
        trace = checked.cut(traceback.format_exc(), MAX_TRACE_CHARS)
        line = f"{describe_error(error)}: {what} failed"
        raise FaultyEnvironmentError(line, trace, what) from None


def record_check(kind: type[T]) -> Callable[[object], T]:
    """Make a check that a result is a record of this kind."""

    def check(value: object) -> T:
        if not isinstance(value, kind):
            given, hint = type(value).__name__, async_hint(value)
            raise BrokenContractError(f"returned {given}, not {kind.__name__}{hint}")
        return checked.record(value, kind, kind.__name__)

    return check


def async_hint(value: object) -> str:
    """Return a hint if a call returned something to await."""
    if not inspect.isawaitable(value):
        return ""
    if inspect.iscoroutine(value):
        value.close()  # it will never be awaited
    return ": write it without async"


def check_environment(value: object) -> Any:
    """Check that an object has the methods of `jaxgrpo.environment.Environment`."""
    kind = type(value).__qualname__
    for name, arguments in (_METHODS | _OPTIONAL).items():
        method = getattr(value, name, None)
        if method is None and name in _OPTIONAL:
            continue
        call = f"{name}({', '.join(arguments)})"
        if not callable(method):
            hint = async_hint(value)
            raise BrokenContractError(f"returned {kind}, which has no method {call}{hint}")
        if inspect.iscoroutinefunction(method):
            raise BrokenContractError(f"returned {kind}, whose {name} is async: write it without")
        try:
            inspect.signature(method).bind(*arguments)
        except TypeError as error:
            raise BrokenContractError(
                f"returned {kind}, which cannot be asked to {call}: {error}"
            ) from None
        except ValueError:
            continue  # written in C, without a signature
    return value


def describe_error(error: BaseException) -> str:
    """Describe an error in one line: `KeyError: 'no such seat' (/home/me/seats.py, line 12, in
    step)`."""
    place = next(filter(None, map(_place_raised, _causes(error))), "")
    return f"{_line(error)} ({place})" if place else _line(error)


def _line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except BaseException:  # the edge to an error's own __str__
        text = "(its text cannot be had)"
    return f"{type(error).__name__}{f': {checked.cut(text, MAX_LINE_CHARS)}' if text else ''}"


def _causes(error: BaseException) -> list[BaseException]:
    """Return the error and the errors it was raised from."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and len(found) < _MAX_CAUSES:
        found.append(cause)
    return found


def _place_raised(error: BaseException) -> str:
    return _place(traceback.extract_tb(error.__traceback__))


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    """Return the innermost place of a stack in users' own code, or else in a library."""
    ours = [i for i, frame in enumerate(stack) if frame.filename == __file__]
    called = stack[ours[-1] + 1 :] if ours else stack
    frames = [frame for frame in called if not frame.filename.startswith(_OURS)]
    own = [frame for frame in frames if not frame.filename.startswith(_INSTALLED)] or frames
    return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else ""


def definition(function: Callable[..., Any]) -> str:
    """Return where a function is defined."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}" if code else ""
