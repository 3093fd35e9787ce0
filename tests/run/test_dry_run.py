"""A dry run plays scripted episodes, too."""

from pathlib import Path

import pytest

from jaxgrpo.train import main
from tests.broken_environments import BROKEN
from tests.check_environments import SOUND, joined, run

Result = tuple[int, str, str]


def dry_run(folder: Path, source: str) -> Result:
    return run(folder, source, "--dry-run", main=main)


def test_a_sound_environment_passes(tmp_path: Path) -> None:
    status, out, err = dry_run(tmp_path, SOUND)
    assert (status, err) == (0, "") and "the run                   6 steps" in out


@pytest.mark.parametrize("kind", ["raises in step", "raises in score", "scores NaN"])
def test_one_that_raises_does_not(tmp_path: Path, kind: str) -> None:
    status, out, err = dry_run(tmp_path, BROKEN[kind][0])
    assert status == 1 and "the run                   6 steps" in out
    assert joined(err).startswith("error ") and BROKEN[kind][3] in joined(err)


def test_reward_functions_are_not_called(tmp_path: Path) -> None:
    assert dry_run(tmp_path, BROKEN["is rewarded by a broken function"][0])[0] == 0
