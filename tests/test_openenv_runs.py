"""Whole runs of training and evaluation in OpenEnv environments.

python -m pytest -m openenv tests/test_openenv_runs.py
"""

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo import evaluate
from jaxgrpo import train as train_module
from jaxgrpo.config.load import load_config
from jaxgrpo.envs.openenv import OpenEnv
from jaxgrpo.run import records
from jaxgrpo.run.skipping import AllGroupsDroppedError
from jaxgrpo.types import StopReason
from tests.training import EVERY_CHARACTER, make_model, metric_lines, small_config

pytestmark = pytest.mark.openenv
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def served() -> Iterator[str]:
    from tests import openenv_toys as toys

    with toys.serving(toys.application(toys.Letters, 16)) as (url, _):
        yield url


def letters(environment: str, **settings: Any) -> OpenEnv:
    """An episode is one token of text, as in tests/training.py."""
    return OpenEnv(
        environment,
        text_field="text",
        stop_strings=EVERY_CHARACTER,
        train_size=6,
        test_size=4,
        **settings,
    )


def trained(suite: Any, model: Path, folder: Path) -> list[dict[str, Any]]:
    """Train with evaluation before and after; return the lines of metrics."""
    config = dataclasses.replace(small_config(model), environment=suite)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, tasks_per_step=6, group_size=8),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2),
        training=dataclasses.replace(config.training, steps=16),
        evaluation=dataclasses.replace(config.evaluation, before=True, after=True),
    )
    train_module.train(config, folder)
    return metric_lines(folder)


COMPARED = ("train/reward_mean", "train/loss", "train/grad_norm", "train/dropped_groups")


def test_training_in_process_and_by_url_is_the_same(
    model: Path, served: str, tmp_path: Path
) -> None:
    local = trained(letters("tests.openenv_toys:Letters"), model, tmp_path / "local")
    remote = trained(letters(served, sessions=16), model, tmp_path / "remote")
    assert len(local) == len(remote) >= 6
    for here, there in zip(local, remote, strict=True):
        assert {k: here.get(k) for k in COMPARED} == {k: there.get(k) for k in COMPARED}
    steps = [line for line in local if "train/reward_mean" in line]
    assert all(line["train/dropped_groups"] == 0 for line in steps)
    rewards = [line["train/reward_mean"] for line in steps]
    print(rewards)
    assert rewards[-1] > rewards[0]
    saved = json.loads((tmp_path / "remote" / "config.json").read_text())
    assert saved["environment"]["environment"] == served
    again = load_config(tmp_path / "remote" / "config.json")
    assert again.environment == letters(served, sessions=16)


def test_a_server_that_is_lost_drops_groups_and_gives_no_reward(
    model: Path, tmp_path: Path
) -> None:
    from tests import openenv_toys as toys

    with toys.serving(toys.application(toys.Letters, 16)) as (url, end):
        suite = letters(url, sessions=16)
        config = dataclasses.replace(small_config(model), environment=suite)
        config = dataclasses.replace(
            config, training=dataclasses.replace(config.training, steps=400)
        )
        watcher = threading.Thread(target=end_after_steps, args=(tmp_path / "run", 2, end))
        watcher.start()
        with pytest.raises(AllGroupsDroppedError) as caught:
            train_module.train(config, tmp_path / "run")
        watcher.join()
    told = str(caught.value)
    assert told.startswith(
        "every group of the last 3 batches was dropped; the last error:\nOpenEnvError"
    )
    assert "Connection refused" in told or "was lost during" in told
    files = sorted((tmp_path / "run" / "trajectories").glob("*.jsonl.gz"))
    played = [one.trajectory for file in files for one in records.read_records(file).records]
    lost = [one for one in played if one.stop_reason is StopReason.ENVIRONMENT_ERROR]
    assert all(one.score is None for one in lost)
    assert len(played) > len(lost)


def end_after_steps(folder: Path, steps: int, end: Any) -> None:
    """End the server once so many steps are recorded."""
    file = folder / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < steps:
        threading.Event().wait(0.02)
    end()


def test_the_config_plays_the_episodes_of_the_demo(tmp_path: Path) -> None:
    """The demo's model on the demo's tasks, direct and through OpenEnv: the same tokens and
    rewards."""
    from jaxgrpo.tools.openenv_server import application
    from tests.openenv_toys import serving

    demo = load_config(ROOT / "configs" / "cpu_demo.py")
    with serving(application(demo.environment, 64, demo.rollout.max_turns)) as (url, _):
        for name, override in (
            ("cpu_demo", "seed=0"),
            ("openenv_demo", f"environment.environment={url}"),
        ):
            arguments = ["--config", str(ROOT / "configs" / f"{name}.py"), "--set", override]
            arguments += ["--split", "train", "--samples", "1", "--run-dir", str(tmp_path / name)]
            assert evaluate.main(arguments) == 0
    one, other = (
        records.read_records(next((tmp_path / name / "trajectories").iterdir())).records
        for name in ("cpu_demo", "openenv_demo")
    )
    assert len(one) == len(other) == 38
    for here, there in zip(one, other, strict=True):
        for name in ("task_id", "messages", "stop_reason"):
            assert getattr(here.trajectory, name) == getattr(there.trajectory, name)
        assert here.trajectory.prompt_ids_P.tolist() == there.trajectory.prompt_ids_P.tolist()
        ids = here.trajectory.completion_ids_C.tolist()
        assert ids == there.trajectory.completion_ids_C.tolist()
        assert here.trajectory.score.reward == there.trajectory.score.reward
        assert here.trajectory.score.passed == there.trajectory.score.passed
    assert 0 < sum(record.trajectory.score.passed for record in other) < 38
