"""The edge to users' code: environments and reward functions are called here, and nowhere else.

Each call has a thread and a deadline. What it gives is checked in that thread too, and what it
raises, whatever that is, is put into words there: nothing of a user's class is looked at elsewhere.
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
_OURS = (f"{_HERE}/", "<")
_INSTALLED = tuple(
    f"{sysconfig.get_path(kind)}/" for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)
_METHODS: dict[str, tuple[str, ...]] = {"observe": (), "step": ("action",), "score": ()}


class FaultyEnvironmentError(Exception):
    """The environment or a reward function raised, outlived its deadline, or broke its contract.

    The message is one line: what was raised and where, then what was asked for. `trace` is the whole
    traceback, for the records.
    """

    def __init__(self, line: str, trace: str = ""):
        super().__init__(line)
        self.trace = trace

    @property
    def recorded(self) -> str:
        """The line, and the traceback below it."""
        return f"{self}\n\n{self.trace}" if self.trace else str(self)


class LateError(FaultyEnvironmentError):
    """A call outlived its deadline."""


class BrokenContractError(TypeError):
    """What came back is not what was to be given: raised by a check, the message goes on from what
    was asked for."""


async def ask(
    calls: BlockingCalls, what: str, check: Callable[[object], T], function: Callable, *args: object
) -> T:
    """`check(function(*args))`, in a thread, within the deadline; `what` names it for people.

    Raises FaultyEnvironmentError for whatever goes wrong, and StuckCallsError when too much hangs.
    """
    try:
        return await calls.run(functools.partial(_guarded, what, check, function, args), what=what)
    except (FaultyEnvironmentError, StuckCallsError):
        raise
    except DeadlineError as error:
        place = _place(error.stack)
        raise LateError(f"{error}{f': it waits at {place}' if place else ''}") from None
    except Exception as error:  # there was no thread to be had
        raise FaultyEnvironmentError(f"{_line(error)}: {what} failed") from error


def _guarded(what: str, check: Callable[[object], T], function: Callable, args: tuple) -> T:
    """In the thread: call and check. Whatever is raised becomes a line and a traceback."""
    try:
        return check(function(*args))
    except BrokenContractError as error:
        place = _definition(function)
        line = f"{what} {error}{f' ({place})' if place else ''}"
        raise FaultyEnvironmentError(line) from None
    except BaseException as error:  # the edge to users' code: SystemExit and KeyboardInterrupt too
        trace = checked.cut(traceback.format_exc(), MAX_TRACE_CHARS)
        raise FaultyEnvironmentError(f"{described(error)}: {what} failed", trace) from None


def returned(kind: type[T]) -> Callable[[object], T]:
    """A check of what came back: a record of this kind."""

    def check(value: object) -> T:
        if not isinstance(value, kind):
            raise BrokenContractError(f"returned {type(value).__name__}, not {kind.__name__}")
        return checked.record(value, kind, kind.__name__)

    return check


def playable(value: object) -> Any:
    """A check of what a suite creates: it has the methods of `jaxgrpo.environment.Environment`."""
    kind = type(value).__qualname__
    for name, arguments in _METHODS.items():
        method = getattr(value, name, None)
        call = f"{name}({', '.join(arguments)})"
        if not callable(method):
            raise BrokenContractError(f"returned {kind}, which has no method {call}")
        if inspect.iscoroutinefunction(method):
            raise BrokenContractError(f"returned {kind}, whose {name} is async: write it without")
        try:
            inspect.signature(method).bind(*arguments)
        except TypeError as error:
            raise BrokenContractError(
                f"returned {kind}, which cannot be asked to {call}: {error}"
            ) from None
        except ValueError:
            continue  # written in C: its signature is not known
    return value


def described(error: BaseException) -> str:
    """An error in one line, e.g. `KeyError: 'no such seat' (/home/me/seats.py, line 12, in step)`."""
    place = next(filter(None, map(_place_raised, _causes(error))), "")
    return f"{_line(error)} ({place})" if place else _line(error)


def _line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except BaseException:  # the edge to an error's own __str__
        text = "(its text cannot be had)"
    return f"{type(error).__name__}{f': {checked.cut(text, MAX_LINE_CHARS)}' if text else ''}"


def _causes(error: BaseException) -> list[BaseException]:
    """The error, and what it was raised from."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and len(found) < _MAX_CAUSES:
        found.append(cause)
    return found


def _place_raised(error: BaseException) -> str:
    return _place(traceback.extract_tb(error.__traceback__))


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    """Where in the users' own code a stack is, or else in the libraries that it calls."""
    ours = [i for i, frame in enumerate(stack) if frame.filename == __file__]
    called = stack[ours[-1] + 1 :] if ours else stack
    frames = [frame for frame in called if not frame.filename.startswith(_OURS)]
    own = [frame for frame in frames if not frame.filename.startswith(_INSTALLED)] or frames
    return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else ""


def _definition(function: Callable) -> str:
    """Where a function is defined."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}" if code else ""
