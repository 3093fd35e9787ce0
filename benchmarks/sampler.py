"""Measure the tokens per second of the embedded sampler, beside vLLM's.

    python -m benchmarks.sampler [MODEL] [--python VLLM_PYTHON] [--json]

MODEL is a Hugging Face folder (default: the repository's tiny model). Both workloads use real text:

- `short`: as many prompts as episodes, each the first query of another BFCL task.
- `shared`: one BFCL prompt with its tool documents (`--docs`) for all episodes. It is computed
  before the clock starts, and timed on its own as `prefill`.

Every episode is one turn of `--tokens` tokens at temperature 1, without an end token,
log-probabilities included. Each dtype of `--dtype` is one side, an embedded sampler that computes
in it. With `--python`, the interpreter of vLLM's environment, vLLM serves the same weights in
bfloat16 on this machine. All sides sample the same prompts one after the other, round by round. The
first round compiles and is not counted. Prints a table of medians and one line of JSON (with
`--json` only that line).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import Turn, play, release
from jaxgrpo.config.settings import NativeSamplerSettings, VllmSettings
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.learner.sharding import make_layout
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.run.weights import LogicalWeights, publish
from jaxgrpo.samplers.base import Sampler
from jaxgrpo.samplers.native.sampler import NativeSampler
from jaxgrpo.samplers.vllm.client import VllmSampler
from jaxgrpo.samplers.vllm.server import ServerPlan, VllmServer
from jaxgrpo.storage.pretrained import load_params, load_tokenizer
from jaxgrpo.storage.publish import published_bytes
from jaxgrpo.storage.weight_folder import WeightFolder
from jaxgrpo.types import Message

TINY = Path(__file__).parent.parent / "assets" / "tiny-qwen2.5"
QUESTION = "Answer in one paragraph: {}"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of one round, as token ids."""

    shared: np.ndarray
    short: tuple[np.ndarray, ...]


def make_prompts(
    chat: Chat, docs: str, batches: Sequence[int], rounds: int, room: int
) -> list[Prompts]:
    """Return the prompts of `rounds` rounds. Their shared prompts have similar lengths, the longest
    first, so that later rounds need no new shape."""
    suite = Bfcl(docs=docs)
    tasks = [*suite.tasks("train"), *suite.tasks("test")]
    openings = [suite.create(task).observe() for task in tasks]
    rendered = sorted((chat.opening(o.messages, o.tools) for o in openings), key=len)
    fitting = [ids for ids in rendered if len(ids) <= room]
    if len(fitting) < rounds:
        raise SystemExit(
            f"{room} tokens of context are left for a prompt, the shortest has {len(rendered[0])}: "
            "try --docs signatures"
        )
    middle = (len(fitting) - rounds) // 2
    queries = [QUESTION.format(o.messages[-1].content) for o in openings]
    short = [chat.opening((Message("user", query),)) for query in queries]
    widest = max(batches)
    pick = lambda r: tuple(short[(r * widest + i) % len(short)] for i in range(widest))
    return [
        Prompts(shared, pick(r)) for r, shared in enumerate(fitting[middle : middle + rounds][::-1])
    ]


async def play_round(
    sides: dict[str, Sampler], prompts: Prompts, name: str, batches: Sequence[int], tokens: int
) -> dict[tuple[str, int, str], float]:
    """Return the tokens per second by (workload, batch, side). Those of `prefill` are prompt
    tokens."""
    rates = {}
    first = Turn(f"{name}-shared", 0, prompts.shared, 1)
    for side, sampler in sides.items():
        rates["prefill", 1, side] = len(prompts.shared) / await play(sampler, [first])
    for batch in batches:
        shared = [Turn(first.group, 1000 * batch + i, prompts.shared, tokens) for i in range(batch)]
        short = [
            Turn(f"{name}-short-{batch}-{i}", i, prompts.short[i], tokens) for i in range(batch)
        ]
        for workload, turns in (("short", short), ("shared", shared)):
            for side, sampler in sides.items():
                rates[workload, batch, side] = batch * tokens / await play(sampler, turns)
                await release(sampler, turns)
    for sampler in sides.values():
        await release(sampler, [first])
    return rates


