"""Plans: the sizes of models and clusters, the report, and the advice if a step does not fit."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.tools.model_sizes import QWEN2_5
from jaxgrpo.tools.plan_memory import parse
from jaxgrpo.tools.plan_report import describe, notes, refusal, table
from jaxgrpo.tools.planning import StateBytes, state_bytes
from jaxgrpo.tools.plans import Plan, Planner, model_sizes
from jaxgrpo.tools.step_memory import ProgramMemory, StepMemory
from jaxgrpo.tools.targets import GIB, TARGETS
from tests.training import CONFIG_JSON, Letters, write_config

ROOT = Path(__file__).parents[2]
ARTICLE = str(ROOT / "configs" / "h200x4.py")


def planned(
    peak_gib: float, *arguments: str, state: StateBytes | None = None
) -> tuple[Planner, Plan]:
    """Return a plan of the article's run, as if its gradient program needed this much memory."""
    planner = Planner(parse(["--config", ARTICLE, *arguments]))
    # BFCL's tasks take seconds to read
    planner.config = dataclasses.replace(planner.config, environment=Letters(train_size=100))
    state = state or state_bytes(planner.model, 3, reference=True)
    program = ProgramMemory(0, 0, round(peak_gib * GIB), 0)
    memory = StepMemory(state, 0, program, program, program, ())
    return planner, planner.plan_of(memory, planner.devices, 12, 3)


def test_a_step_that_does_not_fit_is_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert refusal(*planned(131.0)) == []
    planner, plan = planned(140.0, "--set", "training.groups_per_device=2")
    monkeypatch.setattr(planner, "shortened", lambda divisor: planner)
    monkeypatch.setattr(planner, "main_plan", lambda: plan)  # shorter episodes do not fit either
    first, *helps = refusal(planner, plan)
    assert (
        first
        == "the step needs 140.00 GiB per device, but an NVIDIA H200 has 131.00 usable. What helps:"
    )
    assert helps == [
        "- training.devices (or --devices) of at least 4: "
        "the state's 42.56 GiB are split over them",
        "- loss.kl_beta=0: saves the reference policy's 4.73 GiB",
        "- lora.rank above 0: freezes the model in bfloat16, and only adapters have gradients "
        "and moments",
        "- training.groups_per_device below 2",
        "- rollout.max_completion_tokens below 2048: each group has 8 completions",
        "- rollout.max_prompt_tokens below 6144",
        "- training.head_chunk below 1024",
    ]


def test_shorter_episodes_are_not_advised_if_the_state_is_too_large() -> None:
    helps = refusal(
        *planned(170.0, "--devices", "1", state=state_bytes(QWEN2_5["7B"], 1, reference=True))
    )[1:]
    assert len(helps) == 3
    assert helps[0].startswith(
        "- training.devices (or --devices) of at least 2: the state's 127.67 GiB"
    )


