"""Check BFCL's tasks: counts, split, withheld and excluded tools, documents, and options."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from jaxgrpo.envs.bfcl import Bfcl, docs
from jaxgrpo.envs.bfcl.execution import Call
from tests.bfcl_fixtures import all_tasks, environment, library, task


@pytest.mark.parametrize("release", ["v3", "v4"])
def test_the_articles_split(release: str) -> None:
    suite = Bfcl(release=release)
    test, train = [t.id for t in suite.tasks("test")], [t.id for t in suite.tasks("train")]
    assert test[:3] == ["multi_turn_base_184", "multi_turn_base_111", "multi_turn_base_125"]
    assert test[-2:] == ["multi_turn_base_122", "multi_turn_base_27"]
    assert train[:3] == ["multi_turn_base_101", "multi_turn_base_127", "multi_turn_base_47"]
    assert train[-2:] == ["multi_turn_base_80", "multi_turn_base_190"]
    assert (len(test), len(train), len({*test, *train})) == (100, 100, 200)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        suite.tasks("dev")


@pytest.mark.parametrize(
    ("release", "first_calls", "turns", "calls"),
    [
        ("v3", {1: 92, 2: 67, 3: 22, 4: 8, 5: 9, 6: 1, 7: 1}, 745, 1160),
        ("v4", {1: 98, 2: 61, 3: 22, 4: 8, 5: 9, 6: 1, 7: 1}, 734, 1142),
    ],
)
def test_measured_facts_of_the_base_category(
    release: str, first_calls: dict[int, int], turns: int, calls: int
) -> None:
    payloads = list(library(release).tasks["base"].values())
    firsts = [len(payload.turns[0].truth) for payload in payloads]
    assert collections.Counter(firsts) == first_calls
    assert collections.Counter(len(payload.involved) for payload in payloads) == {1: 65, 2: 135}
    assert sum(len(payload.turns) for payload in payloads) == turns
    assert sum(len(turn.truth) for payload in payloads for turn in payload.turns) == calls


def test_the_releases_differ_in_46_first_queries_and_42_first_ground_truths() -> None:
    pairs = [
        (old, library("v4").tasks["base"][name])
        for name, old in library("v3").tasks["base"].items()
    ]
    assert sum(old.turns[0].query != new.turns[0].query for old, new in pairs) == 46
    assert sum(old.turns[0].truth != new.turns[0].truth for old, new in pairs) == 42
    assert (
        sum(json.loads(old.initial_config) != json.loads(new.initial_config) for old, new in pairs)
        == 72
    )


@pytest.mark.parametrize("release", ["v3", "v4"])
@pytest.mark.parametrize("category", ["base", "miss_func", "miss_param", "long_context"])
def test_every_category_loads(release: str, category: str) -> None:
    suite = Bfcl(release=release, categories=(category,))
    assert suite.tasks("test")[0].id == f"multi_turn_{category}_184"
    assert len(all_tasks(suite)) == 200


def test_several_categories_follow_one_another() -> None:
    train = Bfcl(categories=("miss_param", "base")).tasks("train")
    assert [t.id for t in train[:1] + train[100:101]] == [
        "multi_turn_miss_param_101",
        "multi_turn_base_101",
    ]


def test_labels_are_the_involved_classes() -> None:
    assert task("base_0").labels == ("TwitterAPI", "GorillaFileSystem")


def test_positional_ground_truth_gets_names_and_lists_stay_lists() -> None:
    assert task("base_0").payload.turns[2].truth == (
        Call("sort", {"file_name": "final_report.pdf"}),
    )
    lock = task("base_55").payload.turns[0].truth[2]
    assert lock == Call(
        "lockDoors", {"unlock": False, "door": ["driver", "passenger", "rear_left", "rear_right"]}
    )
    assert type(lock.arguments["door"]) is list


@pytest.mark.parametrize(("release", "excluding"), [("v3", 0), ("v4", 18)])
def test_excluded_tools_are_not_offered(release: str, excluding: int) -> None:
    without = [
        payload.id
        for payload in library(release).tasks["base"].values()
        if "GorillaFileSystem" in payload.involved and not {"cp", "mv", "rm"} <= set(payload.tools)
    ]
    assert len(without) == excluding
    offered = environment("base_0", release=release).observe().messages[0].content
    assert ("cp" in task("base_0", Bfcl(release=release)).payload.tools) == (release == "v3")
    assert ('"cp"' in offered) == (release == "v3")


@pytest.mark.parametrize("release", ["v3", "v4"])
def test_no_ground_truth_needs_a_tool_that_is_not_offered_then(release: str) -> None:
    for tasks in library(release).tasks.values():
        for payload in tasks.values():
            offered = set(payload.tools)
            for turn in payload.turns:
                offered.update(turn.new_tools)
                assert {call.name for call in turn.truth} <= offered, payload.id


def test_withheld_tools_arrive_on_their_turn() -> None:
    suite = Bfcl(categories=("miss_func",))
    payload = task("miss_func_127", suite).payload
    assert "get_watchlist" not in payload.tools
    assert [turn.new_tools for turn in payload.turns][:3] == [(), ("get_watchlist",), ()]
    defect = task(
        "miss_func_49", suite
    ).payload  # its second turn needs `tail`, announced on the fourth
    assert "tail" in defect.tools
    assert defect.turns[3].new_tools == ("wc", "cat")


def test_signatures_are_short() -> None:
    documents = library().documents["GorillaFileSystem"]
    assert docs.signature(documents["tail"]) == "tail(file_name: str, lines: int = 10)"
    assert docs.signature(documents["find"]) == "find(path: str = '.', name: str = None)"
    assert docs.signature(documents["pwd"]) == "pwd()"
    twitter = library().documents["TwitterAPI"]["post_tweet"]
    assert (
        docs.signature(twitter)
        == "post_tweet(content: str, tags: list[str] = [], mentions: list[str] = [])"
    )
    assert (
        docs.signature(library().documents["TicketAPI"]["edit_ticket"])
        == "edit_ticket(ticket_id: int, updates: dict)"
    )


def test_details_of_the_documents() -> None:
    document = library().documents["MathAPI"]["add"]
    full = json.loads(docs.describe([document], "full"))
    assert full == document
    assert sorted(json.loads(docs.describe([document], "without_response"))) == [
        "description",
        "name",
        "parameters",
    ]
    full, _, without, signatures = (
        len(environment("base_0", docs=d).observe().messages[0].content) for d in docs.DETAILS
    )
    assert signatures < 1500 < 8000 < without < full


def test_the_articles_wording_of_the_documents() -> None:
    document = library().documents["MathAPI"]["add"]
    worded = docs.describe([document], "article")
    assert worded.startswith(
        '{"name": "add", "description": "Add two numbers.", "parameters": {"type": "dict", '
    )
    assert json.loads(worded) == {**document, "description": "Add two numbers."}
    every = docs.describe(
        [d for owned in library().documents.values() for d in owned.values()], "article"
    )
    assert every.count("\n") == 128 and "Tool description" not in every
    native = docs.schema(document, "article")["function"]
    assert native["description"] == "Add two numbers." and "response" in native


def test_the_curriculum_plays_few_turns_first_in_the_articles_order() -> None:
    suite = Bfcl(curriculum=True, max_turns=3)
    tasks = suite.tasks("train")
    turns = [len(each.payload.turns) for each in tasks]
    assert turns == sorted(turns)
    assert collections.Counter(turns) == {1: 100, 2: 98, 3: 79}
    assert [each.id for each in tasks[:3]] == [
        "multi_turn_base_51:1",
        "multi_turn_base_140:1",
        "multi_turn_base_177:1",
    ]
    assert {each.payload.id for each in tasks} == {each.id for each in Bfcl().tasks("train")}
    assert [each.id for each in suite.tasks("test")] == [each.id for each in Bfcl().tasks("test")]
    env = suite.create(tasks[100])
    assert [env.step(text).done for text in suite.demonstration(tasks[100])] == [
        False,
        False,
        False,
        True,
    ]
    assert env.score().parts["turns_passed"] == 1.0
    assert (
        len(Bfcl(curriculum=True, max_turns=3, task_ids=("multi_turn_base_101",)).tasks("train"))
        == 3
    )


def test_the_curriculums_order_by_an_independent_sort() -> None:
    """The order is a stable sort of all copies by turns + noise, without the longer ones."""
    train = {each.id for each in Bfcl().tasks("train")}
    rows = [
        (payload.id, count)
        for payload in library().tasks["base"].values()
        if payload.id in train
        for count in range(1, len(payload.turns) + 1)
    ]
    noise = np.random.RandomState(42).random(len(rows))
    ordered = sorted(range(len(rows)), key=lambda i: rows[i][1] + noise[i] * 0.1)
    expected = [f"{rows[i][0]}:{rows[i][1]}" for i in ordered if rows[i][1] <= 2]
    assert [each.id for each in Bfcl(curriculum=True, max_turns=2).tasks("train")] == expected


def test_schemas_speak_json_schema() -> None:
    documents = library().documents
    add = docs.schema(documents["MathAPI"]["add"], "signatures")
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        "required": ["a", "b"],
    }
    assert add == {"type": "function", "function": {"name": "add", "parameters": parameters}}
    assert sorted(docs.schema(documents["MathAPI"]["add"], "without_response")["function"]) == [
        "description",
        "name",
        "parameters",
    ]
    types = set()

    def collect(schema: dict) -> None:
        types.add(schema.get("type"))
        for child in [
            *schema.get("properties", {}).values(),
            *([schema["items"]] if "items" in schema else []),
        ]:
            collect(child)

    for owned in documents.values():
        for document in owned.values():
            function = docs.schema(document, "full")["function"]
            collect(function["parameters"])
            assert (
                function["response"]["type"] == "object" or function["response"]["type"] == "array"
            )
    assert types == {"object", "number", "string", "integer", "boolean", "array"}
    find = docs.schema(documents["GorillaFileSystem"]["find"], "full")["function"]["parameters"][
        "properties"
    ]
    assert find["path"]["default"] == "."
    assert "default" not in find["name"]


def test_training_on_fewer_tasks() -> None:
    chosen = Bfcl(task_ids=("multi_turn_base_190", "multi_turn_base_101"))
    assert [t.id for t in chosen.tasks("train")] == ["multi_turn_base_101", "multi_turn_base_190"]
    assert len(chosen.tasks("test")) == 100
    assert [t.id for t in Bfcl(train_limit=2).tasks("train")] == [
        "multi_turn_base_101",
        "multi_turn_base_127",
    ]
    assert len(Bfcl(max_calls=1).tasks("train")) == 52
    assert len(Bfcl(max_calls=1).tasks("test")) == 100
    assert {t.labels for t in Bfcl(classes=("GorillaFileSystem", "MathAPI")).tasks("train")} == {
        ("GorillaFileSystem",),
        ("GorillaFileSystem", "MathAPI"),
    }
    assert len(Bfcl(max_calls=1, train_limit=7).tasks("train")) == 7
    with pytest.raises(
        ValueError, match="unknown task id of the train split 'multi_turn_base_184'"
    ):
        Bfcl(task_ids=("multi_turn_base_184",)).tasks("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"release": "v5"}, "unknown release 'v5': did you mean 'v4'.*allowed: v3, v4"),
        ({"categories": ("bse",)}, "unknown category 'bse': did you mean 'base'"),
        ({"categories": "base"}, "must be a tuple"),
        ({"categories": ()}, "must be a tuple"),
        ({"categories": ("base", "base")}, "names one twice"),
        ({"protocol": "tag"}, "did you mean 'tags'"),
        ({"docs": "signature"}, "did you mean 'signatures'"),
        ({"reward": "oficial"}, "did you mean 'official'"),
        ({"examples": 4}, "examples must be a whole number from 0 to 3, got 4"),
        ({"max_turns": 0}, "max_turns must be a whole number from 1"),
        ({"max_steps_per_turn": 1.5}, "max_steps_per_turn must be a whole number"),
        ({"max_calls": -1}, "max_calls"),
        ({"classes": ("TravelApi",)}, "did you mean 'TravelAPI'"),
        ({"classes": "TravelAPI"}, "classes must be a tuple"),
        ({"train_limit": -1}, "train_limit"),
        ({"result_limit": True}, "result_limit"),
        ({"task_ids": "multi_turn_base_1"}, "task_ids must be a tuple"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bfcl(**options)


def test_the_suite_is_frozen_and_its_tasks_are_its_own() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bfcl().docs = "full"  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not belong to this suite"):
        Bfcl().create(dataclasses.replace(task("base_0"), payload=None))
