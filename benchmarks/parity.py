"""Is this the model that transformers computes? Float32 logits and greedy tokens of a Qwen2.5 folder, by every path of this project.

    python -m benchmarks.parity /models/Qwen2.5-0.5B-Instruct

For each prompt transformers (float32, CPU) generates greedily; then its sequence goes through the plain forward pass, and through the
shared-prompt forward pass in a padded batch, where each prompt also carries the continuation of its neighbour. Reported are the largest
absolute differences of the logits, and whether each path picks the same tokens (a path that picks the given next token at every position of
a sequence would have generated it). The embedded sampler generates by itself, all prompts at once.
Exits 1 when a token differs or the logits differ by more than --bound. Needs torch.
"""

import argparse
import asyncio
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import (
    Params,
    cast_to,
    default_embed,
    forward,
    forward_shared_prompt,
    head_table,
)
from jaxgrpo.samplers.base import Generation, SamplingRequest
from jaxgrpo.samplers.native.sampler import NativeSampler
from jaxgrpo.storage import pretrained

CHATS = (
    "Write a function that returns the n-th Fibonacci number.",
    "You may call get_weather(city). What is the weather in Oslo and in Turin?",
    "Translate to French: the ship leaves at noon.",
    "Count from 7 to 20.",
)
LOAD = cast_to(jnp.float32)


class Transformers:
    """The reference, in float32."""

    def __init__(self, folder: Path):
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()

    @torch.no_grad()
    def greedy(self, prompt_P: np.ndarray, length: int) -> np.ndarray:
        """The `length` most likely next tokens one after another, whatever they are."""
        out, cache, ids = [], None, torch.tensor(prompt_P)[None]
        for _ in range(length):
            step = self._model(ids, past_key_values=cache, use_cache=True)
            cache, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
            out.append(int(ids))
        return np.array(out, np.int32)

    @torch.no_grad()
    def logits(self, ids_T: np.ndarray) -> np.ndarray:
        """[T] -> [T, V]."""
        return self._model(torch.tensor(ids_T)[None]).logits[0].numpy()


def plain_logits(config: ModelConfig, params: Params, ids_T: np.ndarray) -> np.ndarray:
    """[T] -> [T, V] through `forward`."""
    return np.asarray(
        forward(config, params, jnp.asarray(ids_T)[None], load=LOAD)[0] @ head_table(params).T
    )


def shared_logits(
    config: ModelConfig, params: Params, prompts: list[np.ndarray], completions_NGC: np.ndarray
) -> np.ndarray:
    """N prompts of any lengths and their completions -> [N, G, C, V] through `forward_shared_prompt`."""
    lengths_N = np.array([len(p) for p in prompts])
    prompt_NP = np.stack([np.pad(p, (0, lengths_N.max() - len(p))) for p in prompts])
    embed = functools.partial(default_embed, load=LOAD)
    arrays = map(jnp.asarray, (prompt_NP, lengths_N, completions_NGC))
    return np.asarray(
        forward_shared_prompt(config, params, *arrays, load=LOAD, embed=embed)
        @ head_table(params).T
    )


async def sampled(
    config: ModelConfig, params: Params, tokenizer: Any, prompts: list[np.ndarray], length: int
) -> list[Generation]:
    """Greedy generations of the embedded sampler (prefill and decode over its caches), all prompts in one batch."""
    sampler = NativeSampler(
        config,
        params,
        tokenizer,
        eos_token_ids=(),
        max_cache_tokens=4096,
        compute_dtype=jnp.float32,
    )
    requests = [
        SamplingRequest(f"group {i}", f"episode {i}", p, len(p), length, seed=0, temperature=0.0)
        for i, p in enumerate(prompts)
    ]
    try:
        return list(await asyncio.gather(*map(sampler.generate, requests)))
    finally:
        await sampler.close()


def margin(logits_CV: np.ndarray) -> float:
    """The smallest distance between the best and the second best token: differences far below it cannot change a greedy choice."""
    top = np.partition(logits_CV, -2, axis=-1)[..., -2:]
    return float((top[..., 1] - top[..., 0]).min())


