"""Planning a run: the step compiled from shapes alone is the one that runs, and what is said about it."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxgrpo.config.settings import ConfigError, LoraSettings, LossSettings
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.update import Update
from tests.training import CONFIG_JSON, Letters, write_config
from tests.updates import ADAM, GROUPS, NO_KL, UNTIED, packed, params_of, update_of
from tools.hlo import Collective, collectives
from tools.model_sizes import QWEN2_5
from tools.plan_memory import (
    Plan,
    Planner,
    describe,
    main,
    model_sizes,
    notes,
    parse,
    refusal,
    table,
)
from tools.planning import StateBytes, gradient_traffic, state_bytes
from tools.step_memory import ProgramMemory, StepMemory, describe_collectives, measure
from tools.targets import GIB, TARGETS, can_compile_for_gpus, simulated_devices

ROOT = Path(__file__).parents[2]
ARTICLE = str(ROOT / "configs" / "h200x4.py")
needs_wheels = pytest.mark.skipif(
    not can_compile_for_gpus(), reason="jax's CUDA wheels are not installed"
)


@functools.cache
def compiled_step() -> StepMemory:
    """Of the untied test model on three devices."""
    update, batch = update_of(3, UNTIED), packed(GROUPS, 12)[0]
    shape = (
        *batch.completions_NGC.shape[:2],
        batch.prompt_NP.shape[1],
        batch.completions_NGC.shape[2],
    )
    return measure(update.lower(*shape), state_bytes(UNTIED, 3, reference=True), gpu=False)


def bytes_of(tree: object) -> int:
    """What one device holds of the arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_the_compiled_step_is_given_what_a_real_one_is() -> None:
    update, (batch,) = update_of(3, UNTIED), packed(GROUPS, 12)
    state = update.init(params_of(UNTIED))
    counted, memory = state_bytes(UNTIED, 3, reference=True), compiled_step()
    assert bytes_of(state.params) == counted.parameters == counted.gradients
    assert (
        bytes_of(state.opt_state) - counted.optimizer == 2 * 4
    )  # the counters of AdamW and of its schedule
    assert bytes_of(state.reference) == 2 * counted.reference  # float32 here, bfloat16 on a GPU
    n, g, c = batch.completions_NGC.shape
    arrays = (
        4 * batch.prompt_NP.size + 4 * n + 4 * n * g
    )  # prompts, their lengths, advantages; completions' lengths are not read
    arrays += (
        (4 + 1 + 4 + 4) * n * g * c
    )  # completions, which are sampled, weights, the sampler's log-probabilities
    assert (
        memory.batch == arrays // 3 + 2 * 4 * n * g * c // 3 + 1
    )  # the old policy's and the reference's log-probabilities; whether on-policy
    assert memory.apply.arguments == bytes_of(state.params) * 2 + bytes_of(state.opt_state)


def test_the_compiled_step_of_adapters_is_given_what_a_real_one_is() -> None:
    lora = LoraSettings(rank=2)
    update = Update(
        UNTIED,
        make_mesh(jax.devices()[:3]),
        LossSettings(),
        ADAM,
        compute_dtype=jnp.bfloat16,
        head_chunk=16,
        lora=lora,
    )
    state, counted = (
        update.init(params_of(UNTIED)),
        state_bytes(UNTIED, 3, reference=True, lora=lora),
    )
    assert bytes_of(state.params) == counted.parameters == counted.gradients
    assert (bytes_of(state.frozen), bytes_of(state.reference)) == (
        counted.frozen,
        counted.reference,
    )
    memory = measure(update.lower(3, 3, 8, 8), counted, gpu=False)
    assert memory.batch == 4 * 8 + 4 + 4 * 3 + (4 + 1 + 4 + 4) * 24 + 2 * 4 * 24 + 1


def test_a_step_without_reference_has_no_reference_program() -> None:
    assert update_of(1, UNTIED, NO_KL).lower(1, 3, 8, 8).score is None
    assert compiled_step().score is not None


