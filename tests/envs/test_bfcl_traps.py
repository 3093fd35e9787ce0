"""Check the simulators' traps: leaks between episodes, hidden methods, hangs and exceptions."""

import decimal
import json
import random
import sys
import threading
import time
from collections.abc import Iterator

import mpmath
import pytest

from jaxgrpo.envs.bfcl import Bfcl, guards, scoring
from jaxgrpo.envs.bfcl.execution import Call, Session, result_text
from tests.bfcl_fixtures import all_tasks, environment, library, play, run, session, task, tool


def test_initial_states_are_not_mutated() -> None:
    suite = Bfcl(max_turns=99)
    before = {each.id: each.payload.initial_config for each in all_tasks(suite)}
    for _ in range(2):
        for each in all_tasks(suite):
            env = suite.create(each)
            play(env, suite.demonstration(each))
            assert env.score().reward == 1.0
    assert {each.id: each.payload.initial_config for each in all_tasks(suite)} == before


@pytest.mark.parametrize(
    "name",
    [
        "_load_scenario",
        "__init__",
        "__class__",
        "_api_description",
        "root",
        "_current_dir",
        "cp",
        "",
        "ls ",
    ],
)
def test_only_offered_tools_can_be_called(name: str) -> None:
    env = environment("base_0")
    result = env.step(json.dumps([{"name": name, "args": {}}]).join(["<tool>", "</tool>"]))
    assert not result.done
    assert [call.ok for call in result.calls] == [False]


def test_list_defaults_are_not_shared() -> None:
    first, second = (
        session("TwitterAPI", {"authenticated": True}),
        session("TwitterAPI", {"authenticated": True}),
    )
    run(first, "post_tweet", content="one")
    run(first, "mention", tweet_id=0, mentioned_usernames=["@a"])
    assert json.loads(run(first, "post_tweet", content="two"))["mentions"] == []
    assert json.loads(run(second, "post_tweet", content="three"))["mentions"] == []


def test_arguments_stay_the_callers() -> None:
    on = session("TwitterAPI", {"authenticated": True})
    tags = ["#a"]
    call = Call("post_tweet", {"content": "x", "tags": tags, "mentions": []})
    on.run(call)
    run(on, "mention", tweet_id=0, mentioned_usernames=["@b"])
    assert call.arguments == {"content": "x", "tags": ["#a"], "mentions": []}


def test_random_ids_are_an_episodes_own() -> None:
    def login(on: Session) -> str:
        return json.loads(
            run(
                on,
                "authenticate_travel",
                client_id="",
                client_secret="",
                refresh_token="",
                grant_type="read",
                user_first_name="A",
                user_last_name="B",
            )
        )["access_token"]

    alone = session("TravelAPI")
    expected = [login(alone), login(alone)]
    first, second = session("TravelAPI"), session("TravelAPI")
    assert [login(first), login(second), login(second), login(first)] == [
        expected[0],
        expected[0],
        expected[1],
        expected[1],
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("power", {"base": 9, "exponent": 10**9}),
        ("power", {"base": -(10**4000), "exponent": 10**4000}),
        ("power", {"base": 2, "exponent": -(10**4000)}),
        ("power", {"base": 1e300, "exponent": 1e300}),
        ("logarithm", {"value": 10, "base": 2, "precision": 10**9}),
        ("logarithm", {"value": "1e1000000000", "base": 2, "precision": 5}),
        ("logarithm", {"value": 10, "base": "9" * 100_000, "precision": 5}),
        ("logarithm", {"value": 10, "base": 2, "precision": "many"}),
        ("logarithm", {"value": 10, "base": 1, "precision": 5}),
        ("square_root", {"number": 2, "precision": 10**12}),
        ("square_root", {"number": 2, "precision": 0}),
        ("round_number", {"number": 5, "decimal_places": -(10**9)}),
        ("multiply", {"a": 10**4200, "b": 10**4200}),
        ("mean", {"numbers": [10**4000, 0.5]}),
        ("standard_deviation", {"numbers": [1e200, -1e200]}),
        ("sum_values", {"numbers": [[1], [2]]}),
        ("max_value", {"numbers": [1, "a"]}),
        ("divide", {"a": 1, "b": 0}),
    ],
)
def test_mathematics_cannot_hang(name: str, arguments: dict) -> None:
    started = time.perf_counter()
    result = session("MathAPI").run(Call(name, arguments))
    assert not result.ok
    assert time.perf_counter() - started < 1


