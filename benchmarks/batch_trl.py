"""TRL's side of benchmarks.end_to_end: its GRPOTrainer, which waits for a request per batch.

The benchmark starts this process with the interpreter of TRL's environment. Some methods are
wrapped to be timed. One can be given completions instead of generating them, so that both sides can
be compared on the same tokens. Nothing else is changed.
"""

import collections
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.batch_work import Line, Work, exit_with_error, reward
from benchmarks.processor import PRODUCT, product_gflops

VERSION = "1.16."
NO_TOKEN = -1
"""Replaces the end tokens, so that completions have their full length. The generation still checks
for an end at each step."""


def rewards(completions: list, **columns: Any) -> list[float]:
    """TRL's reward function."""
    return [reward(messages[0]["content"]) for messages in completions]


class TimedTrainer(GRPOTrainer):
    """Records seconds of rollouts and of passes without gradients, prompts, and token counts."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.eos_token_ids = [NO_TOKEN]  # everything after these would be cut off
        self.seconds: collections.Counter[str] = collections.Counter()
        self.given: list[list[int]] | None = None
        self.prompts: list[list[int]] = []
        self.trained_tokens = 0

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def _generate(self, prompts: list) -> Any:
        with self.timed("rollout"):
            return super()._generate(prompts)

    def _calculate_rewards(self, *arguments: Any) -> Any:
        with self.timed("rollout"):
            return super()._calculate_rewards(*arguments)

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **settings: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*arguments, **settings)
        with self.timed("passes"):
            return super()._get_per_token_logps_and_entropies(*arguments, **settings)

    def _generate_single_turn(self, prompt_ids: list, *arguments: Any, **settings: Any) -> Any:
        given, self.given = self.given, None
        return (
            super()._generate_single_turn(prompt_ids, *arguments, **settings)
            if given is None
            else (given, None)
        )

    def _generate_and_score_completions(self, inputs: list) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.prompts = [
            row[mask.bool()].tolist()
            for row, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        self.trained_tokens = int(output["completion_mask"].sum())
        return output


class OnRequest(TrainerCallback):
    """Waits for requests. A batch ends where the next begins, so its time holds all work."""

    def __init__(self, line: Line, work: Work):
        self._line, self._work = line, work
        self._logs: list[dict[str, float]] = []
        self._running = self._check = False
        self.trainer: TimedTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % self._work.iterations:
            return
        trainer = self.trainer
        assert trainer is not None
        if self._running:
            self._line.send(self._reply(trainer))
        request = self._line.receive()
        if request is None:
            sys.exit()
        self._running, self._check, self._logs = True, request["check"], []
        trainer.given = [row for group in request.get("completions", ()) for row in group] or None
        trainer.seconds.clear()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **more: Any
    ) -> None:
        self._logs.append(logs)

    def _reply(self, trainer: TimedTrainer) -> dict[str, Any]:
        reply: dict[str, Any] = {
            "rollout": trainer.seconds["rollout"],
            "passes": trainer.seconds["passes"],
            "prompt_tokens": sum(map(len, trainer.prompts)),
            "trained_tokens": trainer.trained_tokens,
        }
        if self._check:
            reply["prompts"] = trainer.prompts[:: self._work.samples]
            reply["reward"] = self._logs[0]["reward"]
            reply["grad_norms"] = [logs["grad_norm"] for logs in self._logs]
        return reply


def settings(work: Work) -> dict[str, Any]:
    """Return the arguments of GRPOConfig except the folder. The work's options override them."""
    rows = len(work.conversations) * work.samples
    chosen = {
        "per_device_train_batch_size": work.samples,
        "gradient_accumulation_steps": rows // work.samples,
        "num_generations": work.samples,
        "max_completion_length": work.tokens,
        "num_iterations": work.iterations,
        "max_steps": (work.batches + 1) * work.iterations,  # the last batch never ends
        "temperature": 1.0,
        "generation_kwargs": {"eos_token_id": [NO_TOKEN]},
        "shuffle_dataset": False,
        "loss_type": "dapo",
        "beta": work.kl_beta,
        "use_bias_correction_kl": False,
        "epsilon": work.clip,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": work.b1,
        "adam_beta2": work.b2,
        "adam_epsilon": work.epsilon,
        "weight_decay": 0.0,
        "max_grad_norm": work.max_grad_norm,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    for option in work.options:
        key, _, value = option.partition("=")
        try:
            chosen[key] = json.loads(value)
        except json.JSONDecodeError:
            exit_with_error(f"--trl takes KEY=VALUE with a value in JSON, got {option!r}")
    return chosen


def configured(chosen: dict[str, Any], folder: str) -> GRPOConfig:
    """Return the GRPOConfig. Exit if it does not accept the arguments."""
    try:
        return GRPOConfig(output_dir=folder, **chosen)
    except (TypeError, ValueError) as error:
        exit_with_error(f"--trl: {error}")


def product_rate() -> float:
    """Return float32 GFLOP/s of a core, on the product that both sides time."""
    rows, inner, columns = PRODUCT
    left, right = torch.ones(rows, inner), torch.ones(columns, inner)
    return product_gflops(lambda: torch.nn.functional.linear(left, right))


def main() -> None:
    line = Line()
    work = Work(**line.receive())
    if not version("trl").startswith(VERSION):
        sys.exit(f"found trl {version('trl')}, but this times methods of trl {VERSION}x")
    torch.set_num_threads(work.threads)
    chosen = settings(work)
    rows = [{"prompt": conversation} for conversation in work.conversations] * (work.batches + 1)
    callback = OnRequest(line, work)
    with tempfile.TemporaryDirectory() as folder:
        trainer = callback.trainer = TimedTrainer(
            model=work.model,
            reward_funcs=rewards,
            args=configured(chosen, folder),
            train_dataset=Dataset.from_list(rows),
            callbacks=[callback],
        )
        versions = {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")}
        attention = trainer.model.config._attn_implementation
        threads = torch.get_num_threads()
        line.send(
            {
                "versions": versions,
                "settings": chosen | {"attention": attention, "threads": threads},
                "product_gflops": product_rate(),
            }
        )
        trainer.train()


if __name__ == "__main__":
    main()
