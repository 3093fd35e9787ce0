"""The weight-transfer backend inside a real vLLM server, whose interpreter JAXGRPO_VLLM_PYTHON names.

What is compared: log-probabilities of tokens that the server samples, with the trainer's own float32 forward of the published (bfloat16)
weights, and with themselves, bit by bit, when the same weights come back.
"""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.learner.sharding import make_layout, make_mesh, store
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.numerics import einsum_float32
from jaxgrpo.models.qwen2 import Params, cast_to, forward, head_table, init_params
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.vllm.http import Connection
from jaxgrpo.samplers.vllm.server import ServerPlan, VllmServer
from jaxgrpo.storage import publish as weights
from jaxgrpo.storage.pretrained import load_params, load_tokenizer, save_hf
from tests.byte_chat import byte_tokenizer
from tests.publish_process import publish_by_processes
from tests.training import CONFIG_JSON
from tests.weight_damage import DAMAGES

PYTHON = os.environ.get("JAXGRPO_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="JAXGRPO_VLLM_PYTHON names no interpreter"),
    pytest.mark.timeout(900),
]

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # vLLM's CPU kernels want heads of 32 at least
PROMPTS = [list(range(5, 45)), list(range(60, 90))]
BOUND = 0.02
"""Mean absolute difference of log-probabilities between the server, in bfloat16, and the trainer's forward of the same weights."""


class Serving:
    """A server of a tiny model, and what a test does with it."""

    def __init__(self, folder: Path, tied: bool, *arguments: str, model: Path | None = None):
        self.folder = folder
        self.config = ModelConfig.from_folder(model) if model else self._make_model(tied)
        ours = ("--worker-extension-cls", "tests.vllm_faults.Faults", "--enforce-eager")
        plan = ServerPlan(
            PYTHON,
            model or folder / "model",
            256,
            4,
            cache_bytes=2**26,
            arguments=(*ours, *arguments),
        )
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
        """Random weights, larger than usual, so that what is served shows in every log-probability."""
        params = jax.tree.map(np.array, init_params(self.config, jax.random.key(seed)))
        params["embed"]["embedding"] *= 4
        for part in params["layers"].values():
            for weights_of in part.values():
                if isinstance(weights_of, dict):
                    weights_of["kernel"] *= 4
        return params

    def publish(self, params: Params, devices: int = 1) -> Path:
        """The next version, written but not loaded."""
        self.published += 1
        mesh, layout = make_mesh(jax.devices()[:devices]), make_layout(self.config, devices)
        return weights.publish_weights(
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
        """What the client does. Raises SamplerError when the server keeps its weights."""

        async def conversation(connection: Connection) -> None:
            await connection.pause(60)
            await connection.update_weights(str(folder), version or int(folder.name), 120)

        try:
            self.talk(conversation)
        finally:  # over a new connection: after an error vLLM closes the one that it came over
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
        """Mean absolute difference between the server's log-probabilities and the trainer's, which computes in `dtype`."""
        differences = []
        for prompt, (tokens, logprobs) in zip(self.prompts, answers or self.answers(), strict=True):
            ids = np.array(prompt + tokens)
            trainer = trainer_logprobs(self.config, params, ids, dtype)[-len(tokens) :]
            differences.append(np.abs(trainer - np.array(logprobs)))
        return float(np.mean(differences))


def trainer_logprobs(
    config: ModelConfig, params: Params, ids_T: np.ndarray, dtype: Any
) -> np.ndarray:
    """Of each token after the first, by the weights as they are published; the head is summed in float32, as in an update."""
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.bfloat16), params)
    hidden_TD = forward(config, rounded, ids_T[None], load=cast_to(dtype))[0]
    logprobs_TV = jax.nn.log_softmax(
        einsum_float32("td,vd->tv", hidden_TD, head_table(rounded).astype(dtype))
    )
    return np.asarray(logprobs_TV)[np.arange(len(ids_T) - 1), ids_T[1:]]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    head = (
        "--hf-overrides",
        '{"head_dtype": "model"}',
    )  # in bfloat16 vLLM's CPU build has a packed copy of the head, which can be stale
    yield from serving(tmp_path_factory.mktemp("tied"), True, *head)


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two workers on one NUMA node
        yield from serving(
            tmp_path_factory.mktemp("parallel"), False, "--tensor-parallel-size", "2"
        )


