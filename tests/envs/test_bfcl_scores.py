"""Check the scores of a BFCL episode: what differs, and the rewards "official" and "call_match"."""

from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.tasks import CATEGORIES
from jaxgrpo.types import Difference, ExpectedCall
from tests.bfcl_fixtures import SOLVED, all_tasks, environment, play, task, tool


def test_a_failed_check_says_what_differs() -> None:
    env = environment("base_0")
    play(
        env,
        [tool(("cd", {"folder": "document"}), ("mkdir", {"dir_name": "tmp"})), "<TASK_FINISHED>"],
    )
    score = env.score()
    matches = {"state_match": 0.5, "calls_match": 0.0}
    assert score.parts == {
        "state": 0.0, "response": 0.0, "turns_passed": 0.0, "finished": 1.0, **matches,
    }  # fmt: skip
    assert score.notes == {"turn 0": "the state differs"}
    made = Difference(
        "state", "turn 0: GorillaFileSystem.root: document/tmp", "(empty)", "(absent)"
    )
    assert made in score.differences
    assert {each.check for each in score.differences} == {"state", "response"}
    assert [each.expected for each in score.differences if each.check == "response"] == [
        """{"result": "'final_report.pdf' moved to 'temp/final_report.pdf'"}"""
    ]


def test_call_match_wants_the_calls_and_the_state() -> None:
    solved = environment("base_0", reward="call_match")
    play(solved, [SOLVED, "<TASK_FINISHED>"])
    matches = {"state_match": 1.0, "calls_match": 1.0}
    assert solved.score().parts == {
        "state": 1.0, "calls": 1.0, "turns_passed": 1.0, "finished": 1.0, **matches,
    }  # fmt: skip
    other_way = environment("base_0", reward="call_match")
    cd, mkdir = ("cd", {"folder": "document"}), ("mkdir", {"dir_name": "temp"})
    play(
        other_way,
        [
            tool(cd, mkdir, ("mv", {"destination": "temp", "source": "final_report.pdf"}), mkdir),
            "<TASK_FINISHED>",
        ],
    )
    assert other_way.score().passed  # the order of arguments, and a call that fails, do not matter
    more = environment("base_0", reward="call_match")
    play(more, [SOLVED, tool(("mkdir", {"dir_name": "of_my_own"})), "<TASK_FINISHED>"])
    assert (more.score().reward, more.score().parts["calls"], more.score().parts["state"]) == (
        0.0,
        1.0,
        0.0,
    )
    fewer = environment("base_0", reward="call_match")
    play(fewer, [tool(("cd", {"folder": "document"})), "<TASK_FINISHED>"])
    score = fewer.score()
    assert (score.reward, score.parts["calls"]) == (0.0, 0.0)
    assert score.notes["end"] == "the state differs; expected calls are missing"
    assert score.differences[-2:] == (
        Difference("calls", "end", "(missing)", "mkdir {'dir_name': 'temp'}"),
        Difference(
            "calls",
            "end",
            "(missing)",
            "mv {'source': 'final_report.pdf', 'destination': 'temp'}",
        ),
    )


def test_the_rewards_differ_on_another_way_to_the_same_result() -> None:
    texts = [SOLVED.replace('"document"', '"document/"'), "<TASK_FINISHED>"]
    official, calls = environment("base_0"), environment("base_0", reward="call_match")
    play(official, texts)
    play(calls, texts)
    assert (official.score().reward, calls.score().reward) == (1.0, 0.0)


def test_the_ground_truth_is_of_the_user_turns_that_are_used() -> None:
    first, two = Bfcl(), Bfcl(max_turns=2)
    assert first.ground_truth(task("base_0", first)) == (
        ExpectedCall("cd", {"folder": "document"}),
        ExpectedCall("mkdir", {"dir_name": "temp"}),
        ExpectedCall("mv", {"source": "final_report.pdf", "destination": "temp"}),
    )
    names = [call.name for call in two.ground_truth(task("base_0", two))]
    assert names == ["cd", "mkdir", "mv", "cd", "grep"]


def test_the_ground_truth_of_every_task_is_json() -> None:
    suite = Bfcl(categories=CATEGORIES, max_turns=20)
    truths = [suite.ground_truth(each) for each in all_tasks(suite)]
    assert len(truths) == 800 and min(map(len, truths)) > 0
