"""Check one BFCL episode: protocols, turns and steps."""

import json

import pytest

from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.scoring import TurnVerdict, official_score
from jaxgrpo.types import Message, StopReason
from tests.bfcl_fixtures import SOLVED, all_tasks, environment, play, shown, task, tool


@pytest.mark.parametrize("release", ["v3", "v4"])
@pytest.mark.parametrize("protocol", ["tags", "native"])
@pytest.mark.parametrize("max_turns", [1, 99])
@pytest.mark.parametrize("reward", ["official", "call_match"])
def test_the_demonstration_of_every_base_task_is_rewarded(
    release: str, protocol: str, max_turns: int, reward: str
) -> None:
    suite = Bfcl(release=release, protocol=protocol, max_turns=max_turns, reward=reward)
    failed = []
    for each in all_tasks(suite):
        env = suite.create(each)
        stop = play(env, suite.demonstration(each))
        score = env.score()
        if (stop, score.reward, score.parts["turns_passed"], score.parts["finished"]) != (
            StopReason.FINISHED,
            1.0,
            1.0,
            1.0,
        ):
            failed.append((each.id, stop, score))
    assert failed == []


@pytest.mark.parametrize("release", ["v3", "v4"])
@pytest.mark.parametrize("category", ["miss_func", "miss_param", "long_context"])
def test_the_demonstration_of_the_other_categories_is_rewarded(release: str, category: str) -> None:
    suite = Bfcl(release=release, categories=(category,), max_turns=99)
    failed = []
    for each in all_tasks(suite):
        env = suite.create(each)
        stop = play(env, suite.demonstration(each))
        if stop not in (StopReason.FINISHED, StopReason.GAVE_UP) or env.score().reward != 1.0:
            failed.append(each.id)
    assert failed == []


def test_the_opening_in_tags() -> None:
    observation = environment("base_0", docs="signatures").observe()
    system, user = observation.messages
    assert (system.role, user.role) == ("system", "user")
    assert "<reasoning>" in system.content and "<TASK_FINISHED>" in system.content
    assert "\nmv(source: str, destination: str)\n" in system.content
    assert user.content.startswith("Move 'final_report.pdf' within")  # text, not JSON
    assert observation.stop_strings == ("</tool>", "<TASK_FINISHED>", "<TASK_ERROR>")
    assert observation.tools == ()


def test_the_opening_in_the_native_form() -> None:
    observation = environment(
        "base_0", release="v4", protocol="native", docs="signatures"
    ).observe()
    assert observation.stop_strings == ()
    names = [schema["function"]["name"] for schema in observation.tools]
    assert "mv" in names and "post_tweet" in names and "cp" not in names
    assert "<tool>" not in observation.messages[0].content


def test_episodes_of_one_task_observe_the_same() -> None:
    suite = Bfcl()
    first, second = suite.create(task("base_0")), suite.create(task("base_0"))
    play(first, [SOLVED])
    assert second.observe() == suite.create(task("base_0")).observe()


@pytest.mark.parametrize("protocol", ["tags", "native"])
def test_worked_examples_come_before_the_task(protocol: str) -> None:
    bare = environment("base_0", protocol=protocol).observe().messages
    two = environment("base_0", protocol=protocol, examples=2).observe().messages
    result = "system" if protocol == "tags" else "tool"
    example = ["user", "assistant", result, "assistant"]
    assert [message.role for message in two] == ["system", *example, *example, "user"]
    assert (two[0], two[-1]) == bare
    call = '{"name": "set_lamp", "args": {"room": "kitchen", "on": true}}'
    assert (call in two[2].content) == (protocol == "tags")


def test_results_say_how_each_call_went() -> None:
    env = environment("base_0")
    result = env.step(
        tool(
            ("cd", {"folder": "document"}),
            ("cd", {"folder": "nowhere"}),
            ("mkdir", {"dir_name": "x"}),
        )
    )
    assert result.observation is not None
    (message,) = result.observation.messages
    assert message.role == "system"
    lines = json.loads(message.content.removeprefix("<tool_result>").removesuffix("</tool_result>"))
    assert lines[0] == 'cd succeeded: {"current_working_directory": "document"}'
    assert lines[1].startswith("cd failed: ") and lines[1].endswith("(1 later call was not run)")
    assert [(call.name, call.ok) for call in result.calls] == [("cd", True), ("cd", False)]
    assert result.calls[0].arguments == '{"folder": "document"}'


def test_a_failed_call_stops_its_list_and_earlier_ones_stand() -> None:
    env = environment("base_0")
    env.step(
        tool(
            ("cd", {"folder": "document"}),
            ("mkdir", {"dir_name": "temp"}),
            ("pwd", {"x": 1}),
            ("mkdir", {"dir_name": "late"}),
        )
    )
    listing = env.step(tool(("ls", {})))
    assert (
        listing.calls[0].result
        == '{"current_directory_content": ["final_report.pdf", "previous_report.pdf", "temp"]}'
    )


