"""Play the article's figure step by step: a flight from Los Angeles to New York (BFCL v3).

It is booked in business class at $2,400.
"""

import pytest

from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.types import Difference, StopReason
from tests.bfcl_fixtures import environment, shown, task, tool

TASK = "base_199"
TRIP = {
    "travel_from": "LAX",
    "travel_to": "JFK",
    "travel_date": "2024-04-15",
    "travel_class": "business",
}
CARD = {"access_token": "abc123xyz", "card_id": "card_123456789"}
LOOK_UP = tool(("get_flight_cost", TRIP))
BOOK = ("book_flight", {**CARD, **TRIP, "travel_cost": 2400.0})


def test_it_is_a_task_of_the_test_split() -> None:
    assert f"multi_turn_{TASK}" in {each.id for each in Bfcl().tasks("test")}
    query = environment(TASK).observe().messages[-1].content
    assert query.startswith(
        "I'm planning a journey from Los Angeles to New York on the morning of April 15th 2024"
    )
    assert "card_123456789" in query and "abc123xyz" in query


@pytest.mark.parametrize("reward", ["official", "call_match"])
def test_after_training_the_cost_is_looked_up_and_the_flight_booked(reward: str) -> None:
    env = environment(TASK, reward=reward)
    cost = env.step(f"<reasoning>I need the cost of the flight first.</reasoning>\n{LOOK_UP}")
    assert [call.result for call in cost.calls] == ['{"travel_cost_list": [2400.0]}']
    booked = env.step(
        f"<reasoning>The flight costs $2,400. I can book it.</reasoning>\n{tool(BOOK)}"
    )
    assert '\\"booking_status\\": true' in shown(booked)
    assert env.step("The flight is booked. <TASK_FINISHED>").stop_reason is StopReason.FINISHED
    score = env.score()
    assert (score.reward, score.passed) == (1.0, True)


def test_before_training_the_cost_is_invented() -> None:
    """An untrained policy books at once at a guessed cost. The booking is accepted, but wrong."""
    env = environment(TASK)
    booked = env.step(tool(("book_flight", {**CARD, **TRIP, "travel_cost": 1000.0})))
    assert booked.calls[0].ok
    env.step("<TASK_FINISHED>")
    score = env.score()
    assert (score.reward, score.passed, score.parts["state"], score.parts["response"]) == (
        0.0,
        False,
        0.0,
        0.0,
    )
    cost = [each for each in score.differences if each.where.endswith("/travel_cost")]
    assert [(each.check, each.actual, each.expected) for each in cost] == [
        ("state", "1000.0", "2400.0")
    ]


def test_a_right_guess_is_not_enough() -> None:
    env = environment(TASK)
    env.step(tool(BOOK))
    env.step("<TASK_FINISHED>")
    score = env.score()
    assert (score.reward, score.parts["state"], score.parts["response"]) == (0.0, 1.0, 0.0)
    assert score.differences == (
        Difference("response", "turn 0", "(missing)", '{"travel_cost_list": [2400.0]}'),
    )


def test_in_v4_the_flight_is_booked_without_a_cost() -> None:
    suite = Bfcl(release="v4")
    assert all(
        "travel_cost" not in call.arguments for call in task(TASK, suite).payload.turns[0].truth
    )
    refused = suite.create(task(TASK, suite)).step(tool(BOOK))
    assert not refused.calls[0].ok