def serving(folder: Path, tied: bool, *arguments: str) -> Iterator[Serving]:
    server = Serving(folder, tied, *arguments)
    try:
        server.server.wait(300)
        server.load(server.publish(server.params(0)))
        yield server
    finally:
        server.server.close()


def change_embedding(params: Params) -> None:
    params["embed"]["embedding"] = params["embed"]["embedding"][::-1].copy()


def change_layers(params: Params) -> None:
    for path in (("attention", "q"), ("attention", "o"), ("mlp", "down")):
        kernel = params["layers"][path[0]][path[1]]["kernel"]
        kernel[:] = kernel[::-1]


def change_small_ones(params: Params) -> None:
    params["norm"]["scale"] *= 1.5
    params["layers"]["input_norm"]["scale"] *= 0.5
    params["layers"]["attention"]["v"]["bias"] += 0.5


@pytest.mark.parametrize("change", [change_embedding, change_layers, change_small_ones])
def test_new_weights_are_served_and_old_ones_come_back_bit_for_bit(
    tied: Serving, change: Callable[[Params], None]
) -> None:
    first, changed = tied.params(0), tied.params(0)
    change(changed)
    tied.load(tied.publish(first))
    before, mismatch = tied.answers(), tied.mismatch(first)
    folder = tied.publish(changed, 3)
    tied.load(folder)
    assert tied.version() == str(tied.published)
    assert all(
        span["version"] == str(tied.published)
        for choice in tied.sampled()
        for span in choice["weight_versions"]
    )
    after = tied.mismatch(changed)
    print(
        f"\n{change.__name__}: mismatch {mismatch:.4f}, changed {after:.4f}, of the other weights {tied.mismatch(first):.4f}"
    )
    assert mismatch < BOUND and after < BOUND and tied.mismatch(first) > 5 * BOUND
    tied.load(tied.publish(first))
    assert tied.answers() == before


def test_the_writers_devices_do_not_matter(tied: Serving) -> None:
    params, answers = tied.params(1), []
    for devices in (1, 3, 4):
        tied.load(tied.publish(tied.params(0)))
        tied.load(tied.publish(params, devices))
        answers.append(tied.answers())
    assert answers[0] == answers[1] == answers[2]


def test_nor_do_the_writers_processes(tied: Serving) -> None:
    tied.load(tied.publish(tied.params(0)))
    before = tied.answers()
    tied.load(tied.publish(tied.params(1)))
    assert tied.answers() != before
    tied.published += 1
    tied.load(
        publish_by_processes(2, tied.folder / "model", tied.published, tied.folder / "weights")
    )
    assert tied.answers() == before and tied.version() == str(tied.published)


def test_what_is_served_does_not_hang_on_its_files(tied: Serving) -> None:
    """They are written over when a later version is published."""
    folder = tied.publish(tied.params(1))
    tied.load(folder)
    before = tied.answers()
    files = [path for path in folder.glob("params/*/c/**/*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert tied.answers() == before
    tied.load(tied.publish(tied.params(0)))


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_change_nothing(tied: Serving, name: str) -> None:
    tied.load(tied.publish(tied.params(0)))
    before, version = tied.answers(), tied.version()
    folder = tied.publish(tied.params(1))
    named_seven = folder.with_name("000007")
    shutil.rmtree(named_seven, ignore_errors=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 7}))
    folder.rename(named_seven)
    DAMAGES[name][0](named_seven)
    with pytest.raises(SamplerError, match="version 7 is refused: ") as refusal:
        tied.load(named_seven, 7)
    print(
        f"\n| {name} | {refusal.value} | version {tied.version()}, bit-identical {tied.answers() == before} |"
    )
    assert tied.answers() == before and tied.version() == version
    tied.load(tied.publish(tied.params(1)))
    assert tied.mismatch(tied.params(1)) < BOUND


@pytest.mark.parametrize("after", [0, 1, 6, 20])
def test_a_failure_half_way_puts_the_old_version_back(tied: Serving, after: int) -> None:
    tied.load(tied.publish(tied.params(0)))
    before, version = tied.answers(), tied.version()
    folder = tied.publish(tied.params(1))
    tied.fail_in_next_apply(after)
    with pytest.raises(SamplerError, match="the one before it was put back"):
        tied.load(folder)
    assert tied.answers() == before and tied.version() == version
    tied.load(folder)
    assert tied.mismatch(tied.params(1)) < BOUND


