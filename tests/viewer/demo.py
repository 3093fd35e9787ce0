"""A small run folder with known contents, written with the project's own recorder: what the
viewer's tests look at.

Four tasks, four samples each; evaluations at steps 0 and 4, training at 2 and 4. `files_1` is
learned, `easy_4` is always solved, `trading_2` never, and the task of the odd name is lost.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jaxgrpo.run.metrics import Recorder
from jaxgrpo.run.records import TrajectoryRecord, write_records
from jaxgrpo.types import Message, Score, StopReason, ToolCall, Trajectory

MODEL = Path(__file__).parents[2] / "assets" / "tiny-qwen2.5"
ODD = "odd/../\"task'\u202e<b>3"
LABELS = {
    "files_1": ("Files",),
    "trading_2": ("Trading", "Files"),
    ODD: ("Odd",),
    "easy_4": ("Maths",),
}
QUERIES = {
    "files_1": "List the files of the temp folder.",
    "trading_2": "Add Zeta Corp to my watchlist.",
    ODD: "What is this called?",
    "easy_4": "Add 1 and 2.",
}
RIGHT = {
    "files_1": ("ls", {"a": True}),
    "trading_2": ("add_to_watchlist", {"stock": "ZETA"}),
    ODD: ("name", {}),
    "easy_4": ("add", {"a": 1, "b": 2}),
}
RESULTS = {
    "files_1": '{"files": ["one.txt", "two.txt"]}',
    "trading_2": '{"symbol": ["NVDA"]}',
    ODD: '"odd"',
    "easy_4": '{"result": 3}',
}
_SOLVED = {
    "files_1": (0, 1, 3, 4),
    "trading_2": (0, 0, 0, 0),
    ODD: (3, 2, 1, 0),
    "easy_4": (4, 4, 4, 4),
}
"""How many of four samples pass: at evaluation 0, training 2, training 4, evaluation 4."""
PLACES = (("eval-train", 0), ("train", 2), ("train", 4), ("eval-train", 4))


def write_demo(folder: Path, name: str = "demo") -> Path:
    """The run; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"name": name, "model": {"source": str(MODEL), "revision": None}})
    )
    for number, (split, step) in enumerate(PLACES):
        records = [
            record(task, split, step, sample, sample < _SOLVED[task][number])
            for task in LABELS
            for sample in range(4)
        ]
        write_records(folder / "trajectories" / f"{split}-{step:06d}.jsonl.gz", records)
    write_metrics(folder)
    return folder


def write_metrics(folder: Path) -> None:
    recorder = Recorder(folder, tensorboard=False, wandb_project=None, name="demo")
    for step, rate in ((0, 7 / 16), (4, 8 / 16)):
        recorder.record(
            step,
            {
                "eval/split": "train",
                "eval/pass_rate": rate,
                "eval/pass_rate_low": rate - 0.2,
                "eval/pass_rate_high": rate + 0.2,
            },
        )
    for step, reward in ((2, 0.4375), (4, 0.5)):
        figures = {
            "train/reward_mean": reward,
            "train/pass_rate": reward,
            "train/kl": 0.001 * step,
            "train/entropy": float("nan"),
        }
        recorder.record(step, {**figures, "time/rollout_seconds": 1.5, "time/update_seconds": 2.5})
    recorder.close()


def record(task: str, split: str, step: int, sample: int, passed: bool) -> TrajectoryRecord:
    """An episode of two turns: a call, right or wrong, and the end. What fails by sample: wrong
    arguments, broken JSON, no call, a loop until the tokens run out."""
    name, arguments = RIGHT[task]
    call = ToolCall(name, json.dumps(arguments), RESULTS[task], ok=True)
    said = (
        f"<reasoning>I call {name}.</reasoning>\n"
        f"<tool>{json.dumps([{'name': name, 'args': arguments}])}</tool>"
    )
    reason, calls, notes = StopReason.FINISHED, (call,), {}
    if not passed:
        notes = {"turn 0": "expected results are missing", "turn 0: missing results": RESULTS[task]}
        if sample == 0:
            call = ToolCall(
                name, '{"zeal": 1}', "Error: unexpected keyword argument 'zeal'", ok=False
            )
            calls, said = (call,), said.replace(json.dumps(arguments), '{"zeal": 1}')
        elif sample == 1:
            calls, said = (), f'<tool>[{{"name": "{name}", "args": }}]</tool>'
        elif sample == 2:
            calls, said, notes = (), "I know it already.", {"turn 0": "no call was made"}
        else:
            calls, said, reason = (
                (),
                "<reasoning>" + "round and round " * 60,
                StopReason.TOKEN_LIMIT,
            )
    return TrajectoryRecord(
        _played(
            task, sample, said, calls, reason, Score(float(passed), passed, {"state": 1.0}, notes)
        ),
        split,
        step,
        LABELS[task],
    )


def _played(
    task: str, sample: int, said: str, calls: Sequence[ToolCall], reason: StopReason, score: Score
) -> Trajectory:
    """The trajectory whose tokens are those of the conversation."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    opening = (Message("system", "Use the tools."), Message("user", QUERIES[task]))
    answer = (
        f"<tool_result>{calls[0].result}</tool_result>"
        if calls
        else "<tool_result>nothing was done</tool_result>"
    )
    pieces = [(said, True)]
    messages = [*opening, Message("assistant", said)]
    if reason is StopReason.FINISHED:
        pieces += [(answer, False), ("<TASK_FINISHED>", True)]
        messages += [Message("system", answer), Message("assistant", "<TASK_FINISHED>")]
    ids, sampled = [], []
    for text, mine in pieces:
        new = tokenizer.encode(text, add_special_tokens=False).ids
        ids += new
        sampled += [mine] * len(new)
    sampled_C = np.array(sampled)
    logprobs_C = np.where(sampled_C, -0.01 * (1 + np.arange(len(ids)) % 50), 0.0).astype(np.float32)
    return Trajectory(
        task_id=task,
        sample_index=sample,
        prompt_ids_P=np.array(
            tokenizer.encode("".join(m.content for m in opening), add_special_tokens=False).ids,
            np.int32,
        ),
        completion_ids_C=np.array(ids, np.int32),
        action_mask_C=sampled_C,
        sampler_logprobs_C=logprobs_C,
        weight_versions_C=np.where(sampled_C, 1, -1).astype(np.int32),
        messages=tuple(messages),
        calls=tuple(calls),
        turns=len([piece for piece in pieces if piece[1]]),
        stop_reason=reason,
        score=score,
    )


def with_content(one: TrajectoryRecord, content: str, task: str) -> TrajectoryRecord:
    """The same episode, in which the policy says `content`, and a tool answers it."""
    t = one.trajectory
    messages = (
        t.messages[0],
        Message("user", content),
        Message("assistant", content),
        Message("system", content),
    )
    calls = (ToolCall("echo", json.dumps({"text": content[:1000]}), content[:90_000], ok=True),)
    return dataclasses.replace(
        one,
        trajectory=dataclasses.replace(t, task_id=task, messages=messages, calls=calls, turns=1),
    )
