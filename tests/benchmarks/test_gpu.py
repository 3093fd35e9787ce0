"""The program for a machine with one GPU: what a failing unit costs, what is counted, and all of it
at sizes for a CPU."""

import dataclasses
import functools
import itertools
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import attention, checks, demo, rollouts, rows, runner
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.models import TINY, fitted, named
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.runner import Settings, run_parts
from benchmarks.gpu.summary import summary, wrong
from jaxgrpo.models.attention import XLA, Kernel, attend

UNITS = ("works", "raises", "crashes", "hangs", "works again")


def units(*names: str, share: float = 1.0) -> Part:
    return Part(names[0], "tests.gpu_units", share, names)


def by_unit(out: Path, row: str) -> dict[str, list[rows.Row]]:
    found = sorted((r for r in rows.read(out) if r["row"] == row), key=lambda r: r["unit"])
    return {unit: list(group) for unit, group in itertools.groupby(found, key=lambda r: r["unit"])}


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """Five parts of a unit each. The one that hangs has a quarter of what is left, about 10 s."""
    out = tmp_path_factory.mktemp("gpu")
    shares = (1.0, 1.0, 1.0, 1.0, 3.0)
    parts = [units(name, share=share) for name, share in zip(UNITS, shares, strict=True)]
    reported: list[int] = []
    run_parts(parts, Settings(out), 45.0, lambda: reported.append(len(rows.read(out))))
    assert len(reported) == 5 and reported == sorted(reported)
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """All parts on a CPU, with time for a machine that has much else to do."""
    out = tmp_path_factory.mktemp("tiny") / "figures"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--minutes", "30"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert (out / "summary.md").read_text() in done.stdout
    return out


