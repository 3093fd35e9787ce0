"""Suites of jaxgrpo served as OpenEnv environments, and played by OpenEnv's own client and by ours.

python -m pytest -m openenv tests/tools/test_serve_openenv.py
"""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.openenv import OpenEnv
from jaxgrpo.envs.openenv.sessions import OpenEnvError
from jaxgrpo.envs.procedural import Warehouse
from jaxgrpo.tools import serve_openenv
from jaxgrpo.types import StopReason
from tests.rollout_fakes import EchoEnvironment
from tests.training import Letters

pytestmark = pytest.mark.openenv
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Echo(Letters):
    """Answers every turn, and raises if it is told so."""

    def create(self, task: Any) -> Any:
        return Broken()


class Broken(EchoEnvironment):
    closed = 0

    def step(self, action: str) -> Any:
        if action == "raise":
            raise KeyError("no such seat")
        return super().step(action)

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serves a suite; returns the URL."""
    from jaxgrpo.tools.openenv_server import application
    from tests.openenv_toys import serving

    running = []

    def serve(suite: Any, sessions: int = 8, max_turns: int = 50) -> str:
        running.append(serving(application(suite, sessions, max_turns)))
        return running[-1].__enter__()[0]

    yield serve
    for one in running:
        one.__exit__(None, None, None)


@pytest.fixture
def client() -> Iterator[Any]:
    """Connects OpenEnv's own client to a URL."""
    from openenv.core import GenericEnvClient

    connected = []

    def client(url: str) -> Any:
        connected.append(GenericEnvClient(url).sync())
        return connected[-1].connect()

    yield client
    for one in connected:
        one.close()


def until(true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)


def play(suite: Any, task: Any, turns: Sequence[str]) -> tuple[Any, ...]:
    """Play turns, and return all that was seen, why the episode ended, and its score."""
    environment = suite.create(task)
    seen, end = [environment.observe()], None
    for turn in turns:
        result = environment.step(turn)
        seen.append(result.observation)
        if result.done:
            end = result.stop_reason
            break
    score = environment.score()
    if isinstance(suite, OpenEnv):
        environment.close()
    return seen, end, (score.reward, score.passed, dict(score.parts))


@pytest.mark.parametrize(
    ("suite", "passing"),
    [
        (Bfcl(), 200),  # with one user turn, its calls are all that is checked
        (Bfcl(max_turns=9, protocol="native", reward="call_match", categories=("miss_func",)), 0),
    ],
    ids=["official", "call_match"],
)
def test_bfcl_through_openenv_is_bfcl(serve: Any, suite: Bfcl, passing: int) -> None:
    """Every task by its ground truth, which passes, by the first turn of it alone, by an end at
    once, and by nonsense."""
    served = OpenEnv(serve(suite), text_field="text", final_action={"end": True})
    passed = 0
    for split in ("train", "test"):
        ours, theirs = suite.tasks(split), served.tasks(split)
        assert [(t.id, t.labels) for t in ours] == [(t.id, t.labels) for t in theirs]
        for own, other in zip(ours, theirs, strict=True):
            demonstration = suite.demonstration(own)
            direct = play(suite, own, demonstration)
            assert play(served, other, demonstration) == direct
            assert direct[2][1]
            for turns in (demonstration[:1], demonstration[-1:], ("nonsense",)):
                direct = play(suite, own, turns)
                assert play(served, other, turns) == direct
                passed += direct[2][1]
    assert passed == passing


def test_openenvs_own_client_plays_an_episode(serve: Any, client: Any) -> None:
    suite = Warehouse(train_size=3, test_size=2)
    session = client(serve(suite))
    (task,) = [task for task in suite.tasks("train") if task.id == "warehouse_train_1"]
    opened = session.reset(task_id="warehouse_train_1")
    assert opened.observation["messages"][1]["content"] == task.payload.request  # type: ignore[attr-defined]
    assert opened.observation["stop_strings"] == ["</tool>", "<TASK_FINISHED>", "<TASK_ERROR>"]
    assert (opened.reward, opened.done) == (None, False)
    *turns, end = suite.demonstration(task)
    for turn in turns:
        result = session.step({"text": turn})
        assert not result.done and "<tool_result>" in result.observation["messages"][0]["content"]
    result = session.step({"text": end})
    assert (result.done, result.reward) == (True, 1.0)
    assert result.observation["passed"] is True
    assert result.observation["stop_reason"] == "finished"
    assert session.state()["step_count"] == len(turns) + 1