def gathered_elements(found: Sequence[Collective]) -> int:
    return sum(c.elements * (c.times or 0) for c in found if c.kind == "all-gather")


def test_layers_that_are_not_rematerialised_are_gathered_once() -> None:
    update = Update(
        UNTIED,
        make_mesh(jax.devices()[:3]),
        NO_KL,
        ADAM,
        compute_dtype=jnp.float32,
        head_chunk=16,
        remat="none",
    )
    gathered = gathered_elements(
        collectives(update.lower(3, 3, 8, 8).accumulate.compile().as_text())
    )
    expected = gradient_traffic(UNTIED, 3, remat="none").gathered // 2
    assert gathered in (
        expected,
        expected + 97 * 33,
    )  # without optimisation the head's table is gathered again


def test_the_compiled_step_moves_the_bytes_that_the_arithmetic_says() -> None:
    found, traffic = compiled_step().collectives, gradient_traffic(UNTIED, 3)
    gathered = gathered_elements(found)
    scattered = sum(3 * c.elements * (c.times or 0) for c in found if c.kind == "reduce-scatter")
    head = 97 * 33  # without optimisation the head's table is gathered for its backward pass again
    assert gathered in (traffic.gathered // 2, traffic.gathered // 2 + head)
    assert scattered == traffic.scattered // 4
    assert sum("in the layer loops, 2 times" in line for line in describe_collectives(found)) == 2


# What is said.


def planned(
    peak_gib: float, *arguments: str, state: StateBytes | None = None
) -> tuple[Planner, Plan]:
    """A plan of the article's run whose gradient program was found to need so much."""
    planner = Planner(parse(["--config", ARTICLE, *arguments]))
    planner.config = dataclasses.replace(
        planner.config, environment=Letters(train_size=100)
    )  # BFCL's tasks take seconds to read
    state = state or state_bytes(planner.model, 3, reference=True)
    program = ProgramMemory(0, 0, round(peak_gib * GIB), 0)
    memory = StepMemory(state, 0, program, program, program, ())
    return planner, planner.plan_of(memory, planner.devices, 12, 3)


def test_what_fits_is_not_refused_and_what_does_not_is_with_the_settings_that_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert refusal(*planned(131.0)) == []
    planner, plan = planned(140.0, "--set", "training.groups_per_device=2")
    monkeypatch.setattr(planner, "shortened", lambda divisor: planner)
    monkeypatch.setattr(planner, "main_plan", lambda: plan)  # nothing shorter fits either
    first, *helps = refusal(planner, plan)
    assert (
        first == "the step needs 140.00 GiB a device; an NVIDIA H200 has 131.00 usable. What helps:"
    )
    assert helps == [
        "- training.devices (or --devices) of 4 or more: the state's 42.56 GiB are split over them",
        "- loss.kl_beta=0: the reference's 4.73 GiB are not needed then",
        "- lora.rank above 0: the model is frozen in bfloat16 then, and only adapters have gradients and moments",
        "- training.groups_per_device below 2",
        "- rollout.max_completion_tokens below 2048, of which a group has 8",
        "- rollout.max_prompt_tokens below 6144",
        "- training.head_chunk below 1024",
    ]


def test_where_the_state_is_too_large_shorter_episodes_are_not_advised() -> None:
    helps = refusal(
        *planned(170.0, "--devices", "1", state=state_bytes(QWEN2_5["7B"], 1, reference=True))
    )[1:]
    assert len(helps) == 3
    assert helps[0].startswith(
        "- training.devices (or --devices) of 2 or more: the state's 127.67 GiB"
    )


def tiny_planner(folder: Path, *arguments: str) -> Planner:
    """Of two groups of four rows, 64 prompt and 64 completion tokens, of a model with a large vocabulary."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG_JSON | {"vocab_size": 8192}))
    sizes = (
        "--compiler",
        "cpu",
        "--devices",
        "1",
        "--prompt",
        "64",
        "--completion",
        "64",
        "--set",
        "training.groups_per_device=2",
    )
    return Planner(parse(["--config", str(write_config(folder, model)), *sizes, *arguments]))


def with_room_for(planner: Planner, size: int) -> Planner:
    planner.target = dataclasses.replace(planner.target, usable_bytes=size)
    return planner


ADVICE = {
    "- training.devices (or --devices) of 2 or more": (
        "--devices",
        "2",
        "--set",
        "training.groups_per_device=1",
    ),
    "- loss.kl_beta=0": ("--set", "loss.kl_beta=0", "--set", "training.reference_every=None"),
    "- lora.rank above 0": ("--set", "lora.rank=2"),
    "- training.groups_per_device below 2": ("--set", "training.groups_per_device=1"),
    "- rollout.max_completion_tokens below 64": ("--completion", "32"),
    "- rollout.max_prompt_tokens below 64": (
        "--prompt",
        "32",
        "--set",
        "batching.prompt_multiple=32",
    ),
    "- training.head_chunk below 64": ("--set", "training.head_chunk=16"),
}


def test_a_compiled_step_that_just_fits_is_not_refused_and_one_byte_less_is(tmp_path: Path) -> None:
    planner = tiny_planner(tmp_path)
    plan = planner.main_plan()
    assert refusal(with_room_for(planner, plan.memory.peak), plan) == []
    first, *helps = refusal(with_room_for(planner, plan.memory.peak - 1), plan)
    assert first.startswith("the step needs ")
    assert len(helps) == len(ADVICE) + 1
    assert all(said.startswith(advised) for said, advised in zip(helps, ADVICE, strict=False))
    assert "where episodes are shorter: 64 prompt and 32 completion tokens need" in helps[-1]


@pytest.mark.slow
@pytest.mark.parametrize("advised", ADVICE)
def test_what_is_advised_lowers_the_compiled_steps_peak(advised: str, tmp_path: Path) -> None:
    assert (
        tiny_planner(tmp_path, *ADVICE[advised]).main_plan().memory.peak
        < tiny_planner(tmp_path).main_plan().memory.peak
    )


@pytest.mark.slow
def test_that_shorter_episodes_fit_is_said(tmp_path: Path) -> None:
    planner = tiny_planner(tmp_path, "--prompt", "128", "--set", "batching.prompt_multiple=64")
    plan, shorter = planner.main_plan(), planner.shortened(2).main_plan()
    assert shorter.memory.peak < plan.memory.peak
    last = refusal(with_room_for(planner, (plan.memory.peak + shorter.memory.peak) // 2), plan)[-1]
    assert "where episodes are shorter: 64 prompt and 32 completion tokens need" in last


def test_a_share_of_memory_that_jax_does_not_take_by_itself_is_noted() -> None:
    assert list(notes(*planned(100.0))) == []
    assert "XLA_CLIENT_MEM_FRACTION" in "".join(notes(*planned(110.0)))


def test_the_options_change_what_is_said() -> None:
    lengths = ("--prompt", "4096", "--completion", "1000")
    text = "\n".join(describe(*planned(55.0, *lengths)))
    assert "4096 prompt tokens, 8 completions of 1024" in text
    seconds, gigabytes = (
        12 * 563.4e12 / (3 * 0.4 * 989e12),
        4 * 58.75 * 2 / 3,
    )  # 12 groups on 3 GPUs; two thirds of four micro-batches'
    assert (f"{seconds:.2f}", f"{gigabytes:.1f}") == ("5.70", "156.7")
    assert "computation         5.70 s at an MFU of 0.4" in text
    assert "communication       156.7 GB a device, 0.35 s" in text
    assert "rollouts            not counted" in text
    assert "100 tasks = 8 batches = 16 steps" in text
    assert "1600 steps = 800 batches = 76,800 rollouts" in text
    assert "cost" not in text
    more = (
        "--mfu",
        "0.5",
        "--link",
        "900",
        "--rollout-tokens-per-second",
        "3000",
        "--gpu-hour-price",
        "4",
    )
    text = "\n".join(describe(*planned(55.0, *lengths, *more)))
    assert "computation         4.56 s at an MFU of 0.5" in text
    assert "156.7 GB a device, 0.17 s" in text
    assert "rollouts            32.77 s at 3000 tokens a second" in text
    assert "cost                " in text and " at 4 a GPU-hour" in text


def test_the_table_is_markdown() -> None:
    _, plan = planned(55.6, "--prompt", "4096", "--completion", "1024")
    head, rule, row = table([plan])
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row == "| 4 (3 + 1) | 12 | 55.6 | 157 | 5.70 | 0.35 | 5.70 to 6.04 |"


def test_between_hosts_the_network_counts() -> None:
    _, plan = planned(55.0, "--network", "5")
    wide = dataclasses.replace(plan.cluster, devices=48, devices_per_host=6)
    traffic = plan.work.step_traffic(plan.model, 48)
    # four micro-batches: 6.5256e9 weights in layers, gathered twice in two bytes, 1.0900e9 beside them once, all scattered in four
    whole = 4 * (2 * (2 * 6.5256e9 + 1.0900e9) + 4 * 7.6156e9)
    assert traffic.total == pytest.approx(whole, rel=1e-4)
    assert wide.seconds(traffic) == pytest.approx(
        whole * 7 / 8 / (6 * 5e9), rel=1e-4
    )  # seven eighths come over a host's six adapters


def test_groups_that_do_not_divide_are_refused() -> None:
    planner = Planner(parse(["--config", ARTICLE, "--devices", "5"]))
    with pytest.raises(
        ConfigError, match=r"rollout.tasks_per_step \(12\) must be a multiple of the 5 groups"
    ):
        planner.main_plan()


def test_a_model_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", ARTICLE, "--set", "model.source=./nowhere"]) == 2
    assert "model.source './nowhere': no folder" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["devices", "prompt", "completion", "mfu", "link", "network"])
@pytest.mark.parametrize("number", ["0", "-3", "nan", "inf", "many"])
def test_a_number_that_is_none_is_refused(
    capsys: pytest.CaptureFixture[str], flag: str, number: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--config", ARTICLE, f"--{flag}={number}"])
    assert end.value.code == 2
    assert f"argument --{flag}: must be a" in capsys.readouterr().err


def test_more_devices_than_jax_was_started_with_are_refused() -> None:
    with pytest.raises(ValueError, match="4 CPU devices, 5 are needed"):
        simulated_devices(5)


# The command.


def run(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """The tool in a process of its own, on a folder that holds a model's config.json alone: exit status, lines, errors."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG_JSON))
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "tools.plan_memory",
        "--config",
        str(write_config(folder, model)),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_a_run_is_planned_without_weights(tmp_path: Path) -> None:
    status, lines, errors = run(tmp_path, "--devices", "2", "--compiler", "cpu", "--json")
    assert status == 0, errors
    figures = json.loads(lines[-1])
    assert figures["devices"] == 2
    assert figures["exact"] == "cpu"
    assert figures["exact_figures"] == [
        "parameters",
        "optimizer",
        "gradients",
        "reference",
        "frozen",
        "batch",
    ]
    assert figures["fits"] is True
    assert figures["peak_gib"] == round(
        max(v for k, v in figures["gib"].items() if k.startswith("peak_")), 3
    )
    # embedding, two layers, last norm: 8320 + 2 x (32 x 32 x 2 + 32 x 16 x 2 + 3 x 32 x 64 + 64 + 2 x 32) + 32
    assert figures["gib"]["parameters"] * GIB == 4 * 27_040 / 2
    assert figures["checkpoint_gb"] == (14 if figures["gib"]["reference"] else 12) * 27_040 / 1e9
    assert any(
        line.startswith("an epoch              6 tasks = 3 batches = 6 steps") for line in lines
    )


@needs_wheels
def test_a_gpus_program_is_compiled_without_one(tmp_path: Path) -> None:
    status, lines, errors = run(tmp_path, "--devices", "2", "--json")
    assert status == 0, errors
    figures = json.loads(lines[-1])
    assert (figures["exact"], figures["exact_figures"][-1], figures["target"]) == (
        "gpu",
        "peak",
        "NVIDIA H200",
    )
    assert figures["gib"]["parameters"] * GIB == 4 * 27_040 / 2
    assert any(
        "all-gather bf16, in the layer loops, 2 times" in line for line in figures["collectives"]
    )
    assert any(
        "reduce-scatter f32, in the layer loops, 2 times" in line for line in figures["collectives"]
    )


@needs_wheels
@pytest.mark.slow
def test_the_articles_run_fits_three_h200_and_not_one() -> None:
    base = [
        sys.executable,
        "-m",
        "tools.plan_memory",
        "--config",
        ARTICLE,
        "--prompt",
        "4096",
        "--completion",
        "1024",
        "--json",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    three = subprocess.run(base, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert three.returncode == 0, three.stderr
    figures = json.loads(three.stdout.splitlines()[-1])
    assert 50 < figures["peak_gib"] <= 60
    one = subprocess.run(
        [*base, "--devices", "1"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert one.returncode == 2
    assert "training.devices (or --devices) of 2 or more" in one.stderr


def test_without_wheels_the_gpus_compiler_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if can_compile_for_gpus():
        pytest.skip("jax's CUDA wheels are installed")
    assert main(["--config", ARTICLE, "--compiler", "gpu"]) == 2
    assert "pip install 'jax[cuda12]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "stacks", "stack_gib", "pin_gigabits"),
    [("h200", 6, 24, 6.25), ("h100", 5, 16, 5.234)],
)
def test_targets_are_what_their_parts_come_to(
    name: str, stacks: int, stack_gib: int, pin_gigabits: float
) -> None:
    """Memory chips of 1,024 pins each, of which a little is kept back; 132 multiprocessors with four tensor cores of 512 multiplications
    and additions a cycle at 1.83 GHz; 18 NVLinks of 25 GB/s; an adapter of 400 Gb/s."""
    target = TARGETS[name]
    assert 0.97 < target.memory_bytes / (stacks * stack_gib * GIB) < 1
    assert target.memory_bandwidth == pytest.approx(
        stacks * 1024 * pin_gigabits * 1e9 / 8, rel=1e-3
    )
    assert target.peak_flops == pytest.approx(132 * 4 * 512 * 2 * 1.83e9, rel=1e-3)
    assert (target.link, target.network, target.gpus_per_host) == (18 * 25e9, 400e9 / 8, 8)
    assert (
        4 * GIB < target.memory_bytes - target.usable_bytes < 10 * GIB
    )  # CUDA's, NCCL's and cuDNN's own


def test_targets_differ_in_memory() -> None:
    assert TARGETS["h100"].usable_bytes < TARGETS["h200"].usable_bytes
    one = state_bytes(QWEN2_5["7B"], 1, reference=True)
    assert (
        "an NVIDIA H100 80GB HBM3 has 74.00 usable"
        in refusal(*planned(130.0, "--target", "h100", state=one))[0]
    )
    assert refusal(*planned(130.0, "--target", "h200", state=one)) == []
    assert refusal(*planned(74.0, "--target", "h100", state=one)) == []


def test_float32_is_not_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", ARTICLE, "--set", "model.compute_dtype=float32"]) == 2
    assert "set it to auto or bfloat16" in capsys.readouterr().err


def test_a_hub_models_sizes_need_no_download() -> None:
    assert model_sizes(Planner(parse(["--config", ARTICLE])).config) == QWEN2_5["7B"]


def test_gpus_are_split_as_the_config_splits_them_and_hosts_filled_equally(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner, plan = planned(55.0)
    asked: list[tuple[int, int, int]] = []

    def record(devices: int, groups: int, per_host: int) -> Plan:
        asked.append((devices, groups, per_host))
        return plan

    monkeypatch.setattr(planner, "plan", record)
    for gpus in (4, 8, 64):
        assert planner.scaled(gpus).gpus == gpus
    planner.devices = 12
    planner.main_plan()
    assert asked == [(3, 12, 3), (6, 24, 6), (48, 192, 6), (12, 12, 6)]
