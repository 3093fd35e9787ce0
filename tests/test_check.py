"""The check of an environment: what it says about broken ones, and that sound ones pass."""

import json
import re
import shutil
from pathlib import Path

import pytest

from jaxgrpo.check import main
from jaxgrpo.config.load import load_config, to_json
from tests.broken_environments import BROKEN, SETTINGS
from tests.check_environments import (
    SOUND,
    check,
    joined,
    line_of,
    model_files,
    run,
    with_environment,
)


def test_a_sound_environment_passes(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, SOUND)
    assert (status, err) == (0, "")
    assert "train    6 of 6 tasks open" in out and "test     6 of 6 tasks open" in out
    assert "demonstration" in out and "0 errors, 0 warnings" in out
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out


def documented() -> dict[str, tuple[str, re.Pattern[str]]]:
    """Return the rows of the table in docs/check.md: level and finding by environment."""
    page = (Path(__file__).parents[1] / "docs" / "check.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (error|warning) \| `(.*)` \|$", page, re.M)
    patterns = (re.compile(".*".join(map(re.escape, told.split("...")))) for _, _, told in rows)
    return {kind: (level, told) for (kind, level, _), told in zip(rows, patterns)}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_what_is_broken_is_told(tmp_path: Path, kind: str) -> None:
    source, level, told, advice = BROKEN[kind]
    told = re.sub(r"line \{(.*?)\}", lambda found: f"line {line_of(source, found[1])}", told)
    report = check(tmp_path, source, *SETTINGS.get(kind, ()))
    told = told.replace("mine.py", str(tmp_path / "mine.py"))
    fitting = [one for one in report.findings if told in one.told]
    assert fitting, report.findings
    assert fitting[0].level == level and advice in fitting[0].advice
    assert report.errors >= (level == "error")
    if kind in (rows := documented()):
        documented_level, pattern = rows[kind]
        matching = [one.level for one in report.findings if pattern.fullmatch(one.told)]
        assert matching == [documented_level]


def test_the_documented_environments_are_among_them() -> None:
    assert len(documented()) > 12 and documented().keys() <= BROKEN.keys()


def test_the_users_own_error_comes_first_then_the_call_then_a_short_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # wide enough for the path of the file
    source = with_environment(
        "def step(self, action):\n    return self.look(action)\n\n"
        "def look(self, action):\n    return {}[action]"
    )
    status, out, _ = run(tmp_path, source)
    first, second = line_of(source, "self.look(action)"), line_of(source, "{}[action]")
    assert status == 1
    assert joined(out[out.index("error  ") :]).startswith(
        f"error KeyError: '<say>1</say>' (mine.py, line {second}, in look) "
        "step() of task 'train_0', script 'demonstration', turn 1: '<say>1</say>' "
        "also in 11 more tasks, such as 'train_1' Traceback (most recent call last): "
        f'File "mine.py", line {first}, in step return self.look(action) ^^^^^^^^^^^^^^^^^ '
        f'File "mine.py", line {second}, in look return {{}}[action] ~~^^^^^^^^ '
        "KeyError: '<say>1</say>' try: answer a mistake"
    )
    assert out.endswith("\n1 error, 0 warnings\n")


def test_a_fault_in_what_a_step_gave_is_not_laid_to_the_close_after_it(tmp_path: Path) -> None:
    source = with_environment(
        "def step(self, action):\n    return StepResult(ask('x', tools=(tool(),)))\n\n"
        "def close(self):\n    pass"
    )
    (found,) = check(tmp_path, source).findings
    assert found.during.startswith("step() of task 'train_0', script 'demonstration', turn 1: ")


def test_each_call_is_timed_and_the_slowest_task_named(tmp_path: Path) -> None:
    source = with_environment(
        "def score(self):\n    time.sleep(0.05 if self.numbers == (3, 4) else 0)\n    return "
        "super().score()"
    )
    calls = check(tmp_path, source).calls
    (scores,) = [row for row in calls if row.method == "score"]
    # four tasks, four scripts, and two episodes at the same time
    assert (scores.count, scores.task[-2:]) == (24, "_3")
    assert 0.05 <= scores.slowest < 1 and scores.median < 0.05


