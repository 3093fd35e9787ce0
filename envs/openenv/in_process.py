"""Play an OpenEnv environment in process. It runs as OpenEnv's own server would run it.

All calls of a session come from one thread. If the environment requires it, the calls of all
sessions come from one thread. If the environment has asynchronous methods of its own, they are
preferred. OpenEnv's functions validate actions and write observations as JSON. Needs the package
openenv.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import queue
import threading
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxgrpo.envs.openenv.sessions import (
    OpenEnvError,
    RefusedActionError,
    Result,
    TaskSpec,
    refusal,
    result_of,
    specs,
)
from jaxgrpo.extensions import find_object, is_import_path

T = TypeVar("T")

_UNLIMITED = 1_000_000
_OPENING = threading.Lock()


def check_path(path: str) -> None:
    """Raise ValueError unless a path has the form `package.module:Name`."""
    if not is_import_path(path):
        raise ValueError(
            f"environment {path!r} is neither a URL nor an import path such as "
            "'my_package.server:MyEnvironment'"
        )


def load(path: str) -> Any:
    """Import `package.module:Name`. Raises OpenEnvError."""
    try:
        return find_object(path)
    except ValueError as error:
        raise OpenEnvError(str(error)) from error


def package_fault() -> str:
    """Say why the package openenv cannot be imported; "" if it can."""
    spec = importlib.util.find_spec("openenv")
    if spec is None:
        return "the package openenv is not installed: pip install 'jaxgrpo[openenv]'"
    if spec.submodule_search_locations is None:
        return f"{spec.origin} hides the package openenv: rename that file"
    return ""


def _openenv() -> Any:
    """Return OpenEnv's module of environments and servers."""
    if fault := package_fault():
        raise OpenEnvError(fault)
    return importlib.import_module("openenv.core.env_server")


@dataclasses.dataclass(frozen=True)
class InProcess:
    """An environment class, or a function that makes environments, by its import path.

    `options` are its keyword arguments. `action` is the import path of the action class, where the
    environment's annotations do not tell.
    """

    path: str
    timeout_seconds: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    action: str = ""

    def action_schema(self) -> Mapping[str, Any]:
        return dict(self.action_class.model_json_schema())

    def most_sessions(self, wanted: int) -> int:
        if self.environment_class.SUPPORTS_CONCURRENT_SESSIONS:
            return wanted or _UNLIMITED
        if wanted > 1:
            raise OpenEnvError(
                f"sessions is {wanted}, but {self.path} does not support concurrent sessions "
                "(SUPPORTS_CONCURRENT_SESSIONS): set sessions to 1"
            )
        return 1

    def check_reset(self, arguments: Mapping[str, Any]) -> None:
        reset = self.environment_class.reset
        accepted = _accepted(reset, arguments)
        refused = [name for name in arguments if name not in accepted and name != "seed"]
        if refused:
            takes = ", ".join(
                name for name in inspect.signature(reset).parameters if name != "self"
            )
            raise OpenEnvError(f"reset of {self.path} takes no {refused[0]!r}; it takes {takes}")

    def listed(self, split: str) -> list[TaskSpec] | None:
        provider = self.environment_class
        methods = ("num_tasks", "list_tasks")
        if not all(callable(getattr(provider, name, None)) for name in methods):
            return None
        session = self.open()
        try:
            count, listed = session.listed(split)
        except NotImplementedError:
            return None
        finally:
            session.close()
        return specs(split, count, [_plain(item) for item in listed])

    def open(self) -> "LocalSession":
        if not self.environment_class.REQUIRES_SINGLE_THREAD_EXECUTOR:
            return LocalSession(self, None)
        with _OPENING:
            return LocalSession(self, self._shared_worker)

    def make(self) -> Any:
        """Return a new environment."""
        return self._factory(**self.options)

    @functools.cached_property
    def _factory(self) -> Callable[..., Any]:
        found: Callable[..., Any] = load(self.path)
        if not callable(found):
            raise OpenEnvError(f"{self.path} is a {type(found).__name__}, not an environment class")
        return found

    @functools.cached_property
    def environment_class(self) -> Any:
        """The class, which for a function is that of an environment it makes."""
        base, factory = _openenv().Environment, self._factory
        if not isinstance(factory, type):
            made = self.make()
            factory = type(made)
            if isinstance(made, base):
                made.close()
        if not issubclass(factory, base):
            raise OpenEnvError(f"{self.path} is not an OpenEnv environment: {factory.__name__}")
        return factory

    @functools.cached_property
    def action_class(self) -> Any:
        """The class of actions: the one that is set, or the environment's type argument, or the
        annotation of `step`; for an MCP environment, OpenEnv's tool calls."""
        server = _openenv()
        kind = self.environment_class
        found = load(self.action) if self.action else _annotated_action(kind)
        if found is None and _is_mcp(kind):
            found = server.CallToolAction
        if not (isinstance(found, type) and issubclass(found, server.Action)):
            given = f"{self.action!r} is no class of actions" if self.action else "it is not known"
            raise OpenEnvError(
                f"the class of actions of {self.path}: {given}; set `action` to its import path, "
                "such as 'my_package.models:MyAction'"
            )
        return found

    @functools.cached_property
    def _shared_worker(self) -> "_Worker":
        return _Worker()


