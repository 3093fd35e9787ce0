"""Check the environment of a config: open every task twice, and play scripted episodes on some."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from jaxgrpo.config.encoding import decode, encode
from jaxgrpo.config.settings import Config, ConfigError, raise_problems
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.episode import Limits
from jaxgrpo.rollout.findings import Finding, fault, merged, of_trials
from jaxgrpo.rollout.openings import Opening, PromptError
from jaxgrpo.rollout.prefetch import batches_per_epoch
from jaxgrpo.rollout.task_check import Opened
from jaxgrpo.rollout.trial import Played, TaskTrial, Trial, demonstrated
from jaxgrpo.rollout.user_code import FaultyEnvironmentError
from jaxgrpo.run.setup import Evaluated, ModelAssets, context_problems, evaluated, task_check
from jaxgrpo.types import Task, Trajectory

TRIED = 8
"""Tasks of each split on which the scripts are played, if no other number is given."""

LARGE_REWARD = 10.0
"""Rewards beyond this size are reported if nothing normalizes them."""


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """A split: its number of tasks, how many open, and the tokens of the prompts, also of those
    that are too long."""

    name: str
    tasks: int
    opened: int
    prompt_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TaskView:
    """A task as the model sees it. `parts` are the texts of an episode, each with whether the
    policy said it; the first is the prompt. `message_tokens` counts the contents by role."""

    task: str
    prompt_tokens: int
    tool_tokens: int
    message_tokens: tuple[tuple[str, int], ...]
    tools: tuple[str, ...]
    stop_strings: tuple[str, ...]
    parts: tuple[tuple[bool, str], ...]


@dataclasses.dataclass(frozen=True)
class ScriptReport:
    """The episodes of a script: their turns and rewards, lowest and highest, and how they ended."""

    script: str
    episodes: int
    turns: tuple[int, int]
    rewards: tuple[float, float] | None
    ends: dict[str, int]


@dataclasses.dataclass(frozen=True)
class CallReport:
    """The calls of a method: how many, the median and the longest in seconds, and its task."""

    method: str
    count: int
    median: float
    slowest: float
    task: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a check. `tried` of the tasks were played with scripts."""

    name: str
    environment: str
    max_prompt_tokens: int
    deadline_seconds: float
    splits: tuple[SplitReport, ...]
    tried: int
    view: TaskView | None
    scripts: tuple[ScriptReport, ...]
    calls: tuple[CallReport, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The number of errors and warnings in words."""
        warnings = len(self.findings) - self.errors
        return f"{_count(self.errors, 'error')}, {_count(warnings, 'warning')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def check_environment(config: Config, assets: ModelAssets, tried: int = TRIED) -> Report:
    """Check the environment and the reward functions of a config. `tried` is the number of tasks of
    each split that are played with scripts.

    Raises ConfigError only if the limits of the config do not fit the model.
    """
    raise_problems(context_problems(config, assets))
    splits: list[SplitReport] = []
    findings = [*_of_config(config)]
    trials: list[TaskTrial] = []
    tried_already: list[tuple[object, str]] = []
    for of in (Evaluated("train", "train", config), *evaluated(config)):
        try:
            tasks = _listed(of, of.config is config, findings)
            opened = task_check(of.config).open_tasks(assets.chat, tasks, twice=True)
        except ConfigError as error:
            findings.append(_of_refusal(error))
            continue
        splits.append(_split_report(of.name, opened))
        findings += _of_openings(of.name, opened, of.config)
        alike = [task for task in tasks if isinstance(opened.found[task.id], int)]
        alike = [task for task in alike if task.id not in opened.differences]
        suite = of.config.environment
        fresh = [task for task in spread(alike, tried) if (suite, task.id) not in tried_already]
        tried_already += [(suite, task.id) for task in fresh]
        trials += _trial(of.config, assets, of.config.rewards).run(fresh)
    findings += [*of_trials(trials, config.rollout), *_of_size(trials, config)]
    return Report(
        config.name,
        type(config.environment).__qualname__,
        config.rollout.max_prompt_tokens,
        config.rollout.step_deadline_seconds,
        tuple(splits),
        len(trials),
        next((_view(trial, assets) for trial in trials if trial.opening), None),
        tuple(_of_scripts(trials)),
        tuple(_of_calls(trials)),
        tuple(merged(findings)),
    )


def scripted_findings(
    config: Config, assets: ModelAssets, tasks: Sequence[Task], tried: int = 4
) -> list[Finding]:
    """Return what scripted episodes of some tasks find in the environment alone. Reward functions,
    which may ask a service, are not called."""
    trials = _trial(config, assets, RewardSettings()).run(spread(tasks, tried))
    return merged([*of_trials(trials, config.rollout), *_of_size(trials, config)])


def _trial(config: Config, assets: ModelAssets, rewards: RewardSettings) -> Trial:
    limits = Limits(config.rollout, assets.config.context_length)
    return Trial(config.environment, assets.chat, assets.tokenizer, limits, rewards)


def spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """Return tasks at equal distances, the first among them.

    >>> spread("abcdefg", 3)
    ['a', 'c', 'e']
    """
    count = min(count, len(tasks))
    return [tasks[i * len(tasks) // count] for i in range(count)]


def _listed(of: Evaluated, own: bool, findings: list[Finding]) -> list[Task]:
    """Return the tasks of a split, of one that is evaluated as many as the config says. `own`: the
    split is one of the environment that is trained on."""
    config, split = of.config, of.split
    tasks, again = (task_check(config).list_tasks(split) for _ in range(2))
    if [task.id for task in tasks] != [task.id for task in again]:
        told = f"tasks({split!r}) gives other tasks, or another order, the second time"
        advice = "return them in a fixed order: a resumed run would train on other batches"
        findings.append(Finding("error", told, advice))
    if of.name == split == "train":
        batches_per_epoch(len(tasks), config.rollout.tasks_per_step)
        return tasks
    if not tasks:
        raise ConfigError(f"the {split} split of {of.name} is empty, and it is to be evaluated")
    held_in = task_check(config).list_tasks("train") if own and split != "train" else []
    shared = sorted({task.id for task in tasks} & {task.id for task in held_in})
    if shared:
        told = f"{len(shared)} of {len(tasks)} tasks of {split} are also in train: {shared[0]!r}"
        advice = "keep the tasks of the splits apart, so that the evaluation is held out"
        findings.append(Finding("warning", told, advice))
    return tasks[: config.evaluation.tasks]


def _of_refusal(error: ConfigError) -> Finding:
    """Return the finding of an error that would end the run before its first batch."""
    cause = error.__cause__
    if isinstance(cause, FaultyEnvironmentError):
        return fault(cause.recorded, cause.what, "")
    return Finding("error", str(error), "a run would be refused with this line")


def _of_config(config: Config) -> Iterator[Finding]:
    """Check that the environment can be read back from a run's config.json."""
    try:
        written = encode(config.environment, places=True)
        same = encode(decode(written), places=True) == written
        told = "" if same else "its settings are others when they are read back"
    except Exception as error:  # the edge to a user's class
        told = f"{type(error).__name__}: {error}"
    if told:
        told = f"a run's config.json cannot hold the environment: {told}"
        advice = (
            "let the suite's fields be numbers, texts, tuples, dicts or frozen dataclasses, and "
            "make what else it needs in create(); other tools read a run by its config.json"
        )
        yield Finding("warning", told, advice)


def _split_report(split: str, opened: Opened) -> SplitReport:
    found = opened.found.values()
    tokens = [each for each in found if isinstance(each, int)]
    long = [each.tokens for each in found if isinstance(each, PromptError) and each.tokens]
    return SplitReport(split, len(found), len(tokens), (*tokens, *long))


def _of_openings(split: str, opened: Opened, config: Config) -> Iterator[Finding]:
    total = len(opened.found)
    over = {
        task: error
        for task, error in opened.found.items()
        if isinstance(error, PromptError) and error.tokens
    }
    if over:
        longest = max(error.tokens for error in over.values())
        most = config.rollout.max_prompt_tokens
        told = (
            f"{len(over)} of {total} prompts of {split} exceed rollout.max_prompt_tokens ({most}): "
            f"the longest has {longest} tokens"
        )
        advice = f"set rollout.max_prompt_tokens to {longest} or more, or shorten the prompts"
        first, *others = over
        yield Finding("error", told, advice, f"task {first!r}", tasks=(first, *others))
    for task, error in opened.found.items():
        if isinstance(error, FaultyEnvironmentError) and task not in over:
            yield fault(error.recorded, error.what, "", task)
    for task, line in opened.differences.items():
        found = fault(line, f"observe() of task {task!r}", "", task)
        yield dataclasses.replace(found, key="opens differently")


def _of_size(trials: Sequence[TaskTrial], config: Config) -> Iterator[Finding]:
    rewards = [p.reward for t in trials for p in t.played if p.reward is not None]
    largest = max(rewards, key=abs, default=0.0)
    if config.batching.advantage_normalization == "none" and abs(largest) > LARGE_REWARD:
        told = f"rewards are as large as {largest:g}, and nothing normalizes them"
        advice = "scale them to about 1, or set batching.advantage_normalization to 'std'"
        yield Finding("warning", told, advice)


def _view(trial: TaskTrial, assets: ModelAssets) -> TaskView:
    opening = trial.opening
    assert opening is not None
    observation, tokens = opening.observation, len(opening.prompt_ids_P)
    bare = assets.chat.opening(observation.messages) if observation.tools else opening.prompt_ids_P
    counts = [
        (m.role, len(assets.tokenizer.encode(m.content, add_special_tokens=False)))
        for m in observation.messages
    ]
    shown = demonstrated(trial) or next(iter(trial.played), None)
    return TaskView(
        trial.task.id,
        tokens,
        tokens - len(bare),
        tuple(counts),
        tuple(tool.get("function", tool)["name"] for tool in observation.tools),
        observation.stop_strings,
        tuple(episode_parts(shown.trajectory, assets))
        if shown and shown.trajectory
        else ((False, _text(opening, assets)),),
    )


def _text(opening: Opening, assets: ModelAssets) -> str:
    return decoded(assets, opening.prompt_ids_P)


def decoded(assets: ModelAssets, ids: np.ndarray) -> str:
    """Return the text of token ids, with special tokens."""
    text: str = assets.tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


def episode_parts(trajectory: Trajectory, assets: ModelAssets) -> Iterator[tuple[bool, str]]:
    """Yield the texts of an episode in order, each with whether the policy said it."""
    yield False, decoded(assets, trajectory.prompt_ids_P)
    ids, mask = trajectory.completion_ids_C, trajectory.action_mask_C
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or mask[i] != mask[start]:
            yield bool(mask[start]), decoded(assets, ids[start:i])
            start = i


def _of_scripts(trials: Sequence[TaskTrial]) -> Iterator[ScriptReport]:
    by_script: dict[str, list[Played]] = {}
    for played in (played for trial in trials for played in trial.played):
        by_script.setdefault(played.script.name, []).append(played)
    for name, all_played in by_script.items():
        scored = [p.trajectory for p in all_played if p.trajectory is not None]
        rewards = [p.reward for p in all_played if p.reward is not None]
        turns = [trajectory.turns for trajectory in scored] or [0]
        yield ScriptReport(
            name,
            len(all_played),
            (min(turns), max(turns)),
            (min(rewards), max(rewards)) if rewards else None,
            dict(Counter(trajectory.stop_reason.value for trajectory in scored)),
        )


def _of_calls(trials: Sequence[TaskTrial]) -> Iterator[CallReport]:
    by_method: dict[str, list[tuple[float, str]]] = {}
    for trial in trials:
        for call in (c for p in (*trial.played, *trial.twins) for c in p.calls):
            by_method.setdefault(call.method, []).append((call.seconds, trial.task.id))
    for method, calls in by_method.items():
        seconds, task = max(calls)
        middle = statistics.median(each for each, _ in calls)
        yield CallReport(method, len(calls), middle, seconds, task)