def test_a_task_is_shown_as_the_model_sees_it(tmp_path: Path) -> None:
    source = with_environment("def observe(self):\n    return ask('Add\\x1b[2J', tools=(tool(),))")
    _, out, _ = run(tmp_path, source)
    assert (
        "51 tokens: 1 tools 10, user 7, the rest is the template's\ntools: add\na turn ends at: "
        "'</say>'\n"
        "| <|im_start|>system\n| Help.\n| Tool: add<|im_end|>\n| <|im_start|>user\n| "
        "Add\\x1b[2J<|im_end|>\n"
        "| <|im_start|>assistant\n> <say>1</say>\n"
    ) in out  # fmt: skip


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tasks", "0"), "--tasks must be at least 1, got 0"),
        (("--policy", "-2"), "--policy must be at least 1, got -2"),
        (("--play", "--policy"), "--play and --policy cannot be combined: give one of them"),
        (("--policy", "--json"), "--policy and --json cannot be combined: give one of them"),
        (("--play", "train_11"), '--play: there is no task "train_11" among the 12 tasks of the '),
        (("--set", "rollout.max_turn=3"), "Did you mean 'rollout.max_turns'?"),
        (("--set", "model.source=/no/such"), "no folder /no/such"),
        (("--set", "rollout.max_completion_tokens=2000"), "exceeds the 1024 tokens of context"),
    ],
)
def test_bad_input_ends_with_two_and_one_message(
    tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    status, out, err = run(tmp_path, SOUND, *options)
    assert (status, out) == (2, "") and err.startswith("error: ") and told in err
    assert err.count("\n") <= 2


def test_too_few_tasks_are_a_finding(tmp_path: Path) -> None:
    found = check(tmp_path, SOUND, "rollout.tasks_per_step=64").findings
    assert found[0].level == "error"
    assert found[0].told == "rollout.tasks_per_step is 64, but the train split holds 6 tasks"


def test_json_has_what_is_printed(tmp_path: Path) -> None:
    for kind, errors, warnings in (("raises in step", 1, 0), ("rewards mistakes more", 0, 1)):
        status, out, err = run(tmp_path, BROKEN[kind][0], "--json", "--tasks", "1")
        report = json.loads(out)
        assert (status, err) == (errors, "")
        assert (report["errors"], report["warnings"]) == (errors, warnings)
        assert BROKEN[kind][3] in report["findings"][0]["advice"]
        assert report["tried"] == 2 and report["splits"][0]["tasks"] == 6


def test_the_config_json_of_a_run_is_accepted(tmp_path: Path) -> None:
    config = load_config(written(tmp_path), (f"model.source={model_files().name}",))
    (tmp_path / "config.json").write_text(to_json(config, places=True))
    status, out, _ = run(tmp_path, SOUND, "--config", str(tmp_path / "config.json"))
    assert status == 0 and out.endswith("\n0 errors, 0 warnings\n")


def written(folder: Path) -> Path:
    (folder / "mine.py").write_text(SOUND)
    return folder / "mine.py"


def test_the_readmes_example_passes(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    code += """

from jaxgrpo import DemonstratedSuite, Generated
from tests.check_environments import config


def get_config():
    splits = {
        "train": Generated(wishes, {"held_out": False}),
        "test": Generated(wishes, {"held_out": True}),
    }
    return config(DemonstratedSuite(Workshop, splits, protocol="tags", solution=solution))
"""
    settings = ("rollout.max_prompt_tokens=800", "rollout.max_completion_tokens=224")
    status, out, err = run(tmp_path, code, "--set", settings[0], "--set", settings[1])
    assert (status, err) == (0, "") and "train    52 of 52 tasks open" in out
    assert out.endswith("\n0 errors, 0 warnings\n")


@pytest.mark.parametrize("name", ["procedural", "cpu_demo", "sql"])
def test_the_shipped_environments_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", f"configs/{name}.py", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    demonstrated = report["scripts"][0]
    assert demonstrated["script"] == "demonstration" and demonstrated["rewards"] == [1.0, 1.0]
    assert report["tried"] == demonstrated["episodes"] == 16
    too_long = demonstrated["ends"].get("token_limit", 0)
    assert [len(one["tasks"]) for one in report["findings"]] == ([too_long] if too_long else [])
    assert (too_long > 0) == (name == "sql")  # three of its longest queries


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["tags", "native"])
@pytest.mark.parametrize("release", ["v3", "v4"])
def test_bfcl_passes_in_all_its_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str, release: str
) -> None:
    """The demonstrations of tasks of all categories pass, with every user turn."""
    model = tmp_path / "model"
    shutil.copytree("assets/tiny-qwen2.5", model)
    sizes = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 65536}))
    environment = {
        "protocol": protocol,
        "release": release,
        "max_turns": 9,
        "docs": "signatures",
        "classes": (),
        "max_calls": 0,
        "categories": ("base", "miss_func", "miss_param", "long_context"),
    }
    settings = {f"environment.{name}": value for name, value in environment.items()}
    settings |= {"rollout.max_prompt_tokens": 24000, "rollout.max_completion_tokens": 40000}
    settings |= {"rollout.max_turns": 100, "model.source": str(model)}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    status = main(["--config", "configs/cpu_demo.py", *sets, "--json", "--tasks", "12"])
    report = json.loads(capsys.readouterr().out)
    assert [one for one in report["findings"] if one["level"] == "error"] == []
    assert status == 0 and report["scripts"][0]["rewards"] == [1.0, 1.0]