def _annotated_action(kind: type) -> Any:
    """Return the class of actions that an environment's annotations name, or None."""
    server = _openenv()
    named: list[Any] = []
    for base in kind.__mro__:
        for parent in vars(base).get("__orig_bases__", ()):
            named += typing.get_args(parent)[:1]
    with contextlib.suppress(Exception):  # the edge to the environment's annotations
        named.append(typing.get_type_hints(kind.step).get("action"))  # type: ignore[attr-defined]
    return next(
        (
            one
            for one in named
            if isinstance(one, type) and issubclass(one, server.Action) and one is not server.Action
        ),
        None,
    )


def _is_mcp(kind: type) -> bool:
    mcp = _openenv().MCPEnvironment  # None without the package fastmcp
    return mcp is not None and issubclass(kind, mcp)


def _accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the arguments that a function takes, as OpenEnv's server does."""
    parameters = inspect.signature(function).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def _plain(item: Any) -> Any:
    """Return a task spec as JSON data if it is a pydantic model."""
    dump = getattr(item, "model_dump", None)
    return dump() if callable(dump) else item


class LocalSession:
    """One environment and its thread."""

    def __init__(self, source: InProcess, shared: "_Worker | None"):
        self._source = source
        self._shared = shared is not None
        self._worker = shared or _Worker()
        self._environment: Any = None
        self._held = contextlib.AsyncExitStack()
        self._hangs = False

    def reset(self, arguments: Mapping[str, Any]) -> Result:
        return self._run("reset", lambda: self._reset(arguments))

    def step(self, action: Mapping[str, Any]) -> Result:
        return self._run("step", lambda: self._step(action))

    def listed(self, split: str) -> tuple[Any, list[Any]]:
        """Return what `num_tasks` and `list_tasks` return, which may be asynchronous."""

        def ask() -> tuple[Any, list[Any]]:
            made = self._open()
            found = [made.num_tasks(split), made.list_tasks(split)]
            count, listed = (
                self._worker.complete(one) if inspect.isawaitable(one) else one for one in found
            )
            return count, list(listed)

        return self._run("task discovery", ask)

    def close(self) -> None:
        """Close the environment in its thread. If that hangs, do so when it comes back."""
        try:
            if self._hangs:
                self._worker.put(self._close)
            else:
                self._run("close", self._close)
        finally:
            if not self._shared:
                self._worker.end()

    def _run(self, what: str, function: Callable[[], T]) -> T:
        seconds = self._source.timeout_seconds
        try:
            return self._worker.run(function, seconds)
        except _LateError:
            self._hangs = True
            told = f"{what} of {self._source.path} took longer than {seconds} seconds"
            raise OpenEnvError(told) from None

    def _open(self) -> Any:
        if self._environment is None:
            self._environment = self._source.make()
            session = getattr(self._environment, "mcp_session", None)
            if callable(session):  # hold it open, as OpenEnv's server does
                self._worker.complete(self._held.enter_async_context(session()))
        return self._environment

    def _reset(self, arguments: Mapping[str, Any]) -> Result:
        made, base = self._open(), _openenv().Environment
        if type(made).reset_async is not base.reset_async:
            accepted = _accepted(made.reset_async, arguments)
            return self._result(self._worker.complete(made.reset_async(**accepted)))
        return self._result(made.reset(**_accepted(made.reset, arguments)))

    def _step(self, data: Mapping[str, Any]) -> Result:
        import pydantic

        made, server = self._open(), _openenv()
        try:
            action = server.deserialize_action(dict(data), self._source.action_class)
        except pydantic.ValidationError as error:
            raise RefusedActionError(refusal(error.errors(include_context=False))) from None
        if type(made).step_async is not server.Environment.step_async:
            return self._result(self._worker.complete(made.step_async(action)))
        return self._result(made.step(action))

    def _result(self, observation: Any) -> Result:
        server = _openenv()
        if not isinstance(observation, server.Observation):
            kind = type(observation).__name__
            raise OpenEnvError(f"{self._source.path} returned {kind}, not an OpenEnv observation")
        sent = server.WSObservationResponse(data=server.serialize_observation(observation))
        return result_of(json.loads(sent.model_dump_json())["data"])

    def _close(self) -> None:
        made, self._environment = self._environment, None
        try:
            self._worker.complete(self._held.aclose())
        finally:
            if made is not None:
                made.close()


class _LateError(Exception):
    """A function took too long."""


class _Worker:
    """A daemon thread that runs functions one after another, with an event loop for those that need
    one."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, name="openenv session", daemon=True).start()

    def run(self, function: Callable[[], T], seconds: float) -> T:
        """Return the result of a function, called in the thread. Raises its exception, or
        _LateError; then the thread is still busy with it."""
        result = self.put(function)
        try:
            return result.result(seconds)
        except TimeoutError:
            if result.done():  # the function's own
                raise
            raise _LateError from None

    def put(self, function: Callable[[], T]) -> "concurrent.futures.Future[T]":
        """Have a function called in the thread, after those before it."""
        result: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._work.put(functools.partial(_deliver, result, function))
        return result

    def complete(self, awaitable: Any) -> Any:
        """Run an awaitable to its end. Called in the thread."""
        return self._loop.run_until_complete(awaitable)

    def end(self) -> None:
        """End the thread after what it has to do."""
        self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


def _deliver(result: "concurrent.futures.Future[T]", function: Callable[[], T]) -> None:
    try:
        value = function()
    except BaseException as error:  # for the caller: nothing would see it in this thread
        result.set_exception(error)
    else:
        result.set_result(value)