def test_native_results_are_tool_messages() -> None:
    env = environment("base_0", protocol="native")
    calls = [("cd", {"folder": "document"}), ("cd", {"folder": "nowhere"}), ("pwd", {})]
    text = "Let me see.\n" + "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    )
    result = env.step(text)
    assert result.observation is not None
    assert [message.role for message in result.observation.messages] == ["tool", "tool", "tool"]
    assert result.observation.messages[0] == Message(
        "tool", '{"current_working_directory": "document"}'
    )
    assert result.observation.messages[2].content == "not run: an earlier call failed"
    assert len(result.calls) == 2


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "ls"',
        "<tool_call>ls</tool_call>",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        "<tool_call></tool_call>",
    ],
)
def test_a_native_call_that_cannot_be_read_is_an_observation(text: str) -> None:
    result = environment("base_0", protocol="native").step(text)
    assert result.observation is not None
    assert "nothing was done" in shown(result)


def test_native_calls_that_are_malformed_are_observations() -> None:
    env = environment("base_0", protocol="native")
    for item in (
        '"ls"',
        "[]",
        '{"name": 3, "arguments": {}}',
        '{"name": "ls", "arguments": []}',
        '{"name": "ls"}',
    ):
        assert not env.step(f"<tool_call>{item}</tool_call>").done


def test_a_native_reply_without_a_call_ends_the_turn() -> None:
    env = environment("base_0", protocol="native")
    assert env.step("All done.").stop_reason is StopReason.FINISHED
    assert env.score().reward == 0.0


def test_finishing_counts_only_outside_the_reasoning() -> None:
    env = environment("base_0")
    for text in (
        "TASK_FINISHED",
        "<reasoning>then I write <TASK_FINISHED>",
        "<reasoning><TASK_ERROR></reasoning>",
    ):
        assert not env.step(text).done
    assert (
        env.step("<reasoning>Not yet <TASK_ERROR>.</reasoning> <TASK_FINISHED>").stop_reason
        is StopReason.FINISHED
    )


def test_the_tenth_steps_calls_still_run() -> None:
    env = environment("base_0")
    assert play(env, ["what?"] * 9) is None
    last = env.step(SOLVED)
    assert last.stop_reason is StopReason.STEP_LIMIT
    assert not last.stop_reason.overlong
    assert [call.ok for call in last.calls] == [True, True, True]
    score = env.score()
    assert score.passed
    assert score.parts["finished"] == 0.0
    with pytest.raises(RuntimeError, match="is over"):
        env.step("<TASK_FINISHED>")


def test_the_tenth_steps_calls_can_be_left_out_as_in_the_articles_code() -> None:
    env = environment("base_0", run_last_step=False)
    assert play(env, ["what?"] * 9) is None
    last = env.step(SOLVED)
    assert (last.stop_reason, last.calls) == (StopReason.STEP_LIMIT, ())
    assert not env.score().passed
    ended = environment("base_0", run_last_step=False)
    play(ended, [SOLVED, *["what?"] * 8])
    assert ended.step("<TASK_FINISHED>").stop_reason is StopReason.FINISHED
    assert ended.score().passed


def test_the_number_of_steps_can_be_lowered() -> None:
    assert (
        environment("base_0", max_steps_per_turn=1).step("what?").stop_reason
        is StopReason.STEP_LIMIT
    )


def test_more_than_twenty_steps_with_calls_fail_officially() -> None:
    for extra, passed in ((19, True), (20, False)):
        env = environment("base_0", max_steps_per_turn=50)
        unreadable = ["<tool>[7]</tool>", "<tool>pwd</tool>"] * 5  # not steps in the official sense
        play(env, unreadable + [tool(("pwd", {}))] * extra + [SOLVED, "<TASK_FINISHED>"])
        score = env.score()
        assert score.passed is passed
        assert (score.parts["state"], score.parts["response"]) == (1.0, 1.0)


def test_turns_follow_one_another_and_each_has_its_steps() -> None:
    suite = Bfcl(max_turns=99, max_steps_per_turn=3)
    env = suite.create(task("base_0", suite))
    assert not env.step("what?").done
    env.step(SOLVED)
    second = env.step("<TASK_FINISHED>")
    assert second.observation is not None
    (message,) = second.observation.messages
    assert message.role == "user" and message.content.startswith("Perform a detailed search")
    assert play(env, suite.demonstration(task("base_0"))[2:]) is StopReason.FINISHED
    assert env.score().reward == 1.0


def test_a_lost_turn_ends_the_episode() -> None:
    env = environment("base_0", max_turns=99)
    env.step(tool(("pwd", {})))
    assert env.step("<TASK_FINISHED>").stop_reason is StopReason.FAILED
    score = env.score()
    assert score.reward == 0.0
    assert score.parts["turns_passed"] == 0.0
    assert score.notes["turn 0"] == "the state differs"
    assert score.notes["turn 1"] == "no call was made"  # the lost turn's calls are its own
    assert (
        environment("base_0", max_turns=99, reward="call_match").step("<TASK_FINISHED>").observation
        is not None
    )