class TestRunner:
    def test_whatever_a_unit_does_its_figures_and_the_others_are_there(self, ran):
        figures = by_unit(ran, "figure")
        assert {unit: [r["value"] for r in found] for unit, found in figures.items()} == {
            "works": [1, "nan"],
            "raises": [1],
            "crashes": [1],
            "hangs": [1],
            "works again": [1, "nan"],
        }
        assert all(r["part"] == unit for unit, found in figures.items() for r in found)

    def test_how_each_ended_is_said(self, ran):
        ends = {unit: found[0] for unit, found in by_unit(ran, "unit").items()}
        assert {unit: end["status"] for unit, end in ends.items()} == {
            "works": "ended",
            "raises": "failed",
            "crashes": "failed",
            "hangs": "killed",
            "works again": "ended",
        }
        assert ends["raises"]["why"] == "MemoryError: there is no more"
        assert ends["crashes"]["why"].startswith("SIGABRT")
        assert 5 < ends["hangs"]["seconds"] < 20
        text = summary(rows.read(ran))
        assert "- hangs: killed: it was not through after" in text
        assert "- raises: failed: MemoryError: there is no more" in text
        assert [unit for unit in UNITS if wrong(ends[unit])] == ["raises", "crashes", "hangs"]

    def test_what_a_killed_unit_started_is_gone(self, ran):
        (child,) = by_unit(ran, "child")["hangs"]
        assert child["scratch"] and not Path(child["scratch"]).exists()
        state = Path(f"/proc/{child['pid']}/stat")
        deadline = time.monotonic() + 10
        while (
            state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        assert not state.exists() or state.read_text().split()[2] == "Z"


def test_without_time_every_unit_is_left_out_and_said_to_be(tmp_path):
    run_parts(
        [units("works"), units("works again", "raises")], Settings(tmp_path), 0.0, lambda: None
    )
    found = rows.read(tmp_path)
    assert [(r["unit"], r["status"], r["why"]) for r in found] == [
        (unit, "left out", "no time left") for unit in ("works", "works again", "raises")
    ]


def test_time_that_a_part_leaves_goes_to_the_later_ones(tmp_path, monkeypatch):
    given = []

    def run_unit(part, unit, settings, seconds):
        given.append((unit, round(seconds, 1)))
        return {"row": "unit", "status": "ended"}

    monkeypatch.setattr(runner, "run_unit", run_unit)
    run_parts(
        [units("a", "b", "c"), units("d", share=3.0)], Settings(tmp_path), 100.0, lambda: None
    )
    assert given == [("a", 16.7), ("b", 16.7), ("c", 25.0), ("d", 100.0)]


def test_no_unit_is_begun_without_its_floor(tmp_path, monkeypatch):
    begun = []

    def started(command, said):
        begun.append((command[5], float(command[9]) + runner.GRACE_SECONDS))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(runner, "_started", started)
    few, many = (dataclasses.replace(units(*n), floor=f) for n, f in (("ab", 30), ("cd", 90)))
    run_parts([few, many], Settings(tmp_path), 100.0, lambda: None)
    # of 100 s a and b have half, of which a has two thirds; of the rest c has its floor, not 67 s
    assert [unit for unit, _ in begun] == ["a", "b", "c", "d"]
    assert [seconds for _, seconds in begun] == pytest.approx([33, 50, 90, 100], abs=5)
    begun.clear()
    run_parts([many], Settings(tmp_path), 80.0, lambda: None)
    assert not begun
    run_parts([many], Settings(tmp_path, tiny=True), 80.0, lambda: None)
    assert [unit for unit, _ in begun] == ["c", "d"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--parts", "mfu,speed"], "--parts 'speed' is none of device, attention, peak"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--parts", "peak", "--units", "7B"], "--units '7B' is in none of the names 'products'"),
        (["--bfcl", "/nowhere"], "--bfcl /nowhere is no folder"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(arguments, why, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1
    assert not (tmp_path / rows.FIGURES).exists()


def test_figures_of_another_run_are_not_added_to(tmp_path, capsys):
    rows.add(tmp_path, {"part": "peak", "row": "product"})
    assert main(["--out", str(tmp_path)]) == 2
    assert "holds the figures of another run" in capsys.readouterr().err
    assert len(rows.read(tmp_path)) == 1


def test_a_line_that_was_cut_short_costs_itself(tmp_path):
    rows.add(tmp_path, {"row": "a", "value": [1.5, float("inf")]})
    with (tmp_path / rows.FIGURES).open("a") as file:
        file.write('{"row": "b", "val\n')
    rows.add(tmp_path, {"row": "c"})
    assert rows.read(tmp_path) == [{"row": "a", "value": [1.5, "inf"]}, {"row": "c"}]


def test_as_many_layers_as_leave_room_for_activations():
    # 131 GiB x .6 / 16 bytes = 5.27e9 parameters, less 1.09e9 in the tables, over 233e6 a layer
    assert fitted(named("7B"), 131 * 2**30).layers == 17
    assert fitted(named("7B"), 74 * 2**30).layers == 8
    assert fitted(named("7B"), 2**30).layers == 1
    assert fitted(named("0.5B"), 131 * 2**30).layers == 24  # all


class TestRollouts:
    def test_the_default_lengths(self):
        lengths = rollouts.Lengths().draw()
        assert lengths[0] == [698, 395, 432, 86, 2048, 1499, 463, 1115]
        assert [max(group) for group in lengths] == [2048, 1312, 1177, 2048]

    def test_they_are_packed_as_they_are_and_padding_is_counted_apart(self):
        work = rollouts.packed(1000, rollouts.Lengths(), 50)
        drawn = sorted(map(tuple, rollouts.Lengths().draw()))
        assert sorted(shape.completions for shape in work.real) == drawn
        assert {shape.prompt for shape in work.real} == {1000}
        assert [(s.prompt, len(s.completions), set(s.completions)) for s in work.padded] == [
            (1024, 8, {c}) for c in (1536, 1536, 2048, 2048)
        ]
        for batch, real in zip(work.batches, work.real, strict=True):
            assert batch.action_mask_NGC.sum() == real.trained_tokens
            assert batch.loss_weights_NGC.astype(bool).sum() == real.trained_tokens
        tokens = 4 * 1000 + sum(map(sum, drawn))
        assert work.row["real_tokens"] == tokens
        assert work.row["padded_tokens"] == 4 * 1024 + 8 * 2 * (1536 + 2048)
        assert {max(shape.completions) for shape in work.shapes} == {1536, 2048}


def distances(kernel: Kernel, case: attention.Case) -> rows.Row:
    """From the definition in float32."""
    heads = attention.HEADS["tiny heads"]
    arrays, lengths, cotangent = attention.inputs(heads, case, jnp.bfloat16)
    exact = attention.exactly(arrays, lengths, cotangent)
    got = attention.gradients(functools.partial(attend, kernel), arrays, lengths, cotangent)
    return attention.compared({"with": "float32"}, got, exact)


class TestAgreement:
    CASE = attention.TINY_CASES[0]

    def test_a_kernel_agrees_with_the_definition(self):
        row = distances(XLA, self.CASE)
        assert row["agrees"] and 0 < row["worst"] < 0.005
        assert set(row["differences"]) == {"output", "dq", "dk", "dv", "d_context_k", "d_context_v"}

    def test_one_key_too_many_is_seen(self):
        more = lambda lengths: None if lengths is None else lengths + 1
        shifted = Kernel(
            "one key too many",
            lambda q, k, v, lengths: XLA.forward(q, k, v, more(lengths)),
            lambda q, k, v, lengths, *rest: XLA.backward(q, k, v, more(lengths), *rest),
        )
        row = distances(shifted, self.CASE)
        assert not row["agrees"]
        assert row["differences"]["d_context_v"] == np.inf  # the empty context has a gradient

    def test_a_gradient_that_is_wrong_alone_is_seen(self):
        halved = Kernel(
            "half of dv", XLA.forward, lambda *a: (*XLA.backward(*a)[:2], XLA.backward(*a)[2] / 2)
        )
        row = distances(halved, self.CASE)
        assert [name for name, apart in row["differences"].items() if not apart < 0.01] == [
            "dv",
            "d_context_v",
        ]
        assert not row["agrees"]

    def test_what_is_not_a_number_does_not_agree(self):
        exact = (jnp.ones((2, 3)), jnp.ones((2, 3)))
        row = attention.compared({}, (exact[0], exact[1].at[1, 2].set(jnp.nan)), exact)
        assert not row["agrees"] and np.isnan(row["worst"])


def test_tests_are_counted_as_far_as_they_came():
    said = (
        "tests/test_a.py::test_b PASSED           [ 20%]\n"
        "tests/test_a.py::TestC::test_d[a b] FAILED [ 40%]\n"
        "tests/test_a.py::test_e SKIPPED (no torch) [ 60%]\n"
        "tests/test_a.py::test_f ERROR [ 80%]\n"
        "tests/test_a.py::test_g "
    )
    failed = ["TestC::test_d[a b]", "test_f"]
    assert checks.counts(said) == {"passed": 1, "skipped": 1, "failed": failed}


class TestDemo:
    def test_without_the_package_it_is_the_procedural_environment(self, monkeypatch, tmp_path):
        monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path))
        monkeypatch.setenv("PIP_NO_INDEX", "")
        config, settings, why = demo.chosen(None)
        assert (config, settings) == ("configs/procedural.py", ())
        assert why.startswith("BFCL's package is not here: pip could not fetch bfcl-eval")

    def test_a_given_folder_is_used(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PIP_NO_INDEX", "")
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "BFCL_v3_multi_turn_base.json").write_text("")
        config, settings, _ = demo.chosen(str(tmp_path))
        assert (config, settings) == ("configs/cpu_demo.py", (f"environment.folder={tmp_path}",))


