"""Every config loads, passes the checks, dry-runs on its own tasks, and differs as it says."""

import contextlib
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jaxgrpo.config.encoding import encode
from jaxgrpo.config.load import load_config
from jaxgrpo.config.overrides import leaves
from jaxgrpo.envs.bfcl.rewards import Correctness, Execution, Format
from jaxgrpo.rewards.judge import GibberishJudge
from jaxgrpo.train import main

CONFIGS = sorted(
    path.relative_to("configs").with_suffix("").as_posix()
    for path in Path("configs").rglob("*.py")
    if path.stem != "__init__"
)
NEEDS_SERVER = {"openenv_demo"}
"""tests/test_openenv_runs.py serves its environment."""
IDENTITY = {"name", "model.source", "model.revision"}
DIFFERENCES: dict[str, dict] = {
    "article/final": {},
    "article/dr_grpo": {
        "batching.advantage_normalization": "none",
        "batching.aggregation": "constant",
    },
    "dapo_style": {
        "loss.clip_high": 0.28,
        "loss.kl_beta": 0.0,
        "loss.tis_cap": 2.0,
        "batching.aggregation": "sequence",
        "batching.masked_stop_reasons": (),
        "training.reference_every": None,
    },
    "article/no_kl": {"loss.kl_beta": 0.0, "training.reference_every": None},
    "article/kl_0_04": {"loss.kl_beta": 0.04},
    "article/fixed_reference": {"training.reference_every": None},
    "article/mu_1": {"training.iterations": 1},
    "native_tools": {
        "environment.protocol": "native",
        "environment.docs": "without_response",
        "environment.result_limit": 4000,
    },
    "lora": {
        "lora.export": "adapter",
        "lora.rank": 32,
        "optimizer.learning_rate": 1e-5,
        "training.devices": 1,
        "training.gpus": (0,),
        "vllm.gpus": (1,),
    },
    "article/gibberish_penalty": {
        "rewards.functions": (
            GibberishJudge(url="https://api.openai.com/v1", model="gpt-4o-mini"),
        ),
    },
    "article/correctness": {
        "rewards.functions": (Correctness(),),
        "rewards.weights": (("environment", 0.0),),
    },
    "article/format_correctness": {
        "rewards.functions": (Format(), Correctness()),
        "rewards.weights": (("environment", 0.0), ("format", 0.2)),
    },
    "article/execution_format_correctness": {
        "rewards.functions": (Execution(), Format(), Correctness()),
        "rewards.weights": (("environment", 0.0), ("execution", 0.2), ("format", 0.2)),
    },
    "article/own_rubric": {"environment.reward": "call_match"},
    "h200x4_async": {"loss.tis_cap": 2.0, "training.max_staleness": 1},
    "h200x8": {
        "training.devices": 6,
        "training.gpus": (0, 1, 2, 3, 4, 5),
        "vllm.gpus": (6, 7),
        "vllm.servers": 2,
    },
    "multi_host": {
        "rollout.tasks_per_step": 16,
        "training.devices": None,
        "training.gpus": tuple(range(8)),
        "vllm.gpus": (),
        "vllm.urls": ("http://rollout:8000",),
    },
    "article/curriculum": {
        "environment.curriculum": True,
        "environment.max_turns": 4,
        "environment.stop_at_lost_turn": False,
        "rollout.max_turns": 40,
        "rollout.task_order": "as_given",
    },
}
"""Differences of each variant from the article's config, besides its name."""


def settings(name: str) -> dict:
    return {key: value for key, value, _ in leaves(load_config(f"configs/{name}.py"))}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loads_and_its_docstring_gives_its_command(name: str) -> None:
    config = load_config(f"configs/{name}.py")
    assert config.name == name.replace("/", "_")
    assert f"--config configs/{name}.py" in Path(f"configs/{name}.py").read_text()


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_variant_differs_from_the_article_only_in_what_it_says(name: str) -> None:
    article, variant = settings("h200x4"), settings(name)
    assert {
        key: variant[key] for key in article if variant[key] != article[key] and key not in IDENTITY
    } == DIFFERENCES[name]


