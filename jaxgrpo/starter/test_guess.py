"""Play the game by hand, then train for two steps: run `pytest`."""

import dataclasses
from pathlib import Path

from config import get_config
from guess import GuessTheNumber

from jaxgrpo import EvaluationSettings, StopReason, Task, train_policy

SEVEN = Task("seven", payload=(1, 9, 7))


def test_a_game_is_won() -> None:
    game = GuessTheNumber().create(SEVEN)
    assert game.observe().messages[0].content == "Guess my number, from 1 to 9."
    answer = game.step("5").observation
    assert answer is not None and answer.messages[0].content == "higher"
    assert game.step("7").stop_reason is StopReason.FINISHED
    assert game.score().passed and game.score().reward == 0.75


def test_a_game_is_lost() -> None:
    game = GuessTheNumber(guesses=2).create(SEVEN)
    answer = game.step("no idea").observation
    assert answer is not None and answer.messages[0].content == "digit?"
    assert game.step("8").stop_reason is StopReason.FAILED
    assert game.score().reward == 0.05


def test_no_task_is_in_both_splits() -> None:
    train, test = ({task.id for task in GuessTheNumber().tasks(s)} for s in ("train", "test"))
    assert train and test and not train & test


def test_two_steps_of_training(tmp_path: Path) -> None:
    config = get_config()
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, steps=2),
        evaluation=EvaluationSettings(before=False, after=False),
    )
    assert train_policy(config, tmp_path / "run").step == 2
