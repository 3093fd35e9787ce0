"""Shared by several tests: a vLLM server whose weights a test publishes, and its answers.

JAXGRPO_VLLM_PYTHON names the server's interpreter.
"""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.config.settings import VllmSettings
from jaxgrpo.learner.sharding import make_layout, make_mesh, store
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.numerics import einsum_float32
from jaxgrpo.models.qwen2 import Params, cast_to, forward, head_table, init_params
from jaxgrpo.samplers.vllm.http import Connection
from jaxgrpo.samplers.vllm.server import ServerPlan, VllmServer
from jaxgrpo.storage.pretrained import save_hf
from jaxgrpo.storage.publish import publish_weights
from tests.byte_chat import byte_tokenizer
from tests.training import CONFIG_JSON

PYTHON = os.environ.get("JAXGRPO_VLLM_PYTHON", "")
# vLLM's CPU kernels want a head size of at least 32
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [list(range(5, 45)), list(range(60, 90))]
BOUND = 0.02
"""Of the mean absolute difference of log-probabilities between the server, in bfloat16, and the
trainer's forward pass with the same weights."""


class Serving:
    """A server of a tiny model, and what tests do with it."""

    def __init__(
        self, folder: Path, tied: bool, *arguments: str, model: Path | None = None
    ) -> None:
        self.folder = folder
        self.config = ModelConfig.from_folder(model) if model else self._make_model(tied)
        ours = ("--worker-extension-cls", "tests.vllm_faults.Faults", "--enforce-eager")
        settings = VllmSettings(
            python=PYTHON, max_requests=4, cache_bytes=2**26, arguments=(*ours, *arguments)
        )
        plan = ServerPlan(settings, model or folder / "model", context_tokens=256)
        self.server = VllmServer(plan, folder / "vllm.log")
        self.published = 0
        self.prompts = PROMPTS
        self.tokens = 12

    def _make_model(self, tied: bool) -> ModelConfig:
        json_config = {**CONFIG_JSON, **SIZES, "tie_word_embeddings": tied}
        self.config = ModelConfig.from_hf(json_config)
        skeleton = self.folder / "skeleton"
        skeleton.mkdir()
        byte_tokenizer().save_pretrained(skeleton)
        (skeleton / "config.json").write_text(json.dumps(json_config))
        save_hf(self.params(0), skeleton, self.folder / "model")
        return self.config

    def params(self, seed: int) -> Params:
        """Random weights, large enough to show in every log-probability."""
        params = jax.tree.map(np.array, init_params(self.config, jax.random.key(seed)))
        params["embed"]["embedding"] *= 4
        for part in params["layers"].values():
            for weights_of in part.values():
                if isinstance(weights_of, dict):
                    weights_of["kernel"] *= 4
        return params

    def publish(self, params: Params, devices: int = 1) -> Path:
        """Write the next version without loading it."""
        self.published += 1
        mesh, layout = make_mesh(jax.devices()[:devices]), make_layout(self.config, devices)
        return publish_weights(
            store(params, layout, mesh),
            layout,
            mesh,
            self.config,
            self.published,
            self.folder / "weights",
        )

    def talk(self, conversation: Callable[[Connection], Any]) -> Any:
        async def talked() -> Any:
            connection = Connection(self.server.url, None, 4)
            try:
                return await conversation(connection)
            finally:
                await connection.close()

        return asyncio.run(talked())

    def load(self, folder: Path, version: int | None = None) -> None:
        """Load a version, as the client does. Raise SamplerError if the server refuses it."""

        async def conversation(connection: Connection) -> None:
            await connection.pause(60)
            await connection.update_weights(str(folder), version or int(folder.name), 120)

        try:
            self.talk(conversation)
        finally:  # over a new connection, because vLLM closes one after an error
            self.talk(lambda connection: connection.resume())

    def sampled(self) -> list[dict[str, Any]]:
        async def conversation(connection: Connection) -> list[dict[str, Any]]:
            sampling = {
                "temperature": 1.0,
                "max_tokens": self.tokens,
                "logprobs": 0,
                "seed": 1,
                "ignore_eos": True,
            }
            return [await connection.generate(prompt, sampling, 120) for prompt in self.prompts]

        return self.talk(conversation)

    def answers(self) -> list[tuple[list[int], list[float]]]:
        """Sampled tokens and their log-probabilities: a function of the weights."""
        return [
            (choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]])
            for choice in self.sampled()
        ]

    def version(self) -> str:
        return self.talk(lambda connection: connection.weight_version())

    def fail_in_next_apply(self, after: int, rank: int = 0) -> None:
        body = {"method": "fail_in_next_apply", "kwargs": {"after": after, "rank": rank}}
        self.talk(lambda connection: connection._call("POST", "/collective_rpc", body))

    def echoes(self) -> list[str]:
        body = {"method": "echo", "kwargs": {"value": "7"}}
        return self.talk(lambda connection: connection._call("POST", "/collective_rpc", body))[
            "results"
        ]

    def mismatch(
        self,
        params: Params,
        answers: list[tuple[list[int], list[float]]] | None = None,
        dtype: Any = jnp.float32,
    ) -> float:
        """Mean absolute difference between the log-probabilities of the server and the trainer.

        The trainer computes in `dtype`.
        """
        differences = []
        for prompt, (tokens, logprobs) in zip(self.prompts, answers or self.answers(), strict=True):
            ids = np.array(prompt + tokens)
            trainer = trainer_logprobs(self.config, params, ids, dtype)[-len(tokens) :]
            differences.append(np.abs(trainer - np.array(logprobs)))
        return float(np.mean(differences))


def trainer_logprobs(
    config: ModelConfig, params: Params, ids_T: np.ndarray, dtype: Any
) -> np.ndarray:
    """Log-probabilities of each token after the first, with the weights as they are published.

    The head is summed in float32, as in an update.
    """
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.bfloat16), params)
    hidden_TD = forward(config, rounded, ids_T[None], load=cast_to(dtype))[0]
    logprobs_TV = jax.nn.log_softmax(
        einsum_float32("td,vd->tv", hidden_TD, head_table(rounded).astype(dtype))
    )
    return np.asarray(logprobs_TV)[np.arange(len(ids_T) - 1), ids_T[1:]]
