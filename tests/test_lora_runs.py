"""Whole runs with LoRA: settings, evaluation, resuming, and the exported folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxgrpo import evaluate
from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import ConfigError
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import cast_to, forward, head_table, init_params
from jaxgrpo.storage.pretrained import load_params, save_hf
from jaxgrpo.train import main, train
from tests.training import CONFIG_JSON, changed, metric_lines, write_config

LORA = (
    "lora.rank=4",
    "lora.alpha=6",
    "optimizer.learning_rate=3e-2",
    "recording.checkpoint_every=2",
)
EVALUATED = ("evaluation.after=True", "evaluation.samples=4")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of six steps, exported both ways, and its last state."""
    folder = tmp_path_factory.mktemp("run")
    options = (*LORA, *EVALUATED, "recording.export_hf=True")
    state = train(changed(folder, model, *options), folder / "run")
    train(
        changed(folder, model, *options, "lora.export=adapter"), folder / "run", resume=True
    )  # nothing is left to do but that
    return folder / "run", state


def test_the_sampler_serves_the_merged_policy(run: Any) -> None:
    lines = [line for line in metric_lines(run[0]) if "train/loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert max(line["train/mismatch_max"] for line in lines) < 1e-5
    assert all(line["train/kl"] > 0 for line in lines[1:2])  # the reference is the base


def test_evaluating_a_checkpoint_gives_what_the_run_itself_measured(
    run: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(write_config(tmp_path, model)),
        "--checkpoint",
        str(run[0]),
        "--run-dir",
        str(tmp_path / "eval"),
    ]
    assert evaluate.main([*arguments, "--samples", "4"]) == 0, capsys.readouterr().err
    (line,) = metric_lines(tmp_path / "eval")
    own = next(line for line in metric_lines(run[0]) if "eval/split" in line)
    same = ("step", "eval/pass_rate", "eval/pass_rate/odd", "eval/reward_mean", "eval/pass_at_4")
    assert {key: line[key] for key in same} == {key: own[key] for key in same}


def test_a_run_that_stopped_goes_on_as_if_it_had_not(run: Any, model: Path, tmp_path: Path) -> None:
    folder, state = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    resumed = train(changed(tmp_path, model, *LORA, *EVALUATED), tmp_path / "run", resume=True)
    assert resumed.step == 6
    for ours, theirs in zip(
        jax.tree.leaves(resumed.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_going_on_with_another_base_is_refused(run: Any, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_hf(
        jax.tree.map(np.asarray, init_params(ModelConfig.from_hf(CONFIG_JSON), jax.random.key(1))),
        model,
        other,
    )
    folder = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "6")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["source"] = str(other)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="adapters were trained on another base model"):
        train(changed(tmp_path, other, *LORA, *EVALUATED), folder, resume=True)
    with pytest.raises(ConfigError, match=r"lora\.alpha was 6\.0 and is now 8\.0"):
        train(changed(tmp_path, model, *LORA, *EVALUATED, "lora.alpha=8"), run[0], resume=True)


def test_the_adapter_folder_read_by_hand_gives_the_merged_folder(run: Any, model: Path) -> None:
    folder = run[0]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (
        config["r"],
        config["lora_alpha"],
        config["peft_type"],
        config["base_model_name_or_path"],
    ) == (4, 6.0, "LORA", str(model))
    assert config["target_modules"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    base, merged = (
        load_file(model / "model.safetensors"),
        load_file(folder / "hf" / "model.safetensors"),
    )
    assert len(adapter) == 2 * 7 * 2 and base.keys() == merged.keys()
    for name, weight in base.items():
        a = adapter.pop(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight", None)
        if a is None:
            assert np.array_equal(merged[name].view(np.uint16), weight.view(np.uint16))
            continue
        b = adapter.pop(f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight")
        weight, a, b = (x.astype(np.float64) for x in (weight, a, b))
        expected = weight + 6 / 4 * b @ a
        assert np.max(np.abs(expected - weight)) > 0.01
        # In float32: four products and their sum, the scale, the sum with the weight. Where weight
        # and update nearly cancel, no other error is as large.
        float32 = 7 * 2**-24 * (np.abs(weight) + 6 / 4 * np.abs(b) @ np.abs(a))
        one_rounding = 2**-8 * (np.abs(expected) + float32)  # to bfloat16
        assert np.all(np.abs(merged[name].astype(np.float64) - expected) <= one_rounding + float32)
    assert adapter == {}


@pytest.mark.torch("peft")
def test_peft_computes_the_same_with_the_adapter(run: Any, model: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    ids_BT = np.random.default_rng(0).integers(0, 260, (2, 24))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(plain, run[0] / "adapter").eval()
    base = jax.tree.map(lambda x: x.astype(np.float32), load_params(model))
    state, sizes = run[1], ModelConfig.from_folder(model)

    def merged(tree, adapters):
        if "adapter" in adapters:
            a, b = (np.asarray(adapters["adapter"][x]).reshape(2, 4, -1) for x in ("a", "b"))
            return {**tree, "kernel": tree["kernel"] + 1.5 * np.einsum("lri,lro->lio", a, b)}
        return {
            key: merged(value, adapters[key]) if key in adapters else value
            for key, value in tree.items()
        }

    params = merged(base, state.params)
    ours = np.asarray(
        forward(sizes, params, jnp.asarray(ids_BT), load=cast_to(jnp.float32))
        @ head_table(params).T
    )
    with torch.no_grad():
        theirs = adapted(torch.tensor(ids_BT)).logits.numpy()
        with adapted.disable_adapter():
            unadapted = adapted(torch.tensor(ids_BT)).logits.numpy()
    difference, effect = (
        float(np.max(np.abs(ours - theirs))),
        float(np.max(np.abs(unadapted - theirs))),
    )
    print(f"logits differ by {difference:.2e} at most; the adapter changes them by {effect:.2e}")
    assert effect > 0.1 and difference < 1e-5


@pytest.mark.slow
def test_it_learns_what_is_rewarded(model: Path, tmp_path: Path) -> None:
    """The base's frozen head and layers can tell tokens apart.

    The small weights of a random model cannot.
    """
    base = load_params(model)
    base["embed"]["embedding"] = base["embed"]["embedding"] * 10
    for linear in (*base["layers"]["attention"].values(), *base["layers"]["mlp"].values()):
        linear["kernel"] = linear["kernel"] * 8
    save_hf(base, model, tmp_path / "base")
    options = (
        "training.steps=40",
        "training.reference_every=None",
        "rollout.group_size=16",
        "optimizer.learning_rate=2e-2",
        "seed=1",
    )
    train(changed(tmp_path, tmp_path / "base", *options, "lora.rank=8"), tmp_path / "run")
    rewards = [line["train/reward_mean"] for line in metric_lines(tmp_path / "run")]
    assert len(rewards) == 20
    assert np.mean(rewards[:2]) < 0.3
    assert np.mean(rewards[-5:]) > 0.7


def test_dry_run_says_how_much_is_trained(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(write_config(tmp_path, model)),
        "--dry-run",
        "--set",
        "lora.rank=2",
        "--set",
        "lora.targets=q,v",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "parameters                27,040 (2 layers of width 32)" in out
    assert (
        "trained parameters        448 (LoRA of rank 2 on q, v)" in out
    )  # 2 layers x 2 x ((32 + 32) + (32 + 16))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("lora.rank=-1",), "lora.rank must be at least 0"),
        (("lora.rank=4", "lora.alpha=0"), "lora.alpha must be above 0"),
        (("lora.targets=q,v",), "lora.targets has no effect when lora.rank is 0"),
        (("lora.alpha=8", "lora.export=adapter"), "lora.export has no effect when lora.rank is 0"),
        (("lora.rank=4", "lora.targets=q_proj"), "got 'q_proj'. Did you mean 'q'?"),
        (("lora.rank=4", "lora.targets=q,gaet"), "got 'gaet'. Did you mean 'gate'?"),
        (("lora.rank=4", "lora.targets=()"), "lora.targets is empty"),
        (("lora.rank=4", "lora.targets=q,q"), "names a layer twice"),
        (("lora.rank=4", "lora.export=adaptor"), "Did you mean 'adapter'?"),
        (("lora.rank=4", "lora.export=adapter"), "recording.export_hf is False"),
        (("lora.ranks=4",), "Did you mean 'lora.rank'?"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    model: Path, tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write_config(tmp_path, model), overrides)
    assert said in str(error.value)
