"""Tokens a second of the embedded sampler: `python -m benchmarks.sampler [MODEL_FOLDER] --batch 1 8 16`.

Without a folder, a random model of five million parameters and `--vocab` tokens. Each batch is `--group` episodes a group, on random
prompts of `--prompt` tokens: `--turns` turns of `--completion` tokens, with an observation of `--observation` tokens between them.
A batch is played twice, on other prompts: the first time compiles, the second is measured. Prints a table and one line of JSON.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.model import ModelConfig, Params, init_params
from jaxgrpo.pretrained import load_params
from jaxgrpo.samplers.base import SamplingRequest
from jaxgrpo.samplers.native import NativeSampler


class NoText:
    """A tokenizer for random tokens: nothing is decoded, for there are no stop strings."""

    def decode(self, token_ids: object, **_: object) -> str:
        return ""


def demo_model(vocab: int) -> tuple[ModelConfig, Params]:
    config = ModelConfig(vocab, 256, 5, 4, 2, 64, 768, 8192, 1e6, 1e-6, True)
    return config, init_params(config, jax.random.key(0))


async def play(sampler: NativeSampler, args: argparse.Namespace, batch: int, seed: int) -> float:
    """Seconds that `batch` episodes take."""
    rng = np.random.default_rng(seed)
    group = min(args.group, batch)
    vocab = args.vocab
    prompts = [rng.integers(0, vocab, args.prompt) for _ in range(batch // group)]

    async def episode(index: int) -> None:
        prompt = prompts[index // group]
        context = prompt
        observation = np.arange(args.observation) % vocab
        for _ in range(args.turns):
            names = f"{seed}.{index // group}", f"{seed}.{index}"
            request = SamplingRequest(*names, context, len(prompt), args.completion, seed=index, top_p=args.top_p)
            generation = await sampler.generate(request)
            context = np.concatenate([context, generation.token_ids_T, observation])
        await sampler.release(f"{seed}.{index}")

    start = time.perf_counter()
    await asyncio.gather(*[episode(i) for i in range(batch // group * group)])
    return time.perf_counter() - start


async def measure(config: ModelConfig, params: Params, args: argparse.Namespace) -> list[dict[str, float]]:
    results = []
    sampler = NativeSampler(
        config, params, NoText(), eos_token_ids=(), max_rows=max(args.batch), decode_chunk=args.chunk, compute_dtype=jnp.dtype(args.dtype)
    )
    print(f"{'batch':>6} {'tokens':>8} {'seconds':>8} {'tokens/s':>9} {'prefilled':>9} {'compiled':>8} {'first':>8}")
    for batch in args.batch:
        first = await play(sampler, args, batch, 2 * batch)
        before = sampler.metrics
        seconds = await play(sampler, args, batch, 2 * batch + 1)
        made = {k: v - getattr(before, k) for k, v in dataclasses.asdict(sampler.metrics).items()}
        rate = made["generated_tokens"] / seconds
        print(
            f"{batch:>6} {made['generated_tokens']:>8} {seconds:>8.2f} {rate:>9.1f} {made['prefill_tokens']:>9}"
            f" {sampler.compilations:>8} {first:>7.1f}s"
        )
        results.append({"batch": batch, "seconds": round(seconds, 3), "tokens_per_second": round(rate, 1)} | made)
    await sampler.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a Hugging Face model folder; a random small model without it")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--completion", type=int, default=100)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--observation", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=4096, help="of the random model")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    args = parser.parse_args()
    if args.folder:
        config = ModelConfig.from_folder(args.folder)
        params = load_params(args.folder, config, np.dtype(jnp.dtype(args.dtype)))
        args.vocab = config.vocab_size
    else:
        config, params = demo_model(args.vocab)
    results = asyncio.run(measure(config, params, args))
    device = f"{jax.devices()[0].device_kind} x1, {os.cpu_count()} CPU cores"
    about = {"benchmark": "sampler", "model": args.folder or "random 5M", "device": device, "dtype": args.dtype}
    print(json.dumps(about | {"prompt": args.prompt, "completion": args.completion, "turns": args.turns, "results": results}))


if __name__ == "__main__":
    main()
