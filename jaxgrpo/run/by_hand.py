"""Play an episode by hand: a person types the policy's turns, and sees what the model would see."""

import asyncio
import difflib
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxgrpo.config.settings import Config, ConfigError, raise_problems
from jaxgrpo.rollout.episode import EpisodeKey, EpisodeRunner, Limits, SamplingParams
from jaxgrpo.rollout.findings import Finding, fault
from jaxgrpo.rollout.scripts import spoken
from jaxgrpo.rollout.trial import WatchedCalls
from jaxgrpo.rollout.user_code import FaultyEnvironmentError
from jaxgrpo.run.check_report import print_findings, print_part, say, title
from jaxgrpo.run.environment_check import decoded
from jaxgrpo.run.setup import ModelAssets, context_problems, evaluated, open_tasks
from jaxgrpo.samplers.base import FinishReason, Generation, SamplingRequest
from jaxgrpo.types import Score, Task, ToolCall

_HOW = (
    "Type the policy's turn. A line with a single dot, or an empty line, ends it. "
    "Ctrl-D leaves the episode."
)


class PersonSampler:
    """A sampler whose policy is a person. It prints what is new in the context, and reads the turn
    from stdin, a terminal or a pipe."""

    weights_folder = None

    def __init__(self, assets: ModelAssets, console: Console, max_turns: int):
        self._assets, self._console, self._max_turns = assets, console, max_turns
        self._shown = self._turn = 0
        self._said_how = not sys.stdin.isatty()
        self.input_ended = False

    async def generate(self, request: SamplingRequest) -> Generation:
        """Read a turn. Nothing else runs meanwhile. If the input has ended, the turn is unfinished,
        which ends the episode."""
        print_part(decoded(self._assets, request.context_ids[self._shown :]), self._console)
        self._turn += 1
        left = f"turn {self._turn} of at most {self._max_turns}, {request.max_tokens} tokens left"
        self._console.print(Text(f"[{left}]", style="dim"), highlight=False)
        if not self._said_how:
            self._console.print(Text(_HOW, style="dim"), highlight=False)
            self._said_how = True
        text = self._read()
        if self.input_ended:
            end = np.array([self._assets.chat.end_of_turn_id], np.int32)
            none = np.zeros(1, np.int32)
            return Generation(end, none.astype(np.float32), none, FinishReason.LENGTH)
        generation = spoken(self._assets.chat, self._assets.tokenizer, text, request)
        said = decoded(self._assets, generation.token_ids_T)
        if not sys.stdin.isatty():
            print_part(said, self._console, sampled=True)
        elif generation.finish_reason is FinishReason.STOP and said != text:
            say(self._console, f"[the turn ended at its stop string: {said!r}]", "dim")
        if generation.finish_reason is FinishReason.LENGTH:
            say(self._console, "[the turn was cut: no tokens are left]", "yellow")
        self._shown = len(request.context_ids) + len(generation.token_ids_T)
        return generation

    def _read(self) -> str:
        """Return the lines up to an empty one, a dot or the end of the input. Set `input_ended` if
        there are none."""
        lines: list[str] = []
        self._console.file.flush()
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                self.input_ended = not lines
                return "\n".join(lines)
            if line in ("", "."):
                return "\n".join(lines)
            lines.append(line)

    async def release(self, episode_id: str) -> None:
        """Do nothing: there is no cache."""

    async def publish(self, version: int, weights: Any) -> dict[str, float]:
        """Do nothing: there are no weights."""
        return {}

    async def close(self) -> None:
        """Do nothing."""


def play_by_hand(config: Config, assets: ModelAssets, task_id: str, console: Console) -> int:
    """Play an episode of a task, by default the first one, and print its score. Return the exit
    status: 1 if the environment failed. Raises ConfigError for an unknown task."""
    raise_problems(context_problems(config, assets))
    task = _task(config, task_id)
    say(console, f"Task {task.id!r}", "bold")
    loop = asyncio.new_event_loop()  # in this thread, so that Ctrl-C interrupts the reading
    try:
        fault_found = loop.run_until_complete(_play(config, assets, task, console))
    finally:
        loop.close()
    if fault_found is not None:
        print_findings([fault_found], console)
    return 0 if fault_found is None else 1


async def _play(
    config: Config, assets: ModelAssets, task: Task, console: Console
) -> Finding | None:
    """Play one episode. Return the environment's fault, if any."""
    calls = WatchedCalls(config.rollout.step_deadline_seconds)
    limits = Limits(config.rollout, assets.config.context_length)
    sampler = PersonSampler(assets, console, config.rollout.max_turns)
    player = EpisodeRunner(
        sampler, config.environment, assets.chat, limits, SamplingParams(), calls, config.rewards
    )
    try:
        opening = await player.open(task)
        key = EpisodeKey(config.seed, "by hand", task.id, 0)
        trajectory = await player.run(task, opening, key)
    except FaultyEnvironmentError as error:
        return fault(error.recorded, calls.failed, "", task.id)
    if trajectory.error:
        return fault(trajectory.error, calls.failed, "", task.id)
    if sampler.input_ended:
        title(console, "The input ended before the episode did. The score so far:")
    else:
        title(console, f"The episode is over: {trajectory.stop_reason}, {trajectory.turns} turn(s)")
    _print_calls(trajectory.calls, console)
    assert trajectory.score is not None
    _print_score(trajectory.score, console)
    return None


def _print_calls(made: Sequence[ToolCall], console: Console) -> None:
    for call in made:
        result = call.result if len(call.result) <= 200 else f"{call.result[:200]}..."
        style = "" if call.ok else "red"
        say(
            console,
            f"{'ok  ' if call.ok else 'FAIL'} {call.name} {call.arguments}: {result}",
            style,
        )


def _print_score(score: Score, console: Console) -> None:
    verdict = "passed" if score.passed else "not passed"
    say(
        console, f"reward {score.reward:g}, {verdict}", "bold green" if score.passed else "bold red"
    )
    for name, part in score.parts.items():
        say(console, f"  {name} {part:g}")
    for name, note in score.notes.items():
        say(console, f"  {name}: {note}")
    for each in score.differences:
        say(console, f"  {each.check}: {each.where}: {each.actual}, expected {each.expected}")


def _task(config: Config, wanted: str) -> Task:
    """Return a task of the train split or of those that are evaluated, by its id."""
    known: dict[str, Task] = {}
    own = [one.split for one in evaluated(config) if one.config is config]
    for split in dict.fromkeys(("train", *own)):
        for task in open_tasks(config, split):
            if task.id == wanted or not wanted:
                return task
            known[task.id] = task
    close = difflib.get_close_matches(wanted, known, 1, cutoff=0.3)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"--play: there is no task {json.dumps(wanted)} among the {len(known)} tasks of the "
        f"environment{hint}"
    )
