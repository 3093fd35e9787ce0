"""Measure what OpenEnv costs per step and per session, in process and by URL. Needs openenv.

    python -m benchmarks.openenv [--episodes 200] [--steps 20] [--rounds 3] [--json]

A toy environment, whose own step takes a few microseconds, is played

- directly: its `step` is called with an action,
- in process and by URL, as jaxgrpo's rollouts play it (envs/openenv),
- by OpenEnv's own client, to compare with.

BFCL's training tasks are played with their ground truth, directly and as tools/serve_openenv.py
serves them. Each server runs in its own process on this machine. Each figure is the median over the
episodes of the best round. A session is everything around the steps: open, reset, score, close.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from openenv.core import GenericEnvClient
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.openenv import OpenEnv
from jaxgrpo.types import Task

TEXT = "The policy says about as much as this in one turn. " * 4


class TurnAction(Action):
    """A text."""

    text: str


class TurnObservation(Observation):
    """A text."""

    text: str


class Toy(Environment[TurnAction, TurnObservation, State]):
    """Answers with the text, and never ends."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, **_: Any) -> TurnObservation:
        """Begin."""
        return TurnObservation(text=f"Begin {seed}.")

    def step(self, action: TurnAction, timeout_s: float | None = None, **_: Any) -> TurnObservation:
        """Answer."""
        return TurnObservation(text=action.text, reward=0.0)

    @property
    def state(self) -> State:
        """None to speak of."""
        return State()


Episode = tuple[float, list[float]]
"""The seconds of a whole episode, and of each of its steps."""


def timed_steps(step: Callable[[Any], Any], actions: Sequence[Any]) -> list[float]:
    seconds = []
    for action in actions:
        start = time.perf_counter()
        step(action)
        seconds.append(time.perf_counter() - start)
    return seconds


def played(suite: Any, task: Task, turns: Sequence[str], passes: bool = False) -> Episode:
    """Play an episode of a suite. Raises RuntimeError if it should pass and does not."""
    start = time.perf_counter()
    environment = suite.create(task)
    environment.observe()
    steps = timed_steps(environment.step, turns)
    score = environment.score()
    if isinstance(suite, OpenEnv):
        environment.close()
    if passes and not score.passed:
        raise RuntimeError(f"the ground truth of {task.id} does not pass")
    return time.perf_counter() - start, steps


def played_bare(turns: Sequence[str]) -> Episode:
    """Play the toy without any protocol."""
    start = time.perf_counter()
    toy = Toy()
    toy.reset(seed=0)
    steps = timed_steps(lambda text: toy.step(TurnAction(text=text)), turns)
    toy.close()
    return time.perf_counter() - start, steps


def played_by_client(url: str, turns: Sequence[str]) -> Episode:
    """Play the toy with OpenEnv's own client."""
    start = time.perf_counter()
    with GenericEnvClient(url).sync() as client:
        client.reset(seed=0)
        steps = timed_steps(lambda text: client.step({"text": text}), turns)
    return time.perf_counter() - start, steps


def figures(rounds: Sequence[Sequence[Episode]]) -> dict[str, float]:
    """Return microseconds per step and per session: medians of the best round."""
    steps = min(statistics.median(s for _, of in episodes for s in of) for episodes in rounds)
    sessions = min(statistics.median(t - sum(of) for t, of in episodes) for episodes in rounds)
    return {"step_us": round(steps * 1e6, 1), "session_us": round(sessions * 1e6, 1)}


@contextlib.contextmanager
def server(*command: str) -> Iterator[str]:
    """Run a server in a process of its own, and yield the URL that it prints."""
    started = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line!r}")
        url = found[0]
        yield url
    finally:
        started.terminate()
        started.wait(20)


def serve_toy() -> None:
    """Serve the toy on a free port."""
    app = create_fastapi_app(Toy, TurnAction, TurnObservation, 64)
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")
    bound = config.bind_socket()
    print(f"http://127.0.0.1:{bound.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[bound])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures by what was played."""
    turns = [TEXT] * args.steps
    local = OpenEnv("benchmarks.openenv:Toy", text_field="text", train_size=1)
    bfcl = Bfcl()
    truth = {task.id: bfcl.demonstration(task) for task in bfcl.tasks("train")}

    def rounds(play: Callable[[], list[Episode]]) -> dict[str, float]:
        play()  # warm up
        return figures([play() for _ in range(args.rounds)])

    def toys(play: Callable[[], Episode]) -> dict[str, float]:
        return rounds(lambda: [play() for _ in range(args.episodes)])

    def all_of_bfcl(suite: Any) -> dict[str, float]:
        return rounds(lambda: [played(suite, t, truth[t.id], True) for t in suite.tasks("train")])

    (task,) = local.tasks("train")
    found = {
        "toy, direct": toys(lambda: played_bare(turns)),
        "toy, in process": toys(lambda: played(local, task, turns)),
    }
    with server("-m", "benchmarks.openenv", "--serve") as url:
        remote = OpenEnv(url, text_field="text", train_size=1)
        found["toy, by URL"] = toys(lambda: played(remote, task, turns))
        found["toy, OpenEnv's client"] = toys(lambda: played_by_client(url, turns))
    found["BFCL, direct"] = all_of_bfcl(bfcl)
    with server(
        "-m", "jaxgrpo.tools.serve_openenv", "--suite", "jaxgrpo.envs.bfcl:Bfcl", "--port", "0"
    ) as url:
        found["BFCL, by URL"] = all_of_bfcl(OpenEnv(url, text_field="text"))
    return {"benchmark": "openenv", "cpu_cores": os.cpu_count(), "steps": args.steps, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the line of JSON alone")
    parser.add_argument("--serve", action="store_true", help="serve the toy, for this benchmark")
    args = parser.parse_args()
    if args.serve:
        serve_toy()
        return
    measured = measure(args)
    if not args.json:
        print(f"{'':24}{'step':>12}{'session':>12}")
        for name, of in measured.items():
            if isinstance(of, dict):
                print(f"{name:24}{of['step_us']:>9.1f} us{of['session_us']:>9.0f} us")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
