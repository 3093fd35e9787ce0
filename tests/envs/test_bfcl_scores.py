"""Check the scores of a BFCL episode: notes, and the rewards "official" and "call_match"."""

from tests.bfcl_fixtures import SOLVED, environment, play, tool


def test_notes_say_what_differs() -> None:
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
    assert (
        "document/tmp: (empty), expected (absent)" in score.notes["turn 0: GorillaFileSystem.root"]
    )
    assert "moved to" in score.notes["turn 0: missing results"]


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
    assert score.notes["missing calls"].startswith("mkdir {'dir_name': 'temp'}")


def test_the_rewards_differ_on_another_way_to_the_same_result() -> None:
    texts = [SOLVED.replace('"document"', '"document/"'), "<TASK_FINISHED>"]
    official, calls = environment("base_0"), environment("base_0", reward="call_match")
    play(official, texts)
    play(calls, texts)
    assert (official.score().reward, calls.score().reward) == (1.0, 0.0)