def flops_by_hand(prompt: int, completions: list[int]) -> float:
    """Forward and backward of a group of TINY: pairs counted one by one, a multiplication and an
    addition each."""
    m = TINY
    matrices = (
        m.hidden_size * m.head_dim * (2 * m.heads + 2 * m.kv_heads)
        + 3 * m.hidden_size * m.intermediate_size
    )
    context = prompt - 1  # the prompt's last token begins each row
    pairs = sum(query + 1 for query in range(context))
    pairs += sum(context + own + 1 for c in completions for own in range(c))
    layers = m.layers * (
        2 * matrices * (context + sum(completions)) + 4 * m.heads * m.head_dim * pairs
    )
    return 3 * (layers + 2 * m.hidden_size * m.vocab_size * sum(completions))


@pytest.mark.slow
class TestTiny:
    def test_every_part_ends_in_order_and_has_figures(self, tiny):
        found = rows.read(tiny)
        assert list(dict.fromkeys(r["part"] for r in found)) == [part.name for part in PARTS]
        assert {r["status"] for r in found if r["row"] == "unit"} == {"ended"}
        figures = {(r["part"], r["row"]) for r in found} - {(part.name, "unit") for part in PARTS}
        torch_row = ("torch", "step" if find_spec("torch") else "left out")
        assert figures == {
            torch_row,
            ("device", "versions"), ("device", "host"), ("device", "device"),
            ("attention", "left out"), ("attention", "agreement"), ("attention", "speed"),
            ("peak", "product"),
            ("sampler", "prefill"), ("sampler", "decode"),
            ("demo", "config"), ("demo", "evaluation"), ("demo", "training"), ("demo", "run"),
            ("mfu", "left out"), ("mfu", "update"), ("mfu", "pass"),
            ("model", "agreement"),
            ("publishing", "publish"),
            ("tests", "tests"),
        }  # fmt: skip
        assert {r["why"] for r in found if r["row"] == "left out" and r["part"] != "torch"} == {
            "it needs an NVIDIA GPU, and jax computes on cpu",
            "no CUDA wheels of jax, or a device that tools/targets.py does not know",
        }

    def test_figures_are_finite_and_positive(self, tiny):
        names = (
            "seconds",
            "tflops",
            "mfu",
            "tokens_per_second",
            "step_ms",
            "write_seconds",
            "read_seconds",
        )
        figures = [r[name] for r in rows.read(tiny) for name in names if name in r]
        assert len(figures) > 40
        assert all(isinstance(x, float) and 0 < x < 1e6 for x in figures)
        assert jax.__version__ == rows.read(tiny)[0]["packages"]["jax"]

    def test_kernels_agree(self, tiny):
        found = [r for r in rows.read(tiny) if r["row"] == "agreement"]
        assert len(found) == len(attention.TINY_CASES) + 1
        assert all(r["agrees"] and r["worst"] < 0.02 for r in found)

    def test_mfu_counts_real_tokens_over_the_measured_peak(self, tiny):
        found = rows.read(tiny)
        peak = max(r["tflops"] for r in found if r["row"] == "product")
        updates = {(r["remat"], r["prompt"]): r for r in found if r["row"] == "update"}
        assert set(updates) == {("attention", 64), ("attention", 300), ("none", 300)}
        for (_, prompt), row in updates.items():
            counted = sum(flops_by_hand(prompt, group) for group in rollouts.TINY.draw())
            assert row["mfu"] * peak * 1e12 * row["seconds"] == pytest.approx(counted)
            assert row["real_fraction"] < 0.8 and row["mfu"] < row["mfu_padded"] < row["hardware"]
            assert row["predicted_gib"] > 0 and row["peak_gib"] is None  # a CPU has no such figure
        padded = sum(flops_by_hand(512, [c] * 4) for c in (64, 64, 64))
        assert updates["none", 300]["mfu_padded"] * peak * 1e12 * updates["none", 300][
            "seconds"
        ] == pytest.approx(padded)

    def test_the_sampler_played_all_rows(self, tiny):
        found = [r for r in rows.read(tiny) if r["part"] == "sampler" and r["row"] != "unit"]
        assert [(r["row"], r["prompt"], r.get("rows")) for r in found] == [
            ("decode", 96, 1), ("prefill", 96, None), ("prefill", 192, None), ("decode", 96, 4),
        ]  # fmt: skip
        assert found[3]["tokens_per_second"] == pytest.approx(4 * 1e3 / found[3]["step_ms"])

    def test_the_demo_trained_and_the_tests_passed(self, tiny):
        found = rows.read(tiny)
        (training,) = [r for r in found if r["row"] == "training"]
        (run,) = [r for r in found if r["row"] == "run"]
        assert (training["step"], run["whole"]) == (2, True)
        (evaluated,) = [r for r in found if r["row"] == "evaluation"]
        assert (evaluated["step"], evaluated["split"]) == (0, "train") and 0 <= evaluated[
            "pass_rate"
        ] <= 1
        (tests,) = [r for r in found if r["row"] == "tests"]
        assert (tests["passed"], tests["failed"], tests["whole"]) == (3, [], True)
