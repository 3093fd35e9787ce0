"""A tiny random model and a rigged environment, for the tests of whole runs.

An episode is one sampled token.
"""

import dataclasses
import json
import string
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import (
    BatchingSettings,
    Config,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    RecordingSettings,
    RolloutSettings,
    TrainingSettings,
)
from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.learner.train_state import TrainState
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import init_params
from jaxgrpo.storage.pretrained import save_hf
from jaxgrpo.types import Message, Score, StopReason, Task
from tests.byte_chat import END, END_OF_TEXT, byte_tokenizer

EVERY_CHARACTER = (*map(chr, range(128)), "\ufffd")
CONFIG_JSON = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 260,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "eos_token_id": END, "bos_token_id": END_OF_TEXT,
    "pad_token_id": END_OF_TEXT,
}  # fmt: skip


def make_model(folder: Path) -> Path:
    """A random two-layer model in Hugging Face layout, with a tokenizer of bytes."""
    skeleton = folder / "skeleton"
    skeleton.mkdir()
    byte_tokenizer().save_pretrained(skeleton)
    (skeleton / "config.json").write_text(json.dumps(CONFIG_JSON))
    params = init_params(ModelConfig.from_hf(CONFIG_JSON), jax.random.key(0))
    save_hf(jax.tree.map(np.asarray, params), skeleton, folder / "model")
    return folder / "model"


@dataclasses.dataclass(frozen=True)
class Letters:
    """The first character is the whole episode; one of `good` is rewarded.

    Tasks of the train split whose index is in `broken`, or all of the test split when
    `broken_test`, fail in every episode.
    """

    good: str = string.ascii_letters
    train_size: int = 6
    test_size: int = 4
    bonus: float = 0.0
    broken: tuple[int, ...] = ()
    broken_test: bool = False

    def tasks(self, split: str) -> Sequence[Task]:
        size = self.train_size if split == "train" else self.test_size
        return [
            Task(f"{split}_{i}", ("even" if i % 2 == 0 else "odd",), (split, i))
            for i in range(size)
        ]

    def create(self, task: Task) -> "LettersEnvironment":
        split, index = task.payload  # type: ignore[misc]
        fails = self.broken_test if split == "test" else index in self.broken
        return LettersEnvironment(self, f"{split} {index}", fails)


class LettersEnvironment:
    def __init__(self, suite: Letters, query: str, fails: bool):
        self._suite, self._query, self._fails, self._text = suite, query, fails, ""

    def observe(self) -> Observation:
        return Observation((Message("user", self._query),), stop_strings=EVERY_CHARACTER)

    def step(self, action: str) -> StepResult:
        if self._fails:
            raise KeyError("the letters are lost")
        self._text = action
        return StepResult(stop_reason=StopReason.FINISHED)

    def score(self) -> Score:
        good = self._text != "" and self._text in self._suite.good
        return Score(float(good) + self._suite.bonus, good, {"letters": float(good)})


def small_config(model: Path | str) -> Config:
    """Six steps of two groups of four one-token episodes on one device."""
    return Config(
        name="small",
        model=ModelSettings(source=str(model)),
        environment=Letters(),
        rollout=RolloutSettings(
            group_size=4,
            tasks_per_step=2,
            max_prompt_tokens=96,
            max_completion_tokens=8,
            max_turns=2,
        ),
        batching=BatchingSettings(prompt_multiple=64, completion_multiple=8),
        optimizer=OptimizerSettings(learning_rate=1e-3, warmup_steps=0, max_grad_norm=1.0),
        training=TrainingSettings(
            steps=6, iterations=2, devices=1, reference_every=4, head_chunk=64
        ),
        evaluation=EvaluationSettings(before=False, after=False),
        recording=RecordingSettings(checkpoint_every=None, tensorboard=False, export_hf=False),
    )


def write_config(folder: Path, model: Path) -> Path:
    """A config file as a user writes one."""
    path = folder / "small.py"
    path.write_text(
        f"from tests.training import small_config\n\n\n"
        f"def get_config():\n"
        f"    return small_config({str(model)!r})\n"
    )
    return path


def changed(folder: Path, model: Path, *overrides: str) -> Config:
    """The small config, with overrides, through the loader."""
    return load_config(write_config(folder, model), overrides)


def metric_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TIMES = ("time/", "speed/", "eval/seconds", "train/compilations")
NOISE = ("train/mismatch",)
"""Which rows the sampler decodes together depends on the clock, and with it the last bits of its
log-probabilities."""


def steady(lines: list[dict]) -> list[dict]:
    """Lines without the keys that differ from run to run."""
    return [
        {key: value for key, value in line.items() if not key.startswith((*TIMES, *NOISE))}
        for line in lines
    ]


def weights(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]


def tasks_of(model: Path) -> Sequence[Task]:
    return small_config(model).environment.tasks("train")
