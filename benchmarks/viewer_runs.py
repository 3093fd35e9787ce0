"""Run folders for the benchmark of the viewer: made-up episodes, written with the project's own
recorder."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxgrpo.run.metrics import Recorder
from jaxgrpo.run.records import TrajectoryRecord, write_records
from jaxgrpo.types import Message, Score, StopReason, ToolCall, Trajectory

GROUP = 8
TASKS_A_STEP = 12
LABELS = ("Files", "Maths", "Messages", "Tickets", "Trading", "Travel")
_SYLLABLES = (
    "ba",
    "co",
    "di",
    "fe",
    "gu",
    "ha",
    "jo",
    "ki",
    "lu",
    "me",
    "no",
    "pa",
    "ri",
    "so",
    "tu",
    "ve",
)
_TOOLS = (
    "list_files",
    "read_file",
    "add",
    "mean",
    "send_message",
    "close_ticket",
    "place_order",
    "book_flight",
)


class Writer:
    """Makes episodes of about `tokens` completion tokens; the same seed makes the same ones."""

    def __init__(self, tokens: int, seed: int = 0):
        self.tokens = tokens
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.words = [
            "".join(self.random.choices(_SYLLABLES, k=k)) for k in (2, 3, 4) for _ in range(1000)
        ]

    def episode(self, task: int, sample: int, solved: float) -> Trajectory:
        """An episode of four turns: reasoning, a call and its result in each; then the end."""
        passed = self.random.random() < solved
        messages, calls = self._conversation(task, passed)
        sampled_C = np.ones(self.tokens, bool)
        for start in range(self.tokens // 8, self.tokens, max(1, self.tokens // 4)):
            sampled_C[start : start + self.tokens // 12] = False
        logprobs_C = -self.numbers.exponential(0.4, self.tokens).astype(np.float32)
        overlong = not passed and self.random.random() < 0.1
        reason = StopReason.TOKEN_LIMIT if overlong else StopReason.FINISHED
        notes = (
            {}
            if passed
            else {"turn 0": self.random.choice(("no call was made", "the state differs"))}
        )
        return Trajectory(
            task_id=f"task_{task}",
            sample_index=sample,
            prompt_ids_P=np.random.default_rng(task).integers(0, 150_000, 500).astype(np.int32),
            completion_ids_C=np.minimum(self.numbers.zipf(1.3, self.tokens), 151_000).astype(
                np.int32
            ),
            action_mask_C=sampled_C,
            sampler_logprobs_C=np.where(sampled_C, logprobs_C, 0).astype(np.float32),
            weight_versions_C=np.where(sampled_C, 3, -1).astype(np.int32),
            messages=messages,
            calls=calls,
            turns=4,
            stop_reason=reason,
            score=Score(
                float(passed),
                passed,
                {"state": float(passed), "finished": float(not overlong)},
                notes,
            ),
        )

    def _conversation(
        self, task: int, passed: bool
    ) -> tuple[tuple[Message, ...], tuple[ToolCall, ...]]:
        said = [
            Message("system", "Fulfil the user's request. " * 60),
            Message("user", f"Please do task {task}."),
        ]
        calls = []
        for _turn in range(3):
            name = self.random.choice(_TOOLS)
            arguments = {"name": self._text(1), "amount": self.random.randint(0, 999)}
            result = json.dumps({"result": self._text(30)})
            calls.append(
                ToolCall(
                    name, json.dumps(arguments), result, ok=passed or self.random.random() < 0.8
                )
            )
            call = json.dumps([{"name": name, "args": arguments}])
            text = f"<reasoning>{self._text(self.tokens // 16)}</reasoning>\n<tool>{call}</tool>"
            said += [
                Message("assistant", text),
                Message("system", f"<tool_result>{result}</tool_result>"),
            ]
        return (*said, Message("assistant", "<TASK_FINISHED>")), tuple(calls)

    def _text(self, words: int) -> str:
        return " ".join(self.random.choices(self.words, k=words))


def step_records(
    writer: Writer, step: int, tasks: Sequence[int], solved: float, split: str
) -> Iterator[TrajectoryRecord]:
    """The groups of one step; a task's chance differs with its number."""
    for task in tasks:
        chance = min(1.0, solved * (0.5 + (task % 10) / 10))
        for sample in range(GROUP):
            trajectory = writer.episode(task, sample, chance)
            yield TrajectoryRecord(trajectory, split, step, (LABELS[task % len(LABELS)],))


def write_run(folder: Path, episodes: int, tokens: int, tasks: int = 300) -> None:
    """A run folder of so many episodes (rounded down to whole steps): training steps, metrics,
    config.json."""
    writer = Writer(tokens)
    steps = episodes // (GROUP * TASKS_A_STEP)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"name": folder.name, "model": {"source": "none"}})
    )
    recorder = Recorder(folder, tensorboard=False, wandb_project=None, name=folder.name)
    for step in range(1, steps + 1):
        chosen = [((step - 1) * TASKS_A_STEP + n) % tasks for n in range(TASKS_A_STEP)]
        solved = 0.3 + 0.5 * step / steps
        records = step_records(writer, step, chosen, solved, "train")
        write_records(folder / "trajectories" / f"train-{step:06d}.jsonl.gz", records)
        recorder.record(
            step,
            {"train/reward_mean": solved, "train/pass_rate": solved, "train/kl": step / steps / 10},
        )
    recorder.close()
