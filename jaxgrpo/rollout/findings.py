"""Draw findings from scripted episodes: what is wrong with an environment, and what to try.

The user's own exception with its file and line comes first, then the call, then a short traceback.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from jaxgrpo.config.settings import RolloutSettings
from jaxgrpo.rollout.scripts import DEMONSTRATION
from jaxgrpo.rollout.tool_schemas import schema_problems, undescribed
from jaxgrpo.rollout.trial import Played, TaskTrial, answers, demonstrated, first_failed, method_of
from jaxgrpo.types import StopReason

Level = Literal["error", "warning"]

NEAR = 0.5
"""A call that takes more than this fraction of its deadline is reported."""

_NOT_THEIRS = (f'  File "{Path(__file__).resolve().parents[1]}/', '  File "<')
_OUTER, _INNER = 2, 3
_SHOWN = 160

_ADVICE = {
    "tasks": "return a list of jaxgrpo.types.Task, in the same order every time",
    "create": "mend create(), or the class that it makes; every episode of the task needs it",
    "observe": "mend observe(); until it works, the groups of the task are dropped",
    "step": "answer a mistake of the policy with an observation that says what was wrong; raise "
    "only if the environment itself has failed",
    "close": "let close() work after any call, and however the episode ended",
    "score": "let score() work after any number of turns, because a limit may end the episode",
    "the rewards": "let reward functions work for every episode, also one without a tool call",
    "demonstration": "return the texts of the policy's turns as a tuple of str",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """A fault (`error`) or a doubt (`warning`): what is wrong, during what, and what to try.

    Findings with the same `key` are one: `tasks` lists where it was seen.
    """

    level: Level
    told: str
    advice: str
    during: str = ""
    trace: str = ""
    tasks: tuple[str, ...] = ()
    key: str = ""


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Return each finding once, with all its tasks: errors first, otherwise in order."""
    found: dict[tuple[str, str], Finding] = {}
    for one in findings:
        key = (one.level, one.key or one.told)
        if key in found:
            tasks = dict.fromkeys((*found[key].tasks, *one.tasks))
            found[key] = dataclasses.replace(found[key], tasks=tuple(tasks))
        else:
            found[key] = one
    return sorted(found.values(), key=lambda one: one.level != "error")


def fault(error: str, what: str, during: str, task: str = "") -> Finding:
    """Return the finding of a failed call `what`. `error` is a FaultyEnvironmentError's record."""
    line, _, trace = error.partition("\n\n")
    told = line.removesuffix(f": {what} failed")
    method = method_of(what)
    advice = _ADVICE.get(method, "mend it, and check again")
    if " took longer than the deadline of " in line:
        advice = (
            "give what it waits for a time limit of its own, or raise rollout.step_deadline_seconds"
        )
    elif method == "tasks" and trace:  # it raised
        advice = "provide what tasks() needs, such as a file or a running server, or mend tasks()"
    elif "opens differently" in line:
        advice = (
            "let observe() depend on the task alone: draw random values from its payload or from "
            "random.Random(task.id)"
        )
    place = re.search(r"\(([^()]*, line \d+)(, in [^()]*)?\)$", told)
    kind = told.partition(":")[0] if place and place[2] else ""
    same = place[1] if place else told.replace(repr(task), "")
    if not during and what not in told:
        during = what
    tasks = (task,) if task else ()
    trace = short_trace(trace)
    return Finding("error", told, advice, during, trace, tasks, f"{method} {kind} {same}")


def short_trace(trace: str) -> str:
    """Return a traceback without the frames of this package and of generated code, and with at most
    five others, two outer and three inner ones."""
    entries: list[list[str]] = []
    for line in trace.splitlines():
        if entries and entries[-1][0].startswith("  File ") and line.startswith("    "):
            entries[-1].append(line)
        else:
            entries.append([line])
    kept = [entry for entry in entries if not entry[0].startswith(_NOT_THEIRS)]
    frames = [entry for entry in kept if entry[0].startswith("  File ")]
    left_out = frames[_OUTER : len(frames) - _INNER]
    for entry in left_out:
        entry[:] = ["  ..."] if entry is left_out[0] else []
    return "\n".join(line for entry in kept for line in entry)


