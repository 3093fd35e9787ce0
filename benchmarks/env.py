"""Measure the speed of BFCL's environment.

    python -m benchmarks.env [MODEL] [--categories base ...] [--turns 1] [--json]

Every task of the categories is played by its ground truth. An episode is created, observed,
stepped through its demonstration and scored. Its messages are rendered with MODEL's chat template
(default: the repository's tiny model). These are timed:

- parts, as medians over tasks. `build` is one set of simulators; an environment has two. `check` is
  the official check of a first turn that both sides have run;
- whole episodes on one thread;
- all episodes at once, with each call into the environment in a worker thread, as in a rollout.

Everything is the best of the rounds. Prints a table and one line of JSON (with `--json`, only that
line).
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxgrpo.environment import Environment
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.scoring import PlayedTurn, judge_turn
from jaxgrpo.envs.bfcl.source import open_package
from jaxgrpo.envs.bfcl.tasks import BfclTask, Library, load_library
from jaxgrpo.rollout.background import BlockingCalls
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.storage.pretrained import load_tokenizer
from jaxgrpo.types import Task

T = TypeVar("T")
TINY = Path(__file__).parent.parent / "assets" / "tiny-qwen2.5"


def timed(function: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def simulator_seconds(library: Library, tasks: Sequence[BfclTask]) -> dict[str, float]:
    """Return median seconds to build simulators, run a ground-truth call, and check a turn."""
    builds, calls, checks = [], [], []
    for task in tasks:
        seconds, policy = timed(library.session, task)
        builds.append(seconds)
        truth = library.session(task)
        results = []
        for call in task.turns[0].truth:
            seconds, result = timed(policy.run, call)
            calls.append(seconds)
            results.append(result.text)
        expected = [truth.run(call).text for call in task.turns[0].truth]
        played = PlayedTurn(results, len(results), 1)
        seconds, verdict = timed(judge_turn, 0, policy, truth, expected, played)
        if not verdict.passed:
            raise RuntimeError(f"the ground truth of {task.id} does not pass: {verdict.reason}")
        checks.append(seconds)
    return {
        "build": statistics.median(builds),
        "call": statistics.median(calls),
        "check": statistics.median(checks),
    }


def play(suite: Bfcl, chat: Chat, task: Task) -> tuple[float, int, int, int]:
    """Play one perfect episode.

    Return the seconds of rendering, the tokens of the prompt and of all answers, and the number of
    policy turns.
    """
    environment = suite.create(task)
    observation = environment.observe()
    rendering, prompt = timed(chat.opening, observation.messages, observation.tools)
    answers = turns = 0
    for action in suite.demonstration(task):
        result = environment.step(action)
        turns += 1
        if result.observation is not None:
            seconds, ids = timed(chat.continuation, result.observation.messages, True)
            rendering, answers = rendering + seconds, answers + len(ids)
    if environment.score().reward != 1:
        raise RuntimeError(f"the demonstration of {task.id} is not rewarded")
    return rendering, len(prompt), answers, turns


async def play_in_threads(suite: Bfcl, tasks: Sequence[Task], threads: int) -> None:
    """Play all episodes at once, with environments in worker threads and without rendering."""
    calls = BlockingCalls(threads, 60.0)

    async def episode(task: Task) -> None:
        environment: Environment = await calls.run(suite.create, task)
        await calls.run(environment.observe)
        for action in suite.demonstration(task):
            await calls.run(environment.step, action)
        await calls.run(environment.score)

    await asyncio.gather(*map(episode, tasks))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the line of JSON, with units in their names."""
    suite = Bfcl(
        release=args.release,
        categories=tuple(args.categories),
        docs=args.docs,
        max_turns=args.turns,
    )
    loading, library = timed(load_library, open_package(args.release))
    chat = Chat(load_tokenizer(args.model))
    tasks = [*suite.tasks("train"), *suite.tasks("test")]
    payloads = [task.payload for task in tasks if isinstance(task.payload, BfclTask)]
    parts = [simulator_seconds(library, payloads) for _ in range(args.rounds)]
    best = {name: min(found[name] for found in parts) for name in parts[0]}
    rounds = [
        timed(lambda: [play(suite, chat, task) for task in tasks]) for _ in range(args.rounds)
    ]
    seconds, episodes = min(rounds, key=lambda found: found[0])
    threaded = min(
        timed(asyncio.run, play_in_threads(suite, tasks, args.threads))[0]
        for _ in range(args.rounds)
    )
    rendering, prompts, answers, turns = (
        np.array(column) for column in zip(*episodes, strict=True)
    )
    return {
        "benchmark": "env",
        "model": args.model.name,
        "release": args.release,
        "docs": args.docs,
        "user_turns": args.turns,
        "episodes": len(tasks),
        "cpu_cores": os.cpu_count(),
        "load_seconds": round(loading, 2),
        "build_ms": round(best["build"] * 1e3, 3),
        "call_us": round(best["call"] * 1e6, 1),
        "check_ms": round(best["check"] * 1e3, 3),
        "episodes_per_second": round(len(tasks) / seconds, 1),
        "episodes_per_second_without_rendering": round(len(tasks) / (seconds - rendering.sum()), 1),
        "episodes_per_second_in_threads": round(len(tasks) / threaded, 1),
        "rendered_tokens_per_second": round((prompts.sum() + answers.sum()) / rendering.sum()),
        "prompt_tokens": [int(np.quantile(prompts, q, method="nearest")) for q in (0, 0.5, 0.9, 1)],
        "answer_tokens_per_turn": round(float(answers.sum() / turns.sum()), 1),
    }


def table(measured: dict[str, Any]) -> str:
    """Format one line per figure."""
    least, median, ninety, most = measured["prompt_tokens"]
    lines = {
        "one set of simulators": f"{measured['build_ms']:.3f} ms",
        "one ground-truth call": f"{measured['call_us']:.1f} us",
        "one official check": f"{measured['check_ms']:.3f} ms",
        "episodes/s, one thread": f"{measured['episodes_per_second']:.1f}",
        "  without rendering": f"{measured['episodes_per_second_without_rendering']:.1f}",
        f"  without, {measured['episodes']} at once": (
            f"{measured['episodes_per_second_in_threads']:.1f}"
        ),
        "rendering": f"{measured['rendered_tokens_per_second']} tokens/s",
        "tokens of a prompt": f"min {least}, median {median}, 90 % {ninety}, max {most}",
        "tokens of an answer": f"{measured['answer_tokens_per_turn']:.1f} per policy turn",
    }
    return "\n".join(f"{name:26} {value}" for name, value in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=TINY)
    parser.add_argument("--release", default="v3", help="v3 or v4")
    parser.add_argument("--categories", nargs="+", default=["base"])
    parser.add_argument("--docs", default="full", help="full, without_response or signatures")
    parser.add_argument(
        "--turns", type=int, default=1, help="user turns of each task that are played"
    )
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the line of JSON alone")
    args = parser.parse_args()
    measured = measure(args)
    if not args.json:
        print(table(measured))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