def test_a_task_is_chosen_by_id_by_index_or_by_seed(serve: Any, client: Any) -> None:
    session = client(serve(Warehouse(train_size=5, test_size=2)))

    def opened(**arguments: Any) -> str:
        return session.reset(**arguments).observation["task_id"]

    assert opened(task_id="warehouse_test_1") == "warehouse_test_1"
    assert opened(split="test", index=0) == "warehouse_test_0"
    assert opened(split="train", index=4, seed=3) == "warehouse_train_4"
    drawn = [opened(seed=seed) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert all(name.startswith("warehouse_train_") for name in drawn)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"task_id": "warehouse_tain_1"},
            "no task 'warehouse_tain_1'; did you mean 'warehouse_train_1'?",
        ),
        ({"task_id": 5}, "no task '5'"),
        ({"split": "test", "index": 2}, "no index 2: split 'test' has the tasks 0 to 1"),
        ({"index": -1}, "no index -1"),
        ({"index": "1"}, "an index must be a whole number, got '1'"),
        ({"split": "dev", "index": 0}, "no split 'dev': the splits are train, test"),
        ({"seed": {"a": 1}}, "seed"),
        ({"task": 1}, "reset takes seed, episode_id, task_id, split and index, not task"),
    ],
)
def test_a_task_that_does_not_exist_is_an_error(
    serve: Any, client: Any, arguments: dict[str, Any], told: str
) -> None:
    session = client(serve(Warehouse(train_size=3, test_size=2)))
    with pytest.raises(RuntimeError, match=re.escape(told)):
        session.reset(**arguments)
    assert session.reset(index=0).observation["task_id"] == "warehouse_train_0"  # it goes on


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ({"text": 5}, "VALIDATION_ERROR"),
        ({"words": "x"}, "VALIDATION_ERROR"),
        ({"text": "x", "end": "perhaps"}, "VALIDATION_ERROR"),
    ],
)
def test_an_action_that_is_none_changes_nothing(
    serve: Any, client: Any, action: dict[str, Any], told: str
) -> None:
    session = client(serve(Echo()))
    session.reset(index=0)
    with pytest.raises(RuntimeError, match=told):
        session.step(action)
    result = session.step({"text": "done"})
    assert (result.done, result.reward) == (True, 0.0)


def test_steps_without_an_episode_are_errors(serve: Any, client: Any) -> None:
    session = client(serve(Echo()))
    with pytest.raises(
        RuntimeError, match="there is no episode, or it is over: send a reset first"
    ):
        session.step({"text": "x"})
    session.reset(index=0)
    session.step({"text": "done"})
    with pytest.raises(RuntimeError, match="there is no episode, or it is over"):
        session.step({"text": "x"})


def test_an_episode_is_scored_when_its_turns_run_out_or_its_client_ends_it(
    serve: Any, client: Any
) -> None:
    session = client(serve(Echo(), max_turns=2))
    session.reset(index=0)
    assert not session.step({"text": "x"}).done
    result = session.step({"text": "x"})
    assert (result.done, result.reward, result.observation["passed"]) == (True, 2.0, False)
    assert result.observation["stop_reason"] == "step_limit"
    session.reset(index=0)
    session.step({"text": "x"})
    result = session.step({"end": True})
    assert (result.done, result.reward) == (True, 1.0)
    assert result.observation["stop_reason"] == "token_limit"


def test_a_suite_that_raises_ends_the_episode_but_not_the_session(serve: Any, client: Any) -> None:
    Broken.closed = 0
    session = client(serve(Echo()))
    session.reset(index=0)
    with pytest.raises(RuntimeError, match="no such seat"):
        session.step({"text": "raise"})
    with pytest.raises(RuntimeError, match="there is no episode"):
        session.step({"text": "x"})
    assert Broken.closed == 1
    session.reset(index=0)
    session.reset(index=1)  # an episode that is left is closed
    session.close()  # which does not wait for the server
    until(lambda: Broken.closed == 3)