def of_trials(trials: Sequence[TaskTrial], settings: RolloutSettings) -> Iterator[Finding]:
    """Yield all findings of scripted episodes."""
    for trial in trials:
        yield from _faults(trial)
        yield from _of_demonstration(trial, settings)
        yield from _of_tools(trial)
        yield from _of_answers(trial)
        yield from _of_twins(trial)
    yield from _of_rewards(trials)
    yield from _of_ends(trials, settings)
    yield from _of_deadlines(trials, settings.step_deadline_seconds)


def _faults(trial: TaskTrial) -> Iterator[Finding]:
    task = trial.task.id
    if trial.error:
        yield fault(trial.error, f"demonstration() of task {task!r}", "", task)
    for played in (*trial.played, *trial.twins):
        if played.error:
            what = first_failed(played.calls)
            yield fault(played.error, what, _during(played), task)
        elif played.late:
            told = f"{first_failed(played.calls)} took longer than the deadline"
            advice = "refuse a step after the end at once, with an exception"
            yield Finding("error", told, advice, _during(played), tasks=(task,), key="late at last")


def _during(played: Played) -> str:
    """Describe the last call of an episode, and what the policy had said."""
    said = f"{first_failed(played.calls)}, script '{played.script.name}'"
    texts = played.trajectory.policy_texts if played.trajectory else ()
    if not texts:
        return said
    return f"{said}, turn {len(texts)}: {_cut(repr(texts[-1]))}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _of_demonstration(trial: TaskTrial, settings: RolloutSettings) -> Iterator[Finding]:
    played, task = demonstrated(trial), trial.task.id
    if played is None or played.error or played.trajectory is None or played.reward is None:
        return
    reason, turns = played.trajectory.stop_reason, len(played.script.turns)
    limited = reason.overlong or (reason is StopReason.STEP_LIMIT and not played.ended)
    if limited and not played.ran_out:
        limit, most = "rollout.max_completion_tokens", settings.max_completion_tokens
        if reason is StopReason.STEP_LIMIT:
            limit, most = "rollout.max_turns", settings.max_turns
        told = f"the demonstration does not fit {limit} ({most}): {turns} turn(s) in all"
        advice = f"raise {limit}, or leave out tasks that need more"
        yield Finding("warning", told, advice, f"task {task!r}", tasks=(task,), key=limit)
        return
    if played.passed:
        best = max((p.reward or 0.0 for p in trial.played if p is not played), default=0.0)
        if best > played.reward:
            told = (
                f"a mistake earns more than the demonstration: {best:g} against {played.reward:g}"
            )
            advice = "let the reward of a solved task be the highest"
            yield Finding("warning", told, advice, f"task {task!r}", tasks=(task,), key="more")
        return
    score = played.trajectory.score
    notes = "".join(
        f"; {name}: {_cut(text)}" for name, text in (score.notes if score else {}).items()
    )
    told = f"the demonstration does not pass: reward {played.reward:g}, {reason}{notes}"
    advice = "compare the turns of demonstration() with what score() wants (--play shows both)"
    if played.cut:
        advice = (
            f"a stop string cut the turn {_cut(repr(played.cut[0]))}, and "
            f"{_cut(repr(played.cut[1]))} was lost: make it a turn of its own"
        )
    elif played.ran_out:
        advice = "end the demonstration with the turn that ends the episode: it waited for more"
    yield Finding("error", told, advice, f"task {task!r}", tasks=(task,), key="demonstration")


def _of_tools(trial: TaskTrial) -> Iterator[Finding]:
    opening, task = trial.opening, trial.task.id
    for tool in opening.observation.tools if opening else ():
        for problem in schema_problems(tool):
            advice = "write parameters as JSON Schema, e.g. {'type': 'object', 'properties': {...}}"
            yield Finding("error", problem, advice, f"observe() of task {task!r}", tasks=(task,))
        if undescribed(tool):
            name = tool.get("function", tool)["name"]
            told = f"tool {name!r} has no description: the model sees its name and parameters only"
            yield Finding("warning", told, "say in one sentence what it does", tasks=(task,))


