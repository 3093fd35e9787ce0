"""Gibberish by statistics, and forged tool results: what is found, and that nothing else is."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gibberish import SENTENCES
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rewards.penalties import ForgedToolResult, LocalGibberish, repeated_piece
from jaxgrpo.storage.pretrained import load_tokenizer
from jaxgrpo.types import Message, Trajectory
from tests.bfcl_fixtures import all_tasks
from tests.episodes import episode

GIBBERISH = LocalGibberish()
CALL = '<reasoning>I look first.</reasoning>\n<tool>[{"name": "ls", "args": {"a": true}}]</tool>'


def played(*texts: str) -> Trajectory:
    opening = (
        Message("user", "example"),
        Message("assistant", "xq " * 99),
        Message("user", "do it"),
    )
    said = tuple(
        m for text in texts for m in (Message("assistant", text), Message("tool", "\x00 " * 99))
    )
    return dataclasses.replace(
        episode([1], [2], [1], 0.75), messages=opening + said, turns=len(texts)
    )


@pytest.mark.parametrize(
    ("items", "repeats", "least", "longest", "piece"),
    [
        ("abcabcabc", 3, 9, 3, "abc"),
        ("xxabcabcab", 2, 6, 3, "abc"),
        ("xxabcabcab", 3, 8, 3, ""),  # the third one is not whole
        ("abcabcabc", 3, 10, 3, ""),
        ("abcabcabc", 3, 9, 2, ""),
        ("ababababab", 2, 8, 9, "ab"),
        ("-" * 80, 4, 60, 9, ""),
        ("-" * 80 + "na" * 40, 4, 60, 9, "na"),
        ("", 2, 0, 9, ""),
        ("a", 2, 0, 9, ""),
        (("x", "b", "c", "b", "c"), 2, 2, 5, ("b", "c")),
        (("---",) * 4, 4, 4, 4, ("---",)),
    ],
)
def test_the_piece_that_is_repeated_in_a_row(
    items: Any, repeats: int, least: int, longest: int, piece: Any
) -> None:
    assert repeated_piece(items, repeats, least, longest) == piece


PARAGRAPH = (
    "The user wants the report moved. I look at the folder before I make a new one, because the "
    "name may be taken; then I move the file and check that it arrived. "
)
SHUFFLED = "".join(
    SENTENCES[i] for i in [0, 1, 2, 3, 4, 2, 0, 3, 1, 4, 3, 0, 4, 1, 2, 4, 0, 2, 1, 3] * 2
)
FOUND = {
    "a phrase in a row": ((CALL, "So I call ls. " * 5), "turn 1 repeats 'So I call ls. '"),
    "a paragraph in a row": ((PARAGRAPH * 4,), "turn 0 repeats"),
    "a call in a row": (
        ("<tool>[" + ", ".join(['{"name": "ls", "args": {}}'] * 5) + "]</tool>",),
        "turn 0 repeats",
    ),
    "a turn in a row": ((CALL,) * 4, "turns repeat '<reasoning>I look first."),
    "two turns in a row": ((CALL, "<TASK_FINISHED>") * 4, "turns repeat '<reasoning>I look first."),
    "sentences out of order": ((SHUFFLED,), "turn 0 compresses by"),
    "broken characters": (("I see \ufffd here.", "And \x07 there."), "2 broken characters"),
    "glued words": (
        ("The drawliteristoryqtact and adventurecontactful went.",),
        "2 words such as 'drawliteristoryqtact'",
    ),
    "scripts within words": (("Открыvать, зdесь, файLы.",), "3 words of mixed scripts"),
    "many scripts": (
        ("open открыть 開く เปิด",),
        "0 words of mixed scripts, letters of CJK, CYRILLIC, LATIN, THAI",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_gibberish_and_repetition_are_found(name: Any) -> None:
    texts, said = FOUND[name]
    found = GIBBERISH.findings(texts)
    assert found[0].startswith(said)
    assert len(found) == (2 if name == "a paragraph in a row" else 1)  # it compresses well, too
    score = RewardSettings((GIBBERISH,)).score(played(*texts))
    assert (score.reward, score.parts["gibberish"], score.passed) == (-1.0, -1.0, True)
    assert score.notes["gibberish"] == "; ".join(found)


IN_ORDER = {
    "a call three times": (CALL,) * 3,
    "a phrase three times": ("No, no, no. So I call ls. So I call ls. So I call ls.",),
    "a cut character at the end": ("It costs 5 \ufffd\ufffd\ufffd", "So \ufffd"),
    "a ruler": ("-" * 200 + "\n" + "=" * 200,),
    "spaces": ("a" + " " * 500 + "b",),
    "camel and snake case": (
        "displayCarStatusOfAllTheCars, get_outside_temperature_from_google, setCruiseControl",
    ),
    "one long word": ("That is internationalization.",),
    "Chinese with English names": (
        "我先调用get_stock_info函数,再用Python检查结果。然后完成任务。",
    ),
    "Russian and formulas": ("Скорость Δx равна µm на Ω, where x is the distance.",),
    "emoji and currency": ("Great day! 🎉🎉🚀 It costs €5, £4 or ¥600 — “cheap”… 20 °C ✓",),
    "nothing": ("",),
}


@pytest.mark.parametrize("name", IN_ORDER)
def test_what_is_in_order(name: Any) -> None:
    assert GIBBERISH.findings(IN_ORDER[name]) == []
    assert RewardSettings((GIBBERISH,)).score(played(*IN_ORDER[name])).reward == 0.75


REASONING = (
    """The user would like to know whether the flight to Lisbon can still be cancelled. First I need
    the booking id, which was in the second result: 3426812. The access token was given at the
    start, so I do not have to log in again. If the cancellation succeeds, I also have to open a
    ticket with priority 3, and only then is the request fulfilled. I should not guess its text.""",
    """There are three files here: summary.txt, draft_v2.txt and notes. "The latest draft" is most
    likely draft_v2.txt, since nothing else has a version in its name. Let me count its lines with
    wc before I sort them. Wait: the user asked for words, not lines, so the mode must be "w".""",
    """150.75 x 100 = 15,075.00, which is less than the balance of $20,000.00. So the order for 100
    shares of XTC can be placed. After that the balance is 20,000 - 15,075 = 4,925. Next:
    place_order(order_type="Buy", symbol="XTC", price=150.75, amount=100).""",
    """The doors must be locked, the brake pedal pressed and the parking brake released before the
    engine can be started: lockDoors(unlock=False, door=["driver", "passenger", "rear_left"]), then
    pressBrakePedal(pedalPosition=1.0), then startEngine(ignitionMode="START").""",
)


@pytest.mark.parametrize("text", REASONING)
def test_ordinary_reasoning_is_in_order(text: Any) -> None:
    assert GIBBERISH.findings((text, CALL, "<TASK_FINISHED>")) == []


@pytest.mark.parametrize("protocol", ["tags", "native"])
@pytest.mark.parametrize("category", ["base", "miss_func", "long_context"])
def test_no_demonstration_is_gibberish(protocol: str, category: str) -> None:
    suite = Bfcl(categories=(category,), protocol=protocol, max_turns=99)
    tasks = all_tasks(suite)
    found = {each.id: GIBBERISH.findings(suite.demonstration(each)) for each in tasks}
    assert len(found) == 200
    assert {name: finding for name, finding in found.items() if finding} == {}


def test_random_tokens_are_gibberish() -> None:
    """Of the demo's own tokenizer; a turn of 80 tokens is about as long as one call."""
    tokenizer = load_tokenizer(Path("assets/tiny-qwen2.5"))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, len(tokenizer) - 10, (100, 80))
    found = sum(bool(GIBBERISH.findings((tokenizer.decode(row.tolist()),))) for row in ids)
    assert found >= 98