def test_ordinary_mathematics_is_official() -> None:
    on = session("MathAPI")
    assert run(on, "power", base=2, exponent=10) == '{"result": 1024}'
    assert run(on, "logarithm", value=20, base=10, precision=2) == "{'result': mpf('1.3027')}"
    assert run(on, "square_root", number=2, precision=5) == "{'result': Decimal('1.4142')}"
    assert run(on, "round_number", number=2.567, decimal_places=1) == '{"result": 2.6}'
    assert run(on, "add", a="1", b="2") == '{"result": "12"}'


@pytest.fixture
def _hasty_threads() -> Iterator[None]:
    """Switch threads every microsecond, so that races on shared state appear."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_hasty_threads")
def test_global_precisions_are_left_alone_and_threads_do_not_mix() -> None:
    before = (mpmath.mp.dps, decimal.getcontext().prec)
    run(session("MathAPI"), "square_root", number=2, precision=3)
    expected = {
        digits: run(session("MathAPI"), "logarithm", value=2, base=10, precision=digits)
        for digits in (5, 50, 200)
    }
    assert expected[5] == "{'result': mpf('0.30102968')}"
    seen: dict[int, set[str]] = {digits: set() for digits in expected}

    def work(digits: int) -> None:
        on = session("MathAPI")
        for _ in range(200):
            seen[digits].add(run(on, "logarithm", value=2, base=10, precision=digits))
            run(on, "square_root", number=2, precision=digits)

    threads = [
        threading.Thread(target=work, args=(digits,)) for digits in expected for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {digits: {text} for digits, text in expected.items()}
    assert (mpmath.mp.dps, decimal.getcontext().prec) == before


def test_copies_cannot_outgrow_the_machine() -> None:
    on = session("GorillaFileSystem", {"root": {"r": {"type": "directory", "contents": {}}}})
    run(on, "mkdir", dir_name="a")
    started = time.perf_counter()
    texts = []
    for index in range(60):  # each round doubles the tree
        texts.append(run(on, "cp", source="a", destination=f"b{index}"))
        run(on, "mv", source=f"b{index}", destination="a")
    assert texts[-1] == "Error during execution: no space left"
    assert guards.tree_size(on.instances["GorillaFileSystem"].root) <= guards.MAX_TREE
    assert run(on, "find").startswith('{"matches"')
    found = scoring.state_differences(on.instances, session("GorillaFileSystem").instances)
    assert {each.where.split(": ")[0] for each in found} == {"GorillaFileSystem.root"}
    assert time.perf_counter() - started < 5


def test_a_directory_cannot_hold_itself() -> None:
    on = session("GorillaFileSystem", {"root": {"r": {"type": "directory", "contents": {}}}})
    run(on, "mkdir", dir_name="a")
    assert (
        run(on, "cp", source="a", destination="a")
        == "Error during execution: cannot copy 'a' into itself"
    )
    run(on, "mv", source="a", destination="a")  # officially, this removes the directory
    assert run(on, "find") == '{"matches": []}'


def test_deep_directories_are_an_unequal_state_not_an_exception() -> None:
    sides = [
        session("GorillaFileSystem", {"root": {"r": {"type": "directory", "contents": {}}}})
        for _ in range(2)
    ]
    for on in sides:
        for _ in range(2000):
            run(on, "mkdir", dir_name="d")
            run(on, "cd", folder="d")
    run(sides[0], "touch", file_name="x")
    run(sides[0], "cd", folder="/")
    assert run(sides[0], "find").startswith("Error during execution: maximum recursion depth")
    found = scoring.state_differences(sides[0].instances, sides[1].instances)
    assert found and {each.where.split(": ")[0] for each in found} == {"GorillaFileSystem.root"}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stocks": [["a"]], "min_price": 1, "max_price": 2},
        {"stocks": 5, "min_price": 1, "max_price": 2},
        {"self": 1},
        {"stocks": "ab"},
    ],
)
def test_bad_arguments_are_results(arguments: dict) -> None:
    result = session("TradingBot").run(Call("filter_stocks_by_price", arguments))
    assert not result.ok
    assert result.text.startswith("Error during execution: ")


def test_any_text_is_an_observation_or_an_end() -> None:
    env = environment("base_0", max_steps_per_turn=1000)
    nested = "[" * 20 + "]" * 20
    texts = [
        "",
        "\x00",
        "<tool>" * 1000,
        tool(("ls", {"a": [[[]]]})),
        f'<tool>[{{"name": "cd", "args": {{"folder": {nested}}}}}]</tool>',
        '<tool>[{"name": {"ls": 1}, "args": {}}]</tool>',
        '<tool>[{"name": "cd", "args": {"folder": null}}]</tool>',
        '<tool>[{"name": "tail", "args": {"file_name": "x", "lines": 1e300}}]</tool>',
        tool(("x" * 50_000, {})),
    ]
    assert play(env, texts) is None
    assert env.score().reward == 0.0


def test_no_arguments_make_any_tool_raise_or_hang() -> None:
    deep: list = []
    for _ in range(20):
        deep = [deep]
    values = [
        0, -1, True, None, 10**4200, -(10**9), 10**18, 1e308, 5e-324, "", "a", "x" * 50_000,
        "1e999999999", "²", "..", "/" * 999, [], [1], deep, {}, {"title": 1}, [[1, 2]],
        ["a"] * 999, ["driver"], "2024-02-30", "1/3",
    ]  # fmt: skip
    source = random.Random(0)
    started = time.perf_counter()
    for category in ("base", "long_context"):
        for payload in list(library().tasks[category].values())[::20]:
            on = library().session(payload)
            for name in payload.tools:
                wanted = library().document(payload, name)["parameters"]["properties"]
                on.run(Call(name, {key: source.choice(values) for key in wanted})).text.encode()
            scoring.state_differences(on.instances, library().session(payload).instances)
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    ("release", "of_age", "a_day_younger"),
    [("v3", "2007-06-08", "2007-06-09"), ("v4", "2008-03-23", "2008-03-24")],
)
def test_today_is_fixed(release: str, of_age: str, a_day_younger: str) -> None:
    on = session("TravelAPI", {"user_first_name": "A", "user_last_name": "B"}, release=release)
    birthdays = {
        birthday: run(
            on,
            "verify_traveler_information",
            first_name="A",
            last_name="B",
            date_of_birth=birthday,
            passport_number="US1",
        )
        for birthday in (of_age, a_day_younger)
    }
    assert birthdays[of_age] == '{"verification_status": true}'
    assert json.loads(birthdays[a_day_younger])["verification_status"] is False


def test_long_context_tables_are_not_shared() -> None:
    first, second = session("TravelAPI", long_context=True), session("TravelAPI", long_context=True)
    before = run(second, "get_all_credit_cards")
    card = next(iter(first.instances["TravelAPI"].credit_card_list.values()))
    card["balance"] = -1
    assert run(second, "get_all_credit_cards") == before
    assert run(session("TravelAPI", long_context=True), "get_all_credit_cards") == before


@pytest.mark.usefixtures("_hasty_threads")
def test_the_weather_of_long_context_is_not_mixed_between_threads() -> None:
    alone = session("VehicleControlAPI", long_context=True)
    expected = [run(alone, "get_outside_temperature_from_google") for _ in range(50)]
    seen: list[list[str]] = []

    def work() -> None:
        on = session("VehicleControlAPI", long_context=True)
        seen.append([run(on, "get_outside_temperature_from_google") for _ in range(50)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 4


@pytest.mark.usefixtures("_hasty_threads")
def test_many_threads_play_the_same_tasks() -> None:
    suite = Bfcl(max_turns=99)
    tasks = all_tasks(suite)[:60]
    rewards: list[float] = []

    def work() -> None:
        for each in tasks:
            env = suite.create(each)
            play(env, suite.demonstration(each))
            rewards.append(env.score().reward)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == [1.0] * 240


@pytest.mark.parametrize("release", ["v3", "v4"])
def test_no_ground_truth_call_fails(release: str) -> None:
    for tasks in library(release).tasks.values():
        for payload in tasks.values():
            on = library(release).session(payload)
            assert all(on.run(call).ok for turn in payload.turns for call in turn.truth), payload.id


@pytest.mark.parametrize(("release", "expected"), [("v3", 110), ("v4", 102)])
def test_first_turns_that_leave_the_public_state_alone(release: str, expected: int) -> None:
    unchanged = 0
    for payload in library(release).tasks["base"].values():
        on = library(release).session(payload)
        for call in payload.turns[0].truth:
            on.run(call)
        unchanged += not scoring.state_differences(
            on.instances, library(release).session(payload).instances
        )
    assert unchanged == expected


def test_a_task_that_only_reads_is_told_by_its_response() -> None:
    lazy, right = environment("base_101"), environment("base_101")
    play(lazy, [tool(("get_current_time", {})), "<TASK_FINISHED>"])
    play(right, Bfcl().demonstration(task("base_101")))
    shares = {"state_match": 1.0, "calls_match": 0.0}
    assert lazy.score().parts == {
        "state": 1.0, "response": 0.0, "turns_passed": 0.0, "finished": 1.0, **shares,
    }  # fmt: skip
    assert right.score().reward == 1.0


def test_results_are_worded_as_officially() -> None:
    assert result_text("plain") == "plain"
    assert result_text({"a": [1, None, "ü"]}) == '{"a": [1, null, "\\u00fc"]}'
    assert result_text({"a": {1}}) == "{'a': {1}}"
    assert result_text(["a", True]) == "['a', True]"
    assert result_text(None) == "None"