def tiny_planner(folder: Path, *arguments: str) -> Planner:
    """Return a planner for two groups of four rows, with 64 prompt and 64 completion tokens, and a
    model with a large vocabulary."""
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
    "- training.devices (or --devices) of at least 2": (
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


@pytest.mark.slow
def test_a_compiled_step_that_just_fits_is_not_refused_and_one_byte_less_is(tmp_path: Path) -> None:
    planner = tiny_planner(tmp_path)
    plan = planner.main_plan()
    assert refusal(with_room_for(planner, plan.memory.peak), plan) == []
    first, *helps = refusal(with_room_for(planner, plan.memory.peak - 1), plan)
    assert first.startswith("the step needs ")
    assert len(helps) == len(ADVICE) + 1
    assert all(said.startswith(advised) for said, advised in zip(helps, ADVICE, strict=False))
    assert "if episodes are shorter: 64 prompt and 32 completion tokens need" in helps[-1]


@pytest.mark.slow
@pytest.mark.parametrize("advised", ADVICE)
def test_the_advice_lowers_the_peak_of_the_compiled_step(advised: str, tmp_path: Path) -> None:
    assert (
        tiny_planner(tmp_path, *ADVICE[advised]).main_plan().memory.peak
        < tiny_planner(tmp_path).main_plan().memory.peak
    )


@pytest.mark.slow
def test_it_is_reported_if_shorter_episodes_fit(tmp_path: Path) -> None:
    planner = tiny_planner(tmp_path, "--prompt", "128", "--set", "batching.prompt_multiple=64")
    plan, shorter = planner.main_plan(), planner.shortened(2).main_plan()
    assert shorter.memory.peak < plan.memory.peak
    last = refusal(with_room_for(planner, (plan.memory.peak + shorter.memory.peak) // 2), plan)[-1]
    assert "if episodes are shorter: 64 prompt and 32 completion tokens need" in last


def test_a_note_about_memory_that_jax_does_not_take_by_default() -> None:
    assert list(notes(*planned(100.0))) == []
    assert "XLA_CLIENT_MEM_FRACTION" in "".join(notes(*planned(110.0)))


def test_the_options_change_the_report() -> None:
    lengths = ("--prompt", "4096", "--completion", "1000")
    text = "\n".join(describe(*planned(55.0, *lengths)))
    assert "4096 prompt tokens, 8 completions of 1024" in text
    seconds = 12 * 563.4e12 / (3 * 0.4 * 989e12)  # 12 groups on 3 GPUs
    gigabytes = 4 * 58.75 * 2 / 3  # two thirds of the bytes of four micro-batches
    assert (f"{seconds:.2f}", f"{gigabytes:.1f}") == ("5.70", "156.7")
    assert "computation         5.70 s at an MFU of 0.4" in text
    assert "communication       156.7 GB per device, 0.35 s" in text
    assert "rollouts            not counted" in text
    assert "100 tasks = 8 batches = 16 steps" in text
    assert "1600 steps = 800 batches = 76,800 episodes" in text
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
    assert "156.7 GB per device, 0.17 s" in text
    assert "rollouts            32.77 s at 3000 tokens per second" in text
    assert "cost                " in text and " at 4 per GPU-hour" in text


def test_the_table_is_markdown() -> None:
    _, plan = planned(55.6, "--prompt", "4096", "--completion", "1024")
    head, rule, row = table([plan])
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row == "| 4 (3 + 1) | 12 | 55.6 | 157 | 5.70 | 0.35 | 5.70 to 6.04 |"


def test_between_hosts_the_network_counts() -> None:
    _, plan = planned(55.0, "--network", "5")
    wide = dataclasses.replace(plan.cluster, devices=48, devices_per_host=6)
    traffic = plan.work.step_traffic(plan.model, 48)
    # four micro-batches; 6.5256e9 weights in layers are gathered twice in two bytes, 1.0900e9
    # others once, and all are scattered in four bytes
    whole = 4 * (2 * (2 * 6.5256e9 + 1.0900e9) + 4 * 7.6156e9)
    assert traffic.total == pytest.approx(whole, rel=1e-4)
    # seven eighths pass through the six adapters of a host
    assert wide.seconds(traffic) == pytest.approx(whole * 7 / 8 / (6 * 5e9), rel=1e-4)


def test_groups_that_do_not_divide_are_refused() -> None:
    planner = Planner(parse(["--config", ARTICLE, "--devices", "5"]))
    with pytest.raises(
        ConfigError, match=r"rollout.tasks_per_step \(12\) must be a multiple of the 5 groups"
    ):
        planner.main_plan()


def test_targets_differ_in_memory() -> None:
    assert TARGETS["h100"].usable_bytes < TARGETS["h200"].usable_bytes
    one = state_bytes(QWEN2_5["7B"], 1, reference=True)
    assert (
        "but an NVIDIA H100 80GB HBM3 has 74.00 usable"
        in refusal(*planned(130.0, "--target", "h100", state=one))[0]
    )
    assert refusal(*planned(130.0, "--target", "h200", state=one)) == []
    assert refusal(*planned(74.0, "--target", "h100", state=one)) == []


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
