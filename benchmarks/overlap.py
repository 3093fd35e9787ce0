"""Seconds a batch with rollouts ahead of training, beside the synchronous schedule: `python -m benchmarks.overlap [--config FILE]`.

By default the sampler stands for one on another machine: it sleeps. Each of `--streams` makes tokens at one rate, turns have random
lengths, and the rate is set so that the rollouts of a batch take as long as its update (`--balance` times as long). The rest is the real
thing: the loop of jaxgrpo.train, the tiny model, the warehouse's environments. With `--own-sampler` the config's own sampler plays; `--pin`
then gives its server one half of the cores and the trainer the other, as if they were two machines.

Runs with max_staleness 0 and `--staleness` take turns, `--repeats` times, the rate set anew for each pair. The first `--warm` batches of a
run are not counted, nor the last ones, behind which nothing is played any more. Prints a table and one line of JSON.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from jaxgrpo.config.load import check, load_config
from jaxgrpo.config.settings import Config, EvaluationSettings, RecordingSettings
from jaxgrpo.run.processes import Processes
from jaxgrpo.samplers.base import FinishReason, Generation, PolicyWeights, Sampler, SamplingRequest
from jaxgrpo.train import Training

_TURN_TOKENS = 40  # the median of a turn's length; lengths are log-normal, so that some episodes are stragglers
_FIRST_RATE = 200.0


class PacedSampler:
    """Random tokens, each stream at `rate` tokens a second, at most `streams` at once; each token's version is that of its time."""

    def __init__(self, rate: float, streams: int, eos: int, vocab: int, version: int):
        self._rate = rate
        self._free = asyncio.Semaphore(streams)
        self._eos = eos
        self._vocab = vocab
        self._published = [(0.0, version)]

    async def generate(self, request: SamplingRequest) -> Generation:
        rng = np.random.default_rng(request.seed)
        length = min(request.max_tokens, 1 + int(_TURN_TOKENS * rng.lognormal(0.0, 0.5)))
        ids_T = rng.integers(0, self._eos, length, np.int32)
        ids_T[-1] = self._eos
        async with self._free:
            start = time.perf_counter()
            await asyncio.sleep(length / self._rate)
        made_T = start + np.arange(1, length + 1) / self._rate
        times, versions = zip(*self._published)
        versions_T = np.asarray(versions)[np.searchsorted(times, made_T) - 1]
        return Generation(
            ids_T, np.full(length, -np.log(self._vocab), np.float32), versions_T, FinishReason.EOS
        )

    async def release(self, episode_id: str) -> None:
        pass

    async def publish(self, version: int, weights: PolicyWeights) -> Mapping[str, float]:
        self._published.append((time.perf_counter(), version))
        return {}

    async def close(self) -> None:
        pass


class PacedTraining(Training):
    """Training with the paced sampler."""

    rate: float
    streams: int

    def open_sampler(self, stack: ExitStack) -> Sampler:
        return PacedSampler(
            self.rate,
            self.streams,
            self.assets.chat.eos_ids[0],
            self.assets.config.vocab_size,
            self.version,
        )