def test_sessions_play_side_by_side_up_to_the_limit(serve: Any, client: Any) -> None:
    suite = Warehouse(train_size=6, test_size=1)
    url = serve(suite, sessions=6)
    rewards: dict[int, float] = {}
    ready = threading.Barrier(6)

    def run(index: int) -> None:
        session = client(url)
        session.reset(index=index)
        ready.wait(30)
        for turn in suite.demonstration(suite.tasks("train")[index]):
            result = session.step({"text": turn})
        rewards[index] = result.reward
        ready.wait(30)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert rewards == dict.fromkeys(range(6), 1.0)
    with pytest.raises(RuntimeError, match="CAPACITY_REACHED"):
        client(url).reset(index=0)


def test_a_browser_on_another_site_and_a_client_without_the_key_are_refused() -> None:
    from jaxgrpo.tools.openenv_server import Guard, application
    from tests.openenv_toys import serving

    app = application(Echo(), 4, 9)
    with serving(Guard(app, serve_openenv.LOOPBACK)) as (url, _):
        assert httpx2.get(f"{url}/health").status_code == 200
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            answer = httpx2.get(f"{url}/health", headers=headers)
            assert (answer.status_code, answer.headers["content-type"]) == (403, "text/plain")
    with serving(Guard(app, (), "secret")) as (url, _), pytest.MonkeyPatch.context() as patched:
        with pytest.raises(OpenEnvError, match="answered with status 403: send the key"):
            OpenEnv(url, text_field="text").tasks("train")
        suite = OpenEnv(url, text_field="text", key_variable="SERVED_KEY")
        with pytest.raises(OpenEnvError, match="the environment variable SERVED_KEY is not set"):
            suite.tasks("train")
        patched.setenv("SERVED_KEY", "wrong")
        with pytest.raises(OpenEnvError, match="403"):
            dataclasses.replace(suite).tasks("train")
        patched.setenv("SERVED_KEY", "secret")
        suite = dataclasses.replace(suite)
        assert play(suite, suite.tasks("train")[0], ["done"])[1:] == (
            StopReason.FINISHED,
            (0.0, True, {"calls": 0.0}),
        )
        open_to_all = OpenEnv(url, text_field="text", train_size=1)
        with pytest.raises(OpenEnvError, match="403"):
            open_to_all._source.open().reset({})


def test_the_command_serves_until_it_is_interrupted() -> None:
    command = [
        sys.executable,
        "-m",
        "jaxgrpo.tools.serve_openenv",
        "--suite",
        "jaxgrpo.envs.procedural:Warehouse",
        "--set",
        "environment.train_size=3",
        "--port",
        "0",
        "--splits",
        "train",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as run:
        try:
            assert run.stdout is not None
            line = run.stdout.readline()
            found = re.fullmatch(
                r"Warehouse with 3 tasks of train at (http://127.0.0.1:\d+)\n", line
            )
            assert found
            suite = OpenEnv(found[1], text_field="text")
            (task, *_) = suite.tasks("train")
            demonstration = Warehouse(train_size=3).demonstration(
                Warehouse(train_size=3).tasks("train")[0]
            )
            assert play(suite, task, demonstration)[2][0] == 1.0
            run.send_signal(signal.SIGINT)
            assert run.wait(20) == 130
        finally:
            run.kill()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--suite", "jaxgrpo.envs.procedural"],
            "--suite must be like jaxgrpo.envs.bfcl:Bfcl, got 'jaxgrpo.envs.procedural'",
        ),
        (["--suite", "envs.nothing:X"], "envs.nothing:X cannot be imported"),
        (["--suite", "jaxgrpo.envs.openenv:OpenEnv"], "cannot be made without settings"),
        (
            ["--suite", "jaxgrpo.envs.procedural:Warehouse", "--set", "environment.size=3"],
            "unknown setting",
        ),
        (
            ["--suite", "jaxgrpo.envs.procedural:Warehouse", "--host", "0.0.0.0"],
            "set JAXGRPO_OPENENV_KEY to a key",
        ),
        (
            ["--suite", "jaxgrpo.envs.procedural:Warehouse", "--port", "70000"],
            "choose another --port",
        ),
        (["--suite", "jaxgrpo.envs.procedural:Warehouse", "--splits", "dev"], "no split 'dev'"),
        (["--config", "no/such.py"], "no config file no/such.py"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve_openenv.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_a_port_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["--suite", "jaxgrpo.envs.procedural:Warehouse", "--port", str(port)]
        assert serve_openenv.main(arguments) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