def _of_answers(trial: TaskTrial) -> Iterator[Finding]:
    task, opening = trial.task.id, trial.opening
    stops = opening.observation.stop_strings if opening else ()
    if stops and any(not answer.stop_strings for answer in answers(trial)):
        told = (
            f"the opening has stop strings {stops[:4]}, an observation of step() has none: the "
            "next turn runs on until the end-of-turn token"
        )
        yield Finding(
            "warning",
            told,
            "give every observation the same stop strings",
            f"step() of task {task!r}",
            tasks=(task,),
            key="stop strings",
        )
    for played in trial.played:
        after = played.after_the_end
        if after is not None and not after.done:
            told = "step() after the end goes on with the episode"
            advice = "raise an exception there, or return the same stop reason again"
            during = f"task {task!r}, script '{played.script.name}'"
            yield Finding("warning", told, advice, during, tasks=(task,))
        for call in (call for step in played.steps for call in step.calls):
            if not _is_json(call.arguments):
                told = f"the arguments of a ToolCall are not JSON: {_cut(call.arguments)!r}"
                advice = "write them with json.dumps, so that records and the viewer show them"
                during = f"task {task!r}, script '{played.script.name}'"
                yield Finding("warning", told, advice, during, tasks=(task,), key="not JSON")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return "... (" in text  # it was cut
    return True


def _of_twins(trial: TaskTrial) -> Iterator[Finding]:
    scored = [one for one in trial.twins if one.trajectory is not None and not one.error]
    if len(scored) < 2:
        return
    one, other = scored
    assert one.trajectory is not None and other.trajectory is not None
    if one.reward != other.reward:
        differ = f"rewards {one.reward:g} and {other.reward:g}"
    elif one.trajectory.messages != other.trajectory.messages:
        pairs = zip(one.trajectory.messages, other.trajectory.messages, strict=False)
        first = next(((a, b) for a, b in pairs if a != b), None)
        texts = [_cut(repr(m.content)) for m in first] if first else ["more turns", "fewer turns"]
        differ = f"answers {texts[0]} and {texts[1]}"
    else:
        return
    told = f"two episodes with the same turns at the same time get different {differ}"
    advice = (
        "keep all state in the environment that create() returns; if chance is wanted here, go on"
    )
    during = f"task {trial.task.id!r}, script '{one.script.name}'"
    yield Finding("warning", told, advice, during, tasks=(trial.task.id,), key="twins")


def _of_rewards(trials: Sequence[TaskTrial]) -> Iterator[Finding]:
    played = [one for trial in trials for one in trial.played if one.reward is not None]
    rewards = {one.reward for one in played}
    if len(rewards) == 1 and len({one.script.name for one in played}) > 1:
        (reward,) = rewards
        told = f"every scripted episode gets reward {reward:g}, {len(played)} of {len(played)}"
        advice = "give the suite a demonstration(task), or find a reward with --play or --policy"
        if any(demonstrated(trial) for trial in trials):
            advice = "look at score(): a solution and a mistake must not earn the same"
        yield Finding("warning", f"{told}: nothing is learned from equal rewards", advice)
    for name in dict.fromkeys(one.script.name for one in played):
        if name == DEMONSTRATION:
            continue
        passing = [one.task.id for one in played if one.script.name == name and one.passed]
        if len(passing) > len(trials) / 2:
            told = f"the script '{name}' passes {len(passing)} of {len(trials)} tasks"
            advice = "look at score(): a policy would learn to do just this"
            yield Finding("warning", told, advice, tasks=tuple(passing))


def _of_ends(trials: Sequence[TaskTrial], settings: RolloutSettings) -> Iterator[Finding]:
    played = [one for trial in trials for one in trial.played if one.trajectory and not one.error]
    if played and not any(one.ended for one in played):
        told = (
            f"no scripted episode of {len(played)} was ended by the environment: all ran into "
            f"rollout.max_turns ({settings.max_turns}) or a limit of tokens"
        )
        advice = "return StepResult(stop_reason=...) when the task is done or lost"
        yield Finding("warning", told, advice)


def _of_deadlines(trials: Sequence[TaskTrial], deadline: float) -> Iterator[Finding]:
    calls = [(c, t) for t in trials for p in (*t.played, *t.twins) for c in p.calls if not p.late]
    slowest: dict[str, tuple[float, str]] = {}
    for call, trial in calls:
        if call.seconds > NEAR * deadline:
            slowest[call.method] = max(
                slowest.get(call.method, (0.0, "")), (call.seconds, trial.task.id)
            )
    for method, (seconds, task) in slowest.items():
        told = f"{method}() took {seconds:.2g} s of a deadline of {deadline:g} s"
        advice = "raise rollout.step_deadline_seconds: many episodes at once are slower than this"
        yield Finding("warning", told, advice, f"task {task!r}", tasks=(task,))