def log_softmax_at(logits_CV: np.ndarray, ids_C: np.ndarray) -> np.ndarray:
    """Log-probabilities [C] of the given tokens, in float64."""
    logits_CV = logits_CV.astype(np.float64)
    shifted = logits_CV - logits_CV.max(-1, keepdims=True)
    return shifted[np.arange(len(ids_C)), ids_C] - np.log(np.exp(shifted).sum(-1))


def measure(folder: Path, length: int) -> tuple[dict[str, float], dict[str, int]]:
    """The largest differences by what they are of, and the number of differing greedy tokens by path."""
    config = ModelConfig.from_folder(folder)
    tokenizer = pretrained.load_tokenizer(folder)
    reference = Transformers(folder)
    prompts = [
        np.array(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": c}], add_generation_prompt=True
            )["input_ids"],
            np.int32,
        )
        for c in CHATS
    ]
    greedy_NC = np.stack([reference.greedy(prompt, length) for prompt in prompts])
    completions_NGC = np.stack([greedy_NC, np.roll(greedy_NC, 1, axis=0)], axis=1)
    params = jax.tree.map(jnp.asarray, pretrained.load_params(folder, config, np.float32))
    shared_NGCV = shared_logits(config, params, prompts, completions_NGC)
    generations = asyncio.run(sampled(config, params, tokenizer, prompts, length))
    differences = dict.fromkeys(
        ("plain logits", "shared-prompt logits", "sampler log-probabilities"), 0.0
    )
    wrong = dict.fromkeys(("plain", "shared-prompt", "sampler"), 0)
    margins = []
    for n, prompt in enumerate(prompts):
        predicting = slice(len(prompt) - 1, len(prompt) - 1 + length)
        for g in (0, 1):
            theirs_TV = reference.logits(np.concatenate([prompt, completions_NGC[n, g]]))
            shared_difference = np.abs(shared_NGCV[n, g] - theirs_TV[predicting]).max()
            differences["shared-prompt logits"] = max(
                differences["shared-prompt logits"], float(shared_difference)
            )
            if g == 0:
                ours_TV = plain_logits(config, params, np.concatenate([prompt, greedy_NC[n]]))
                differences["plain logits"] = max(
                    differences["plain logits"], float(np.abs(ours_TV - theirs_TV).max())
                )
                margins.append(margin(theirs_TV[predicting]))
                wrong["plain"] += int((ours_TV[predicting].argmax(-1) != greedy_NC[n]).sum())
                logprobs_C = log_softmax_at(theirs_TV[predicting], greedy_NC[n])
                off = float(np.abs(generations[n].logprobs_T - logprobs_C).max())
                differences["sampler log-probabilities"] = max(
                    differences["sampler log-probabilities"], off
                )
        wrong["shared-prompt"] += int((shared_NGCV[n, 0].argmax(-1) != greedy_NC[n]).sum())
        wrong["sampler"] += int((generations[n].token_ids_T != greedy_NC[n]).sum())
    print(
        f"{len(prompts)} prompts of {[len(p) for p in prompts]} tokens, {length} greedy tokens each"
    )
    print(
        f"largest logit {np.abs(shared_NGCV).max():.1f}; smallest margin of a greedy choice {min(margins):.3g}"
    )
    return differences, wrong


def main() -> None:
    """Read the arguments, measure, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument(
        "--tokens", type=int, default=64, help="greedy tokens for each prompt (default: 64)"
    )
    parser.add_argument(
        "--bound",
        type=float,
        default=1e-3,
        help="largest difference of logits that passes (default: 0.001)",
    )
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    started = time.monotonic()
    differences, wrong = measure(pretrained.locate(args.model), args.tokens)
    for name, difference in differences.items():
        print(f"largest absolute difference of {name}: {difference:.3g}")
    for name, count in wrong.items():
        print(f"greedy tokens that differ, {name}: {count} of {args.tokens * len(CHATS)}")
    print(f"{time.monotonic() - started:.0f} s on {jax.devices()[0].device_kind}")
    if max(differences.values()) > args.bound or any(wrong.values()):
        raise SystemExit("parity: not the same model")


if __name__ == "__main__":
    main()