def test_the_articles_recipe() -> None:
    recipe = settings("h200x4")
    assert recipe["rollout.tasks_per_step"] * recipe["rollout.group_size"] == 96
    expected = {
        "training.iterations": 2,
        "training.reference_every": 100,
        "loss.clip_low": 0.2,
        "loss.clip_high": 0.2,
        "loss.kl_beta": 0.001,
        "optimizer.learning_rate": 1e-6,
        "optimizer.warmup_steps": 20,
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.99,
        "optimizer.max_grad_norm": 0.2,
        "batching.advantage_normalization": "std",
        "batching.masked_stop_reasons": ("token_limit", "context_limit"),
        "rollout.max_completion_tokens": 2048,
        "rollout.max_turns": 10,
        "rollout.temperature": 1.0,
        "environment.release": "v3",
        "environment.categories": ("base",),
        "environment.max_turns": 1,
        "environment.docs": "article",
        "environment.run_last_step": False,
        "environment.reward": "official",
        "training.steps": 1600,
    }
    assert {key: recipe[key] for key in expected} == expected


# Dry runs.

ARTICLE = {
    # 2048 x 256 + 3 x (2 x 256 x 257 + 256 x 257 + 3 x 256 x 640 + 512) + 256
    "parameters": "2,592,000 (3 layers of width 256)",
    "devices": "3, compute in float32",
    "rollouts per batch": "12 tasks x 8 samples = 96",
    "micro-batches per step": "4 of 3 groups",
    "optimizer steps per batch": "2",
    "an epoch": "100 tasks = 8 batches = 16 steps",
    "the run": "1600 steps = 800 batches = 100.0 epochs",
}
DEMO = {
    "devices": "4, compute in float32",
    "attention": "plain XLA, as training.attention says",
    "rollouts per batch": "8 tasks x 8 samples = 64",
    "micro-batches per step": "2 of 4 groups",
    "an epoch": "38 tasks = 4 batches = 8 steps",
    "the run": "120 steps = 60 batches = 15.0 epochs",
}
SAID: dict[str, dict[str, str]] = {
    "article/mu_1": {
        "optimizer steps per batch": "1",
        "an epoch": "100 tasks = 8 batches = 8 steps",
        "the run": "1600 steps = 1600 batches = 200.0 epochs",
    },
    "article/curriculum": {
        "an epoch": "336 tasks = 28 batches = 56 steps",
        "the run": "1600 steps = 800 batches = 28.6 epochs",
    },
    "h200x8": {
        "devices": "6: this machine has 4 of kind cpu, where the run would be refused",
        "micro-batches per step": "2 of 6 groups",
    },
    "lora": {
        # rank 32 on q, k, v, o, gate, up, down of three layers:
        # 3 x 32 x (512 + 384 + 384 + 512 + 3 x 896)
        "trained parameters": "430,080 (LoRA of rank 32 on q, k, v, o, gate, up, down)",
        "devices": "1, compute in float32",
        "micro-batches per step": "12 of 1 groups",
    },
    "multi_host": {
        "devices": "4, compute in float32",  # all that there are
        "rollouts per batch": "16 tasks x 8 samples = 128",
        "micro-batches per step": "4 of 4 groups",
        "an epoch": "100 tasks = 6 batches = 12 steps",
        "the run": "1600 steps = 800 batches = 133.3 epochs",
    },
    "cpu_demo": DEMO,
    "vllm_cpu": {**DEMO, "the run": "40 steps = 20 batches = 5.0 epochs"},
    "qwen05_cpu": {
        "devices": "2, compute in float32",
        "rollouts per batch": "2 tasks x 4 samples = 8",
        "micro-batches per step": "1 of 2 groups",
        "optimizer steps per batch": "1",
        "an epoch": "100 tasks = 50 batches = 50 steps",
        "the run": "1 steps = 1 batches = 0.0 epochs",
    },
    "qwen05_gpu": {
        "devices": "4, compute in float32",
        "rollouts per batch": "8 tasks x 16 samples = 128",
        "micro-batches per step": "2 of 4 groups",
        "an epoch": "52 tasks = 6 batches = 12 steps",
        "the run": "120 steps = 60 batches = 10.0 epochs",
    },
    "sql": {
        "devices": "4, compute in float32",
        "rollouts per batch": "8 tasks x 8 samples = 64",
        "micro-batches per step": "2 of 4 groups",
        "an epoch": "53 tasks = 6 batches = 12 steps",
        "the run": "48 steps = 24 batches = 4.0 epochs",
    },
    "sql_gpu": {
        "devices": "4, compute in float32",
        "rollouts per batch": "8 tasks x 16 samples = 128",
        "micro-batches per step": "2 of 4 groups",
        "an epoch": "256 tasks = 32 batches = 64 steps",
        "the run": "120 steps = 60 batches = 1.9 epochs",
    },
    "procedural": {
        "devices": "4, compute in float32",
        "rollouts per batch": "4 tasks x 4 samples = 16",
        "micro-batches per step": "1 of 4 groups",
        "an epoch": "64 tasks = 16 batches = 32 steps",
        "the run": "20 steps = 10 batches = 0.6 epochs",
    },
}
"""What a dry run on four CPU devices says otherwise than that of the article's config."""