REAL = os.environ.get("JAXGRPO_REAL_MODEL", "")
TEXTS = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "import numpy as np\n\ndef softmax(x):\n",
    "The capital of France is Paris. The capital of Italy is",
    "The quick brown fox jumps over the lazy dog. In this story, the fox",
)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="JAXGRPO_REAL_MODEL names no folder of a real model")
def test_a_real_model(tmp_path: Path) -> None:
    """As above, on a model of a useful size. Rounding alone is of the size of the bound there, in any forward in bfloat16: the trainer's is
    computed in bfloat16 too, as on accelerators."""
    serving = Serving(tmp_path, True, model=Path(REAL))
    first, tokenizer = load_params(REAL, dtype="float32"), load_tokenizer(REAL)
    serving.prompts, serving.tokens = [tokenizer.encode(text) for text in TEXTS], 32
    try:
        serving.server.wait(600)
        given = []
        for change in (keep, soften_embedding, soften_layers, keep):
            changed = jax.tree.map(np.copy, first)
            change(changed)
            serving.load(serving.publish(changed))
            given.append(serving.answers())
            served, stale = (
                serving.mismatch(params, given[-1], jnp.bfloat16) for params in (changed, first)
            )
            print(
                f"\n{change.__name__}: mismatch {served:.4f}, of the first weights {stale:.4f}",
                flush=True,
            )
            assert served < BOUND and (change is keep or stale > 2 * BOUND)
        assert given[-1] == given[0]
    finally:
        serving.server.close()


def keep(params: Params) -> None:
    """No change."""


def soften_embedding(params: Params) -> None:
    params["embed"]["embedding"] *= 0.8


def soften_layers(params: Params) -> None:
    params["layers"]["mlp"]["down"]["kernel"][3:9] *= 0.7
    params["layers"]["attention"]["o"]["kernel"][10:14] *= 0.5


def test_workers_of_a_parallel_server_take_their_parts(parallel: Serving) -> None:
    parallel.load(parallel.publish(parallel.params(1), 3))
    assert parallel.mismatch(parallel.params(1)) < BOUND


def test_workers_of_a_parallel_server_go_back_together(parallel: Serving) -> None:
    parallel.load(parallel.publish(parallel.params(0)))
    before = parallel.answers()
    folder = parallel.publish(parallel.params(1))
    parallel.fail_in_next_apply(5, rank=1)
    with pytest.raises(SamplerError, match="put back"):
        parallel.load(folder)
    assert parallel.answers() == before
    parallel.load(folder)
    assert parallel.mismatch(parallel.params(1)) < BOUND
    assert parallel.echoes() == [
        "7",
        "7",
    ]  # no worker's answer to an earlier call was left for a later one


def test_a_parallel_server_survives_a_request_that_no_worker_understands(parallel: Serving) -> None:
    async def conversation(connection: Connection) -> None:
        await connection._call("POST", "/start_weight_update")
        try:
            await connection._call(
                "POST", "/update_weights", {"update_info": {"folder": "somewhere"}}
            )
        finally:
            with contextlib.suppress(SamplerError):
                await connection._call("POST", "/finish_weight_update")

    with pytest.raises(SamplerError, match="not understood"):
        parallel.talk(conversation)
    assert parallel.echoes() == ["7", "7"]
    parallel.load(parallel.publish(parallel.params(1)))
    assert parallel.mismatch(parallel.params(1)) < BOUND


def test_a_worker_that_cannot_go_back_ends(tmp_path: Path) -> None:
    server = Serving(tmp_path, True)
    try:
        server.server.wait(300)
        folder = server.publish(server.params(0))
        server.load(folder)
        shutil.rmtree(folder)
        server.fail_in_next_apply(6)
        with pytest.raises(SamplerError):
            server.load(server.publish(server.params(1)))
        with pytest.raises(SamplerError):
            server.answers()
        assert "rather than serve a mixture" in (tmp_path / "vllm.log").read_text()
    finally:
        server.server.close()
