"""The weight-transfer backend inside a real vLLM server (JAXGRPO_VLLM_PYTHON: its interpreter).

The log-probabilities of sampled tokens are compared with the trainer's float32 forward pass of the
published (bfloat16) weights. When the same weights come back, they must be bit-identical.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.models.qwen2 import Params
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.vllm.http import Connection
from jaxgrpo.storage.pretrained import load_params, load_tokenizer
from tests.plugin_serving import BOUND, PYTHON, Serving
from tests.publish_process import publish_by_processes
from tests.weight_damage import DAMAGES

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="JAXGRPO_VLLM_PYTHON names no interpreter"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    # In bfloat16, vLLM's CPU build has a packed copy of the head, which can be stale.
    head = ("--hf-overrides", '{"head_dtype": "model"}')
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
        f"\n{change.__name__}: mismatch {mismatch:.4f}, changed {after:.4f}, of the other weights"
        f" {tied.mismatch(first):.4f}"
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
        f"\n| {name} | {refusal.value} | version {tied.version()}, bit-identical"
        f" {tied.answers() == before} |"
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
    """The same with a model of a useful size.

    There, rounding alone reaches the bound in any bfloat16 forward pass. The trainer's therefore
    computes in bfloat16 too, as on accelerators.
    """
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