def test_an_episode_can_continue_after_a_lost_turn() -> None:
    suite = Bfcl(max_turns=2, stop_at_lost_turn=False)
    env = suite.create(task("base_0", suite))
    assert env.step("<TASK_FINISHED>").observation is not None
    assert play(env, suite.demonstration(task("base_0"))[2:]) is StopReason.FINISHED
    score = env.score()
    assert (score.passed, score.notes["turn 0"]) == (False, "no call was made")


def test_results_of_earlier_turns_count_in_later_ones() -> None:
    """The second turn's truth only reads. Earlier results count, but some call is needed."""
    there, search = (
        ("cd", {"folder": "temp"}),
        ("grep", {"file_name": "final_report.pdf", "pattern": "budget analysis"}),
    )
    early, never = environment("base_0", max_turns=2), environment("base_0", max_turns=2)
    assert (
        play(
            early,
            [SOLVED, tool(there, search), "<TASK_FINISHED>", tool(("pwd", {})), "<TASK_FINISHED>"],
        )
        is StopReason.FINISHED
    )
    assert early.score().parts["turns_passed"] == 1.0
    assert early.score().reward == 1.0
    assert early.score().parts["calls_match"] == 0.5  # it matches calls turn by turn
    play(never, [SOLVED, tool(there), "<TASK_FINISHED>", tool(("pwd", {})), "<TASK_FINISHED>"])
    assert never.score().parts["turns_passed"] == 0.5
    assert never.score().notes["turn 1"] == "expected results are missing"


def test_a_turn_without_ground_truth_is_not_compared() -> None:
    """The first turn of this task lacks information. The second turn's truth lists the files."""
    changes, listing = tool(("mkdir", {"dir_name": "of_my_own"})), tool(("ls", {"a": True}))
    first, both = (
        environment("miss_param_11", categories=("miss_param",), max_turns=turns)
        for turns in (1, 2)
    )
    play(first, [changes, "<TASK_FINISHED>"])
    assert (first.score().reward, first.score().parts["state"]) == (1.0, 1.0)
    play(both, [changes, "<TASK_FINISHED>", listing, "<TASK_FINISHED>"])
    assert both.score().parts["turns_passed"] == 0.5
    assert both.score().notes["turn 1"] == "the state differs"


def test_turns_that_were_not_played_are_not_passed() -> None:
    right = TurnVerdict(0, state=True, response=True)
    early, whole = (
        official_score([right], 2, finished=False),
        official_score([right, right], 2, finished=False),
    )
    assert (early.reward, early.passed, early.parts["turns_passed"]) == (0.0, False, 0.5)
    assert (whole.reward, whole.passed, whole.parts["turns_passed"]) == (1.0, True, 1.0)
    none = official_score([], 1, finished=False)
    assert (none.reward, none.parts["state"], none.parts["response"]) == (0.0, 0.0, 0.0)


def test_calls_of_a_turn_that_was_cut_off_do_not_count_in_the_next() -> None:
    env = environment("base_0", max_turns=2)
    env.step(SOLVED)
    score = env.score()
    assert "turn 0" not in score.notes
    assert score.notes["turn 1"] == "no call was made"


def test_giving_up_ends_a_turn() -> None:
    env = environment("base_0")
    assert env.step("<TASK_ERROR>").stop_reason is StopReason.GAVE_UP
    assert env.score().notes["turn 0"] == "no call was made"


def test_withheld_tools_are_refused_and_then_announced() -> None:
    suite = Bfcl(categories=("miss_func",), max_turns=99, docs="signatures")
    env = suite.create(task("miss_func_127", suite))
    assert "get_watchlist" not in env.observe().messages[0].content
    refused = env.step(tool(("get_watchlist", {})))
    assert "there is no tool named 'get_watchlist'" in shown(refused)
    announced = env.step("<TASK_ERROR>")
    assert announced.observation is not None
    assert "\nget_watchlist()\n" in announced.observation.messages[0].content
    assert env.step(tool(("get_watchlist", {}))).calls[0].ok


def test_a_long_result_is_shown_in_part_and_checked_whole() -> None:
    suite = Bfcl(result_limit=10)
    env = suite.create(task("base_0", suite))
    assert env.step(SOLVED).calls[0].result == '{"current_... (31 characters left out)'
    assert env.step("<TASK_FINISHED>").done
    assert env.score().reward == 1.0
    whole = '{"current_working_directory": "document"}'
    assert environment("base_0", result_limit=41).step(SOLVED).calls[0].result == whole


def test_the_same_actions_give_the_same_observations() -> None:
    suite = Bfcl(max_turns=99)
    for each in all_tasks(suite)[:40]:
        first, second = suite.create(each), suite.create(each)
        for text in suite.demonstration(each):
            assert first.step(text) == second.step(text)
        assert first.score() == second.score()