@contextlib.contextmanager
def serve_vllm(
    python: str, model: Path, config: ModelConfig, params: Params, context: int, rows: int
) -> Iterator[VllmSampler]:
    """Serve the model with vLLM on this machine. The weights reach it by the ordinary publish."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(_weight_folder(Path(folder), config)) as versions,
    ):
        settings = VllmSettings(
            python=python,
            cache_bytes=2**30,
            max_requests=rows,
            request_seconds=900,
            publish_seconds=900,
            retries=0,
        )
        server = VllmServer(ServerPlan(settings, model, context), Path(folder) / "vllm.log")
        try:
            server.wait(900)
            sampler = VllmSampler(
                dataclasses.replace(settings, urls=(server.url,)),
                context,
                eos_token_ids=(),
                versions=versions,
                failure=server.failure,
            )
            yield sampler
        finally:
            server.close()


def _weight_folder(folder: Path, config: ModelConfig) -> WeightFolder:
    return WeightFolder(folder, published_bytes(make_layout(config, 1)))


def open_sides(
    args: argparse.Namespace, prompts: Sequence[Prompts], loop: EventLoopThread, stack: ExitStack
) -> dict[str, Sampler]:
    """Open the samplers of all sides, which serve the same weights. The stack closes them."""
    config = _endless(args.model)
    tokenizer, params = load_tokenizer(args.model), load_params(args.model, config, np.float32)
    rows, context = max(args.batch), len(prompts[0].shared) + args.tokens
    longest = max(map(len, prompts[0].short))
    settings = NativeSamplerSettings(
        rows, args.chunk, rows * (longest + args.tokens + 256) + 2 * context
    )
    sides: dict[str, Sampler] = {}
    for dtype in args.dtype:
        sampler = NativeSampler(config, params, tokenizer, settings, compute_dtype=jnp.dtype(dtype))
        sides[f"embedded {dtype}"] = sampler
        stack.callback(lambda closing=sampler: loop.call(closing.close()))
    if args.python:
        vllm = stack.enter_context(
            serve_vllm(args.python, args.model, config, params, max(context, 2048), rows)
        )
        stack.callback(lambda: loop.call(vllm.close()))
        publish(loop, vllm, LogicalWeights(params, config, 0))
        sides["vllm bfloat16"] = vllm
    return sides


def _endless(model: Path) -> ModelConfig:
    """Return the model's config without end tokens, so that all turns have the same length."""
    return dataclasses.replace(ModelConfig.from_folder(model), eos_token_ids=())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the contents of the line of JSON."""
    room = _endless(args.model).context_length - args.tokens
    chat = Chat(load_tokenizer(args.model))
    prompts = make_prompts(chat, args.docs, args.batch, args.rounds + 1, room)
    rates: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        loop = stack.enter_context(EventLoopThread())
        sides = open_sides(args, prompts, loop, stack)
        for number, round_prompts in enumerate(prompts):
            found = loop.call(
                play_round(sides, round_prompts, f"round-{number}", args.batch, args.tokens)
            )
            for key, rate in found.items() if number else ():
                rates[key].append(rate)
        compiled = {
            side: sampler.compilations
            for side, sampler in sides.items()
            if isinstance(sampler, NativeSampler)
        }
    return {
        "benchmark": "sampler",
        "model": args.model.name,
        "device": f"{jax.devices()[0].device_kind} x1, {os.cpu_count()} CPU cores",
        "prompt_tokens": {
            "shared": len(prompts[-1].shared),
            "short": round(statistics.mean(map(len, prompts[-1].short))),
        },
        "tokens": args.tokens,
        "rounds": args.rounds,
        "compilations": compiled,
        "results": [
            {
                "workload": workload,
                "batch": batch,
                "side": side,
                "tokens_per_second": round(statistics.median(found), 1),
            }
            for (workload, batch, side), found in rates.items()
        ],
    }


def table(measured: dict[str, Any]) -> str:
    """Return a table with one line per workload and batch, and one column per side."""
    results = measured["results"]
    sides = list(dict.fromkeys(result["side"] for result in results))
    rates = {
        (result["workload"], result["batch"], result["side"]): result["tokens_per_second"]
        for result in results
    }
    lines = ["tokens/s".ljust(16) + "".join(side.rjust(20) for side in sides)]
    for workload, batch in sorted(
        {key[:2] for key in rates}, key=lambda key: (key[0] != "prefill", key)
    ):
        lines.append(
            f"{workload} x {batch}".ljust(16)
            + "".join(f"{rates[workload, batch, side]:20.1f}" for side in sides)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=TINY)
    parser.add_argument("--python", help="the interpreter of vLLM's environment")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--docs",
        default="signatures",
        help="full, without_response or signatures: how long the shared prompt is",
    )
    parser.add_argument(
        "--chunk", type=int, default=16, help="decode_chunk of the embedded sampler"
    )
    parser.add_argument(
        "--dtype", nargs="+", default=["float32" if jax.default_backend() == "cpu" else "bfloat16"]
    )
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    args = parser.parse_args()
    measured = measure(args)
    if not args.json:
        print(table(measured))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
