"""Why an episode did not pass, as one kind. Pure: from what is recorded alone.

The first kind that fits is taken, in the order of `KINDS`: what ended the episode comes before
what its verdict says.
"""

import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

from jaxgrpo.viewer.episode import Call, Episode
from jaxgrpo.viewer.reader import listed, mapping, text

KINDS = {
    "environment_error": "the environment raised an error",
    "gibberish": "gibberish: the same text over and over, or broken characters",
    "length_limit": "the tokens ran out",
    "step_limit": "the turns ran out",
    "no_closing_tag": "a tag was not closed",
    "malformed_json": "a tool call was not JSON",
    "gave_up": "the policy gave up",
    "no_call": "no call was made",
    "missing_call": "a call of the ground truth is missing",
    "wrong_arguments": "a call had wrong arguments",
    "extra_call": "a call too many changed the state",
    "wrong_state": "the state differs at the end",
    "missing_result": "an expected result is missing",
    "other": "not passed, for a reason that the record does not name",
}
"""The kinds in their order, each with what it means."""

GIBBERISH_RATIO = 5.0
"""How many times smaller a text packs: ordinary reasoning stays below 4."""
_LEAST_CHARS = 400
_PAIRS = (
    ("<reasoning>", "</reasoning>"),
    ("<tool>", "</tool>"),
    ("<tool_call>", "</tool_call>"),
    ("<think>", "</think>"),
)
_BODIES = re.compile(r"<(tool|tool_call)>(.*?)</\1>", re.DOTALL)
_BAD_ARGUMENT = re.compile(
    r"argument|parameter|invalid|required|type ?error|must be|not found", re.IGNORECASE
)


def repetition(texts: Sequence[str]) -> float:
    """How many times smaller the policy's longest text packs (zlib): about 2 for prose, above 5
    for a loop. 1 for texts under 400 characters, which say nothing."""
    data = max(texts, key=len, default="")[:20_000].encode("utf-8", "surrogatepass")
    if len(data) < _LEAST_CHARS:
        return 1.0
    return round(len(data) / len(zlib.compress(data, 1, wbits=-15)), 2)


def failure(episode: Episode, repeated: float) -> str:
    """The kind of failure, "" for an episode that passed."""
    if episode.passed:
        return ""
    if episode.stop_reason == "environment_error":
        return "environment_error"
    if repeated > GIBBERISH_RATIO or sum(said.count("\ufffd") for said in episode.policy_texts) > 4:
        return "gibberish"
    if episode.stop_reason in ("token_limit", "context_limit"):
        return "length_limit"
    if episode.stop_reason == "step_limit":
        return "step_limit"
    return _malformed(episode.policy_texts) or _verdict(episode)


def _malformed(texts: Sequence[str]) -> str:
    for said in texts:
        if any(said.count(opened) > said.count(closed) for opened, closed in _PAIRS):
            return "no_closing_tag"
    for said in texts:
        for _, body in _BODIES.findall(said):
            try:
                json.loads(body)
            except (ValueError, RecursionError):
                return "malformed_json"
    return ""


def _verdict(episode: Episode) -> str:
    if episode.stop_reason == "gave_up":
        return "gave_up"
    if not episode.calls or any("no call was made" in note for note in episode.notes.values()):
        return "no_call"
    truth = truth_calls(episode.truth)
    if truth:
        return _against_truth(episode.calls, truth)
    if any(not call.ok and _BAD_ARGUMENT.search(call.result) for call in episode.calls):
        return "wrong_arguments"
    notes = " ".join(episode.notes.values())
    checks = {mapping(each).get("check") for each in listed(episode.check.get("differences"))}
    if "state" in checks or "the state differs" in notes:
        return "wrong_state"
    if checks & {"response", "calls"} or "missing" in notes or "missing calls" in episode.notes:
        return "missing_result"
    return "other"


def truth_calls(truth: object) -> list[tuple[str, Any]]:
    """The calls of a ground truth, as names and arguments; none of one that is a text."""
    calls = []
    for each in listed(truth):
        fields = mapping(each)
        if fields:
            calls.append((text(fields.get("name")), fields.get("arguments")))
    return calls


def _against_truth(made: Sequence[Call], truth: Sequence[tuple[str, Any]]) -> str:
    """Compare the calls that were made with the expected ones: by name, then by arguments."""
    left = [(call.name, _value(call.arguments)) for call in made]
    missing = []
    for name, arguments in truth:
        due = (name, _value(arguments))
        if due in left:
            left.remove(due)
        else:
            missing.append(name)
    if not missing:
        return "extra_call" if left else "other"
    return "wrong_arguments" if any(name in missing for name, _ in left) else "missing_call"


def _value(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
