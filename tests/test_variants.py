"""The configs that ship: each loads, passes the checks, dry-runs with a tiny model, and differs from its base as it says."""

import dataclasses
from pathlib import Path

import pytest

from envs.bfcl.rewards import Correctness, Execution, Format
from envs.procedural import Warehouse
from jaxgrpo.config import load_config
from jaxgrpo.judge import GibberishJudge
from jaxgrpo.overrides import leaves
from jaxgrpo.train import main
from tests.training import make_model

CONFIGS = sorted(
    path.relative_to("configs").with_suffix("").as_posix() for path in Path("configs").rglob("*.py") if path.stem != "__init__"
)
TREATMENTS = [name for name in CONFIGS if name.startswith("article/")]
VARIANTS = ("h200x4", "dapo_style", "native_tools", "h200x4_async", "lora", *TREATMENTS)
IDENTITY = {"name", "model.source", "model.revision"}


def settings(name: str) -> dict:
    return {key: value for key, value, _ in leaves(load_config(f"configs/{name}.py"))}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loads_and_its_docstring_gives_its_command(name: str) -> None:
    config = load_config(f"configs/{name}.py")
    assert config.name == name.replace("/", "_")
    assert f"--config configs/{name}.py" in Path(f"configs/{name}.py").read_text()


@pytest.mark.parametrize(
    ("name", "differences"),
    [
        ("article/final", {}),
        ("article/dr_grpo", {"packing.advantage_normalization": "none", "packing.aggregation": "constant"}),
        (
            "dapo_style",
            {
                "loss.clip_high": 0.28,
                "loss.kl_beta": 0.0,
                "loss.tis_cap": 2.0,
                "packing.aggregation": "sequence",
                "packing.masked_stop_reasons": (),
                "training.reference_every": None,
            },
        ),
        ("article/no_kl", {"loss.kl_beta": 0.0, "training.reference_every": None}),
        ("article/kl_0_04", {"loss.kl_beta": 0.04}),
        ("article/fixed_reference", {"training.reference_every": None}),
        ("article/mu_1", {"training.iterations": 1}),
        (
            "native_tools",
            {"environment.protocol": "native", "environment.docs": "without_response", "environment.result_limit": 4000},
        ),
        (
            "lora",
            {
                "lora.export": "adapter",
                "lora.rank": 32,
                "optimizer.learning_rate": 1e-5,
                "training.devices": 1,
                "training.gpus": (0,),
                "vllm.gpus": (1,),
            },
        ),
        (
            "article/gibberish_penalty",
            {"rewards.functions": (GibberishJudge(url="https://api.openai.com/v1", model="gpt-4o-mini"),)},
        ),
        (
            "article/correctness",
            {"rewards.functions": (Correctness(),), "rewards.weights": (("environment", 0.0),)},
        ),
        (
            "article/format_correctness",
            {
                "rewards.functions": (Format(), Correctness()),
                "rewards.weights": (("environment", 0.0), ("format", 0.2)),
            },
        ),
        (
            "article/execution_format_correctness",
            {
                "rewards.functions": (Execution(), Format(), Correctness()),
                "rewards.weights": (("environment", 0.0), ("execution", 0.2), ("format", 0.2)),
            },
        ),
        ("article/own_rubric", {"environment.reward": "call_match"}),
        ("h200x4_async", {"loss.tis_cap": 2.0, "training.max_staleness": 1}),
        ("h200x8", {"training.devices": 6, "training.gpus": (0, 1, 2, 3, 4, 5), "vllm.gpus": (6, 7), "vllm.servers": 2}),
        (
            "multi_host",
            {
                "rollout.tasks_per_step": 16,
                "training.devices": None,
                "training.gpus": tuple(range(8)),
                "vllm.gpus": (),
                "vllm.urls": ("http://rollout:8000",),
            },
        ),
        (
            "article/curriculum",
            {
                "environment.curriculum": True,
                "environment.max_turns": 4,
                "environment.stop_at_lost_turn": False,
                "rollout.max_turns": 40,
                "rollout.task_order": "as_given",
            },
        ),
    ],
)
def test_a_variant_differs_from_the_article_only_in_what_it_says(name: str, differences: dict) -> None:
    article, variant = settings("h200x4"), settings(name)
    assert {key: variant[key] for key in article if variant[key] != article[key] and key not in IDENTITY} == differences


def test_the_articles_recipe():
    recipe = settings("h200x4")
    assert recipe["rollout.tasks_per_step"] * recipe["rollout.group_size"] == 96
    expected = {
        "training.iterations": 2, "training.reference_every": 100, "loss.clip_low": 0.2, "loss.clip_high": 0.2, "loss.kl_beta": 0.001,
        "optimizer.learning_rate": 1e-6, "optimizer.warmup_steps": 20, "optimizer.b1": 0.9, "optimizer.b2": 0.99,
        "optimizer.max_grad_norm": 0.2, "packing.advantage_normalization": "std",
        "packing.masked_stop_reasons": ("token_limit", "context_limit"),
        "rollout.max_completion_tokens": 2048, "rollout.max_turns": 10, "rollout.temperature": 1.0,
        "environment.release": "v3", "environment.categories": ("base",), "environment.max_turns": 1, "environment.docs": "article",
        "environment.run_last_step": False, "environment.reward": "official", "training.steps": 1600,
    }  # fmt: skip
    assert {key: recipe[key] for key in expected} == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", VARIANTS)
def test_dry_run_with_a_tiny_model(name, model, tmp_path, capsys, monkeypatch):
    """On the warehouse in place of BFCL, which has to be fetched, and within the tiny model's context."""
    load = load_config

    def on_the_warehouse(path, overrides):
        return dataclasses.replace(load(path, overrides), environment=Warehouse())

    monkeypatch.setattr("jaxgrpo.train.load_config", on_the_warehouse)
    there = (f"model.source={model}", "model.revision=None", "training.devices=1", "training.gpus=None", "vllm.gpus=()")
    small = ("rollout.max_prompt_tokens=800", "rollout.max_completion_tokens=128")
    arguments = [part for override in (*there, *small) for part in ("--set", override)]
    assert main(["--config", f"configs/{name}.py", *arguments, "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "rollouts a batch        12 tasks x 8 samples = 96" in out
    assert f"the run                 1600 steps = {1600 if name == 'article/mu_1' else 800} batches" in out
    assert not (tmp_path / "run").exists()
