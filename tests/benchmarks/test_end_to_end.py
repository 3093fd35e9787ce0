"""The whole-batch benchmark: what it refuses to compare, and its halves at a tiny size. TRL's half
runs where the variable JAXGRPO_TRL_PYTHON names the interpreter of an environment with TRL, as
`python -m benchmarks.end_to_end --make-venv DIR` makes one."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.batch_work import Work, reward
from benchmarks.end_to_end import (
    SUITES,
    TINY,
    Worker,
    check_agreement,
    conversations,
    main,
    summed_up,
    take_turns,
)
from benchmarks.processor import busy_seconds, described, processor

SIZE = "--prompts 2 --samples 4 --tokens 24 --rounds 2 --warm 0"
TINY_WORK = ("--tasks", "warehouse", *SIZE.split())


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.end_to_end", *arguments], capture_output=True, text=True
    )


def work(samples: int = 4, *options: str) -> Work:
    prompts = conversations(SUITES["warehouse"], 2)
    return Work(
        str(TINY),
        prompts,
        samples,
        tokens=24,
        iterations=2,
        kl_beta=0.001,
        batches=4,
        options=options,
    )


def ours(tmp_path, name: str, of: Work) -> Worker:
    return Worker(name, sys.executable, "benchmarks.batch_ours", of, tmp_path / f"{name}.log")


def test_the_reward_is_the_same_with_special_tokens_and_without() -> None:
    assert reward("room 12, 3<|im_end|>") == reward("room 12, 3") == 0.03


def test_a_processor_and_its_work_read_from_linux(tmp_path) -> None:
    cpuinfo, stat = tmp_path / "cpuinfo", tmp_path / "stat"
    cpuinfo.write_text(
        "vendor_id\t: V\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: N 9\n\nvendor_id\t: other\n"
    )
    assert described(processor(cpuinfo)) == "N 9 (V, family 26, model 2)"
    ticks = os.sysconf("SC_CLK_TCK")
    of_core = lambda user, idle, steal: f"{user} 0 {ticks} {idle} 5 0 0 {steal} 9 9"
    stat.write_text(
        f"cpu  1 2 3\ncpu0 {of_core(ticks, 70, 0)}\n"
        f"cpu1 {of_core(3 * ticks, 50, 2 * ticks)}\ncpu10 {of_core(9 * ticks, 0, 0)}\n"
    )
    assert busy_seconds({0}, stat) == 2.0
    assert busy_seconds({0, 1}, stat) == 8.0


def test_a_batch_is_summed_up_by_hand() -> None:
    part = {"rollout": 1.0, "passes": 0.5, "others": 0.0, "trained_tokens": 16}
    found = summed_up(
        [
            part | {"seconds": s, "cpu": c, "compilations": n}
            for s, c, n in ((4.0, 6.0, 3), (3.0, 7.0, 3), (9.0, 8.0, 5))
        ]
    )
    assert (
        found["min"],
        found["median"],
        found["cpu"],
        found["update"],
        found["compilations_meanwhile"],
    ) == (3.0, 4.0, 6.0, 2.5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "1"), "--samples must be at least 2, got 1"),
        (("--model", "nowhere"), "nowhere has no config.json"),
        (("--python", "nowhere/python"), "nowhere/python is no file"),
        (("--python", "x", "--make-venv", "y"), "not allowed with"),
        (("--trl", "beta=0.1"), "--trl is for TRL"),
        (("--tasks", "warehouse", "--prompts", "65"), "--prompts is 65, --tasks warehouse has 64"),
    ],
)
def test_what_cannot_be_is_refused_with_one_line_and_status_2(
    arguments, message, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["end_to_end", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_worker_that_ends_tells_what_it_wrote_last(tmp_path) -> None:
    told = pytest.raises(
        SystemExit, match=r"(?s)^other ended with status 1:.*No module named .*gone"
    )
    with told:
        Worker("other", sys.executable, "benchmarks.gone", work(), tmp_path / "log")


def test_an_option_that_a_worker_refuses_ends_the_benchmark_with_status_2() -> None:
    done = benchmark(*TINY_WORK, "--set", "rollout.group_sise=3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the config cannot run:\n- unknown setting")


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    ["batching.advantage_normalization=none", "rollout.temperature=0.5", "loss.kl_beta=1.0"],
)
def test_sides_that_do_other_work_on_the_same_tokens_are_refused(tmp_path, option) -> None:
    refused = pytest.raises(SystemExit, match="other does not do the same as ours")
    with (
        ours(tmp_path, "ours", work()) as first,
        ours(tmp_path, "other", work(4, option)) as second,
        refused,
    ):
        check_agreement({"ours": first, "other": second})


@pytest.mark.slow
def test_sides_with_more_tokens_are_refused_and_equal_ones_agree(tmp_path) -> None:
    with (
        ours(tmp_path, "ours", work()) as first,
        ours(tmp_path, "other", work()) as second,
        ours(tmp_path, "third", work(3)) as third,
    ):
        agreed = check_agreement({"ours": first, "other": second})
        assert agreed["difference_other"] < 1e-6 and len(agreed["grad_norms"]) == 2
        with pytest.raises(SystemExit, match="do not have as many tokens"):
            take_turns({"ours": first, "third": third}, 1)


@pytest.mark.slow
def test_our_half() -> None:
    done = benchmark(*TINY_WORK, "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert set(measured["variants"]) == {"mu1", "mu2-kl"}
    for variant, steps in (("mu1", 1), ("mu2-kl", 2)):
        found = measured["variants"][variant]
        side = found["sides"]["ours"]
        assert side["trained_tokens"] == 2 * 4 * 24
        assert (
            len(found["agreed"]["grad_norms"]) == steps and min(found["agreed"]["grad_norms"]) > 0
        )
        assert len(side["batches"]) == 2 and 0 < side["rollout"] < side["median"]
        assert (side["passes"] > 1e-4) == (variant == "mu2-kl")


@pytest.mark.slow
@pytest.mark.skipif(
    "JAXGRPO_TRL_PYTHON" not in os.environ,
    reason="JAXGRPO_TRL_PYTHON names no interpreter with TRL",
)
def test_both_halves_train_the_same_tokens_with_the_same_gradient() -> None:
    done = benchmark(*TINY_WORK, "--json", "--python", os.environ["JAXGRPO_TRL_PYTHON"])
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    for found in measured["variants"].values():
        assert found["agreed"]["difference_trl"] < 1e-4
        assert (
            found["sides"]["trl"]["trained_tokens"]
            == found["sides"]["ours"]["trained_tokens"]
            == 2 * 4 * 24
        )
        assert found["ratio"]["median"] > 0