class PinnedTraining(Training):
    """Training on the upper half of the cores, with a server on the lower half."""

    def open_sampler(self, stack: ExitStack) -> Sampler:
        cores = sorted(os.sched_getaffinity(0))
        stack.callback(_pin, cores)
        _pin(cores[: len(cores) // 2])  # the server inherits it
        sampler = super().open_sampler(stack)
        _pin(cores[len(cores) // 2 :])
        return sampler


def _pin(cores: Sequence[int]) -> None:
    """Every thread of this process."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def configured(args: argparse.Namespace, staleness: int, batches: int) -> Config:
    """The config, cut to some batches of one shape: nothing is compiled once a run is warm."""
    config = load_config(args.config, args.set)
    r, t = config.rollout, config.training
    changed = dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, tis_cap=2.0),
        batching=dataclasses.replace(
            config.batching,
            masked_stop_reasons=(),
            prompt_multiple=r.max_prompt_tokens,
            completion_multiple=r.max_completion_tokens,
        ),
        training=dataclasses.replace(t, steps=batches * t.iterations, max_staleness=staleness),
        evaluation=EvaluationSettings(before=False, after=False),
        recording=RecordingSettings(
            checkpoint_every=None, trajectories=False, export_hf=False, tensorboard=False
        ),
    )
    check(changed)
    return changed


def run(args: argparse.Namespace, staleness: int, batches: int, rate: float) -> list[dict]:
    """The metrics of `batches` of a run, without its first ones and those at its end."""
    kind: type[Training] = PinnedTraining if args.pin else Training
    if not args.own_sampler:
        kind = PacedTraining
        PacedTraining.rate, PacedTraining.streams = rate, args.streams
    with tempfile.TemporaryDirectory() as folder:
        with ExitStack() as stack:
            kind(
                configured(args, staleness, args.warm + batches + staleness),
                Path(folder),
                False,
                Processes(),
                stack,
            ).run()
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][args.warm : args.warm + batches]


def balanced_rate(args: argparse.Namespace) -> float:
    """Tokens a second at which a batch's rollouts take `--balance` times as long as what the trainer does with them, now."""
    lines = run(args, 0, 2, _FIRST_RATE)
    rollout = statistics.median(line["time/rollout_seconds"] for line in lines)
    trainer = statistics.median(
        line["time/batch_seconds"] - line["time/wait_seconds"] for line in lines
    )
    return _FIRST_RATE * rollout / (args.balance * trainer)


def summed_up(lines: Sequence[dict]) -> dict[str, float]:
    """Medians over batches; a batch's trainer seconds are what it does not wait."""
    median = lambda name: round(statistics.median(line[name] for line in lines), 4)
    return {
        "batch_seconds": median("time/batch_seconds"),
        "batch_seconds_mean": round(
            statistics.fmean(line["time/batch_seconds"] for line in lines), 4
        ),
        "rollout_seconds": median("time/rollout_seconds"),
        "trainer_seconds": round(
            statistics.median(
                line["time/batch_seconds"] - line["time/wait_seconds"] for line in lines
            ),
            4,
        ),
        "trainer_idle_fraction": median("time/trainer_idle_fraction"),
        "sampler_idle_fraction": median("time/sampler_idle_fraction"),
        "staleness_mean": median("train/staleness_mean"),
        "staleness_max": max(line["train/staleness_max"] for line in lines),
        "batches": len(lines),
    }


def show(results: Mapping[str, Mapping[str, float]]) -> None:
    print(
        f"{'schedule':<18}{'s a batch':>10}{'rollout s':>10}{'trainer s':>10}{'trainer idle':>13}{'sampler idle':>13}{'staleness':>16}"
    )
    for name, r in results.items():
        staleness = f"{r['staleness_mean']:.2f}, at most {r['staleness_max']}"
        print(
            f"{name:<18}{r['batch_seconds']:>10.2f}{r['rollout_seconds']:>10.2f}{r['trainer_seconds']:>10.2f}{r['trainer_idle_fraction']:>13.0%}"
            f"{r['sampler_idle_fraction']:>13.0%}{staleness:>16}"
        )


def compared(args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], float]:
    """Both schedules summed up, shown after each pair of runs; and the last pair's rate."""
    lines: dict[int, list[dict]] = {0: [], args.staleness: []}
    for _ in range(args.repeats):
        rate = 0.0 if args.own_sampler else balanced_rate(args)
        for staleness, of_all_runs in lines.items():
            of_all_runs += run(args, staleness, args.batches, rate)
        results = {
            f"max_staleness {staleness}": summed_up(of_all_runs)
            for staleness, of_all_runs in lines.items()
        }
        show(results)
    return results, rate


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/procedural.py")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--batches", type=int, default=6, help="counted batches of a run")
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--streams", type=int, default=64, help="of the sampler that sleeps")
    parser.add_argument(
        "--balance",
        type=float,
        default=1.0,
        help="seconds of rollouts for one second of the trainer",
    )
    parser.add_argument(
        "--own-sampler",
        action="store_true",
        help="the config's sampler instead of the one that sleeps",
    )
    parser.add_argument(
        "--pin",
        action="store_true",
        help="with --own-sampler: half of the cores for the server, half for the trainer",
    )
    args = parser.parse_args()
    if args.pin and not args.own_sampler:
        parser.error("--pin is for a server: give --own-sampler too")
    if min(args.staleness, args.batches, args.repeats) < 1:
        parser.error("--staleness, --batches and --repeats must be at least 1")
    return args


def main() -> None:
    args = parsed()
    results, rate = compared(args)
    synchronous, ahead = results.values()
    ratio = synchronous["batch_seconds"] / ahead["batch_seconds"]
    halves = synchronous["rollout_seconds"], synchronous["trainer_seconds"]
    possible = sum(halves) / max(halves)
    print(
        f"{ratio:.2f} times as many batches in the same time; {possible:.2f} if the halves of the synchronous schedule overlapped wholly"
    )
    config = configured(args, args.staleness, args.batches)
    about = {
        "benchmark": "overlap",
        "config": args.config,
        "sampler": config.sampler
        if args.own_sampler
        else f"sleeping, {args.streams} streams, {rate:.0f} tokens/s each at last",
        "pinned": args.pin,
        "device": f"{jax.devices()[0].device_kind} x{len(jax.devices())}, {os.cpu_count()} CPU cores",
        "rollouts": config.rollout.tasks_per_step * config.rollout.group_size,
    }
    print(
        json.dumps(
            about | {"ratio": round(ratio, 3), "possible": round(possible, 3), "results": results}
        )
    )


if __name__ == "__main__":
    main()