@pytest.fixture(autouse=True)
def _all_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Show all GPUs again after a config that names its own, and set the key of the judge."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    yield
    jax.config.update("jax_cuda_visible_devices", "all")


@functools.cache
def dry_run(name: str) -> tuple[dict, dict[str, str]]:
    """Return the config that `--dry-run` prints, and the lines after it by their names.

    The model has the tokenizer and sizes of the tiny one, a context for every prompt, and no
    weights. Its tokens are shorter than Qwen2.5's, so that prompts have more tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        for file in Path("assets/tiny-qwen2.5").iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
        sizes = json.loads((Path(folder) / "config.json").read_text())
        (Path(folder) / "config.json").write_text(
            json.dumps(sizes | {"max_position_embeddings": 16384})
        )
        overrides = [f"model.source={folder}", "model.revision=None", "evaluation.tasks=2"]
        if load_config(f"configs/{name}.py").rollout.max_prompt_tokens > 2048:
            overrides.append("rollout.max_prompt_tokens=12000")
        if name == "qwen05_cpu":
            overrides.append("training.devices=2")  # for two tasks
        arguments = [part for override in overrides for part in ("--set", override)]
        run, printed = Path(folder) / "run", io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert (
                main(
                    [
                        "--config",
                        f"configs/{name}.py",
                        *arguments,
                        "--dry-run",
                        "--run-dir",
                        str(run),
                    ]
                )
                == 0
            )
        assert not run.exists()
    config, end, lines = printed.getvalue().partition("\n}\n")
    return json.loads(config + end), {line[:26].strip(): line[26:] for line in lines.splitlines()}


def flat(tree: dict, prefix: str = "") -> dict:
    """Return nested dicts as one with dotted keys, and lists as tuples."""
    found: dict = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": _tuples(value)}
        )
    return found


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NEEDS_SERVER])
def test_a_dry_run_on_the_configs_own_tasks_says_what_would_run(name: str) -> None:
    said = dry_run(name)[1]
    expected = ARTICLE | SAID.get(name, {})
    assert {key: said[key] for key in expected} == expected
    assert ("trained parameters" in said) == (name == "lora")


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_dry_run_prints_the_variants_own_settings(name: str) -> None:
    article, variant = flat(dry_run("h200x4")[0]), flat(dry_run(name)[0])
    differences = {
        key: variant[key] for key in article if variant[key] != article[key] and key not in IDENTITY
    }
    assert differences == {key: _tuples(encode(value)) for key, value in DIFFERENCES[name].items()}
    assert variant["name"] == name.replace("/", "_")


def test_the_longest_prompt_is_that_of_the_configs_own_tool_documents() -> None:
    """Prompts get shorter from whole documents to documents without results to one line per tool.
    The first turns of the curriculum are the article's."""
    longest = {}
    for name in (
        "h200x4",
        "article/curriculum",
        "native_tools",
        "qwen05_cpu",
        "cpu_demo",
        "procedural",
    ):
        count, limit = dry_run(name)[1]["longest prompt"].split(" tokens of at most ")
        assert int(limit) == dry_run(name)[0]["rollout"]["max_prompt_tokens"]
        longest[name] = int(count)
    assert (
        longest["h200x4"]
        == longest["article/curriculum"]
        > longest["native_tools"]
        > 2 * longest["qwen05_cpu"]
    )
    assert longest["qwen05_cpu"] > longest["cpu_demo"] > longest["procedural"] > 100