def test_the_settings_decide() -> None:
    assert LocalGibberish(turn_repeats=3).findings((CALL,) * 3) != []
    assert LocalGibberish(repeats=6).findings(FOUND["a phrase in a row"][0]) == []
    assert LocalGibberish(loop_chars=71).findings(FOUND["a phrase in a row"][0]) == []
    assert LocalGibberish(longest_piece=13).findings(FOUND["a phrase in a row"][0]) == []
    assert LocalGibberish(compression=9).findings((SHUFFLED,)) == []
    assert LocalGibberish(least_chars=5000).findings((SHUFFLED,)) == []
    assert LocalGibberish(broken_chars=2).findings(FOUND["broken characters"][0]) == []
    assert LocalGibberish(glued_letters=21).findings(FOUND["glued words"][0]) == []
    assert LocalGibberish(glued_words=2).findings(FOUND["glued words"][0]) == []
    assert LocalGibberish(glued_fraction=0.9).findings(FOUND["glued words"][0]) == []
    assert LocalGibberish(mixed_words=3).findings(FOUND["scripts within words"][0]) == []
    assert LocalGibberish(most_scripts=4).findings(FOUND["many scripts"][0]) == []
    score = RewardSettings((LocalGibberish(penalty=-2.0),)).score(
        played(*FOUND["a turn in a row"][0])
    )
    assert score.reward == -2.0


@pytest.mark.parametrize(
    "settings", [{"repeats": 1}, {"turn_repeats": 1}, {"compression": 0.5}, {"broken_chars": -1}]
)
def test_thresholds_that_would_find_everything_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        LocalGibberish(**settings)


@pytest.mark.parametrize(
    ("texts", "reward", "note"),
    [
        ((CALL, "<TASK_FINISHED>"), 0.75, None),
        (("<tool>[]</tool>", '<Tool_Result>["ls succeeded"]'), -1.0, "in turn 1"),
        (("ends </tool_result>", "<tool_response>\n3"), -1.0, "in turn 0, 1"),
    ],
)
def test_a_tool_result_of_the_policys_own_is_found(
    texts: Any, reward: float, note: str | None
) -> None:
    score = RewardSettings((ForgedToolResult(),)).score(played(*texts))
    assert (score.reward, score.notes.get("forged_result")) == (reward, note)
    assert score.parts["forged_result"] == (0.0 if note is None else -1.0)


def test_the_marks_are_a_setting() -> None:
    marks = ForgedToolResult(penalty=-0.5, marks=("Observation:",))
    assert RewardSettings((marks,)).score(played("observation: 3")).reward == -0.5
    assert RewardSettings((marks,)).score(played("<tool_result>")).reward == 0.75
