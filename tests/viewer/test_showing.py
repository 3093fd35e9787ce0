"""How conversations, tokens, texts and curves are laid out: pure functions; and the terminal's
view."""

import io
import json
import re
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from jaxgrpo.viewer import charts, curves, pictures, text, tokens, turns
from jaxgrpo.viewer.episode import Call, Episode, Message, from_fields
from jaxgrpo.viewer.runs import open_runs
from jaxgrpo.viewer.site import Site
from jaxgrpo.viewer.visible import found, plain, snippet, visible
from tests.viewer.demo import ODD

TWO_CALLS = (
    "<reasoning>Both.</reasoning>\n"
    '<tool>[{"name": "ls", "args": {"a": true}}, {"name": "cd", "args": {"folder": '
    '"x"}}]</tool>'
)
MESSAGES = (
    Message("system", "tools"),
    Message("user", "go"),
    Message("assistant", TWO_CALLS),
    Message("system", "results"),
    Message("assistant", "<TASK_FINISHED>"),
)


def episode(**changes):
    calls = (
        Call("ls", '{"a": true}', "files", True),
        Call("cd", '{"folder": "x"}', "no such folder", False),
    )
    return Episode(
        **(
            {
                "task": "t",
                "split": "s",
                "step": 1,
                "sample": 0,
                "messages": MESSAGES,
                "calls": calls,
                "turns": 2,
            }
            | changes
        )
    )


def test_calls_go_to_the_turn_that_asked_for_them() -> None:
    first, second = turns.turns(episode())
    assert [call.signature for call in first.calls] == ["ls(a=true)", 'cd(folder="x")']
    assert [call.made.ok for call in first.calls] == [True, False]
    assert [piece.kind for piece in first.pieces] == ["reasoning", "calls"]
    assert [message.content for message in first.answers] == ["results"]
    assert (second.said, second.calls) == ("<TASK_FINISHED>", ())


def test_a_call_that_was_not_carried_out_and_one_that_no_text_asks_for() -> None:
    first, _ = turns.turns(episode(calls=(Call("ls", '{"a": true}', "files", True),)))
    assert [call.made is None for call in first.calls] == [False, True]
    (only, last) = turns.turns(episode(calls=(Call("rm", "oops", "gone", True),)))
    assert [call.made is None for call in only.calls] == [True, True]
    assert [call.signature for call in last.calls] == ["rm(oops)"]


@pytest.mark.parametrize(
    "said", ["<tool>[{]</tool>", "<tool>[", '<tool>"x"</tool>', "<tool>[1]</tool>"]
)
def test_what_is_no_call_is_shown_as_it_is(said) -> None:
    messages = (Message("assistant", said),)
    (turn,) = turns.turns(episode(messages=messages, calls=(), turns=1))
    assert [call.name for call in turn.calls] == [""]


def test_native_tool_calls_are_calls() -> None:
    messages = (
        Message(
            "assistant",
            'Sure.\n<tool_call>\n{"name": "ls", "arguments": {"a": true}}\n</tool_call>',
        ),
    )
    (turn,) = turns.turns(
        episode(messages=messages, turns=1, calls=(Call("ls", '{"a": true}', "files", True),))
    )
    assert [piece.kind for piece in turn.pieces] == ["text", "calls"]
    assert turn.calls[0].made.result == "files"


def test_differences_are_marked_word_by_word() -> None:
    left, right = turns.differences('ls(a="x")', 'ls(a="y")')
    assert [(part.text, part.changed) for part in left] == [
        ('ls(a="', False),
        ("x", True),
        ('")', False),
    ]
    assert "".join(part.text for part in right) == 'ls(a="y")'
    long = "word " * 5000
    assert turns.differences(long, "x")[0] == [turns.Part(long, False)]


def test_findings_of_a_score() -> None:
    notes = {
        "turn 0": "the state differs",
        "turn 0: Bot.list": "2: TSLA, expected (absent); 3: A, expected B",
        "turn 0: missing results": '{"a": 1}',
    }
    rows = turns.findings(episode(notes=notes))
    assert [(row.where, row.actual, row.expected, row.note) for row in rows] == [
        ("turn 0", "", "", "the state differs"),
        ("turn 0: Bot.list: 2", "TSLA", "(absent)", ""),
        ("turn 0: Bot.list: 3", "A", "B", ""),
        ("turn 0: missing results", "(missing)", '{"a": 1}', ""),
    ]


def test_differences_of_a_check_are_shown_by_check_and_place() -> None:
    found = {"check": "state", "where": "turn 0: Bot.list", "actual": "A; B: C", "expected": "B"}
    rows = turns.findings(episode(check={"differences": [found, "odd", {}]}))
    assert [(row.where, row.actual, row.expected) for row in rows] == [
        ("state: turn 0: Bot.list", "A; B: C", "B"),
        ("", "", ""),
    ]


def test_hidden_characters_are_made_visible() -> None:
    shown = visible("a\x1b[31m\u202e<script>\ud800\u200b")
    assert "<script>" not in shown
    for mark in ("\u241b", "U+202E", "U+D800", "U+200B", "&lt;script&gt;"):
        assert mark in shown
    assert plain("a\x1b[2J\u202eb\nc") == "a\u241b[2J<U+202E>b\nc"


def test_long_texts_are_cut_and_say_so() -> None:
    assert "950,000 more characters" in visible("x" * 1_000_000)


def test_words_that_were_searched_for_are_marked() -> None:
    assert (
        found("An error, <b>Err</b>", ["err"])
        == "An <mark>err</mark>or, &lt;b&gt;<mark>Err</mark>&lt;/b&gt;"
    )


def test_a_snippet_is_what_stands_around_a_hit() -> None:
    told = "a " * 100 + "the user\n  name is <b> " + "z " * 200
    shown = snippet(told, ["user name", "nothing"])
    assert shown.startswith("… a a")
    assert "the <mark>user name</mark> is &lt;b&gt; z z" in shown
    assert shown.endswith("z …")
    assert len(shown) < 260
    whole = snippet("syllable " * 40 + "hit " + "syllable " * 40, ["hit"])
    assert set(whole.split()) == {"…", "syllable", "<mark>hit</mark>"}
    assert snippet("the whole", ["whole"]) == "the <mark>whole</mark>"
    assert snippet("sword " * 20 + "of a word", ["word"]).endswith("of a <mark>word</mark>")
    assert snippet("my sword", ["word"]) == "my s<mark>word</mark>"
    assert snippet(told, ["absent"]) is None
    assert snippet(told, []) is None


def test_tokens_show_what_is_recorded_and_what_follows_from_it() -> None:
    figures = {
        "sampler_logprobs": [-0.5, 0.0, -2.0],
        "train_logprobs": [-0.4, 0.0, -2.5],
        "old_logprobs": [-0.45, 0, -2.2],
        "reference_logprobs": [-0.4, 0, -2.0],
    }
    one = episode(
        completion_ids=[5, 6, 7],
        sampled=[True, False, True],
        weight_versions=[3, -1, 3],
        figures=figures,
        advantage=-0.5,
    )
    assert tokens.available(one) == [
        "mask",
        "sampler_logprobs",
        "train_logprobs",
        "ratio",
        "kl",
        "gap",
        "advantage",
        "weight_versions",
    ]
    listed = tokens.tokens(one, ["a", "b", "c"], "gap")
    assert [token.shade for token in listed] == [2, 0, -8]
    last = listed[2].figures
    assert last["gap"] == -0.2  # the old policy's, which sampled
    assert last["ratio"] == pytest.approx(0.7408182)
    assert last["kl"] == pytest.approx(0.1487213)
    assert listed[1].figures == {"mask": 0}


def test_with_one_step_on_a_batch_the_gap_is_the_trainers() -> None:
    figures = {"sampler_logprobs": [-0.5], "train_logprobs": [-0.4]}
    one = episode(completion_ids=[5], sampled=[True], figures=figures)
    assert tokens.available(one) == ["mask", "sampler_logprobs", "train_logprobs", "gap"]
    assert tokens.figures(one, 0)["gap"] == 0.1


def test_one_number_is_the_figure_of_all_sampled_tokens_and_null_of_none() -> None:
    line = {"sampled": [1, 0, 1], "loss_weights": 0.125, "train_logprobs": [-0.5, 0, None]}
    one = from_fields(line | {"completion_ids": [5, 6, 7]})
    assert [tokens.figures(one, place).get("loss_weights") for place in range(3)] == [
        0.125,
        None,
        0.125,
    ]
    assert "train_logprobs" not in tokens.figures(one, 2)


@pytest.mark.parametrize(("advantage", "shade"), [(0.0, 0), (1.0, 4), (-0.5, -2), (-7.0, -8)])
def test_an_advantage_is_colored_by_its_size(advantage, shade) -> None:
    one = episode(completion_ids=[1], sampled=[True], advantage=advantage)
    assert [token.shade for token in tokens.tokens(one, ["a"], "advantage")] == [shade]


def test_tokens_without_figures_and_with_short_lists() -> None:
    assert tokens.available(episode(completion_ids=[1])) == []
    listed = tokens.tokens(episode(completion_ids=[1, 2], sampled=[True]), ["a", "b"], "mask")
    assert [token.shade for token in listed] == [3, 0]


def test_a_chart_is_xml_and_breaks_where_a_value_is_not_finite() -> None:
    curve = charts.Curve(
        "a<b", [(1, 0.1), (2, None), (3, 0.3), (4, 0.4)], 0, [(1, 0.0, 0.2), (3, 0.2, 0.5)]
    )
    drawing = charts.svg(charts.Chart('T"<', [curve], "%"), 0.5)
    root = ET.fromstring(str(drawing))
    (line,) = [each for each in root.iter() if each.get("class") == "c0 line"]
    assert len(re.findall("M", line.get("d"))) == 2
    assert root.get("aria-label") == 'T"<. a<b: 10.0 % at step 1, 40.0 % at step 4'


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0, None)],
        [(5, 1.0)],
        [(1, 0.0), (2, 0.0)],
        [(1, -1e300), (2, 1e300)],
        [(1, 1e-12), (2, 2e-12)],
    ],
)
def test_a_chart_of_little_is_drawn(points) -> None:
    ET.fromstring(str(charts.svg(charts.Chart("T", [charts.Curve("a", points, 0)]))))


def test_a_smoothed_curve_and_its_points_stay_in_the_box() -> None:
    points = [(step, 10.0 if step == 5 else 0.1) for step in range(10)]
    root = ET.fromstring(str(charts.svg(charts.Chart("T", [charts.Curve("a", points, 0)]), 0.9)))
    paths = {each.get("class"): each.get("d") for each in root.iter() if each.get("d")}
    assert paths.keys() == {"c0 raw", "c0 line"}
    for path in paths.values():
        heights = [float(place.split()[1]) for place in re.findall(r"[\d.]+ [-\d.]+", path)]
        assert charts.TOP <= min(heights) <= max(heights) <= charts.HEIGHT - charts.BOTTOM


def test_few_points_are_not_smoothed() -> None:
    curve = charts.Curve("a", [(0, 0.4), (120, 0.9)], 0)
    for few, count in ((True, 1), (False, 2)):
        drawing = charts.svg(charts.Chart("T", [curve], few=few), 0.9)
        assert drawing.count("<path") == count


def test_a_sheet_of_charts_has_titles_and_a_legend() -> None:
    both = [charts.Curve("a<b", [(1, 0.1), (2, 0.3)], 0), charts.Curve("c", [(1, 0.2)], 8)]
    drawing = pictures.sheet([charts.Chart("T&U", both), charts.Chart("V", both[:1], "%")])
    root = ET.fromstring(drawing)
    said = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in said if text.isalpha() or "&" in text or "<" in text] == [
        "T&U",
        "a<b",
        "c",
        "V",
    ]
    # the ninth color is the second again, dashed
    dashed = [each.get("class") for each in root.iter() if each.get("stroke-dasharray") == "6 3"]
    assert dashed == ["c1 line", "c1 line"]
    pytest.importorskip("resvg_py")
    assert pictures.png(drawing)[:8] == b"\x89PNG\r\n\x1a\n"


def test_smoothing_starts_without_bias_and_thinning_keeps_spikes() -> None:
    assert charts.smoothed([(1, 2.0), (2, 2.0), (3, None)], 0.9) == [
        (1, pytest.approx(2.0)),
        (2, pytest.approx(2.0)),
        (3, None),
    ]
    assert charts.smoothed([(1, 0.0), (2, 1.0)], 0.5)[1] == (2, pytest.approx(2 / 3))
    points = [(step, 0.0) for step in range(10_000)]
    points[7777] = (7777, 9.0)
    thin = charts.thinned(points)
    assert len(thin) <= 2 * charts.MOST_POINTS
    assert (7777, 9.0) in thin


def said(view, *arguments):
    console = Console(file=io.StringIO(), width=80, color_system=None)
    view(*arguments, console=console)
    return console.file.getvalue()


def test_the_summary_in_the_terminal(demo) -> None:
    shown = said(text.summary, demo)
    assert max(map(len, shown.splitlines())) <= 80
    for part in (
        "64 episodes of 4 tasks",
        "evaluation of train at step 4: 50.0 % [30.0 %, 70.0 %]",
        "malformed json",
        "files_1 +100",
    ):
        assert part in shown


def test_an_episode_in_the_terminal(demo) -> None:
    shown = said(text.episode, demo, "files_1", "eval-train", [0], 0)
    assert "✗ failed" in shown
    assert "▸ ls(zeal=1)" in shown
    assert "Error: unexpected keyword argument 'zeal'" in shown


def test_before_and_after_in_the_terminal(demo) -> None:
    shown = said(text.episode, demo, "files_1", None, [0, 4], 0)
    assert max(map(len, shown.splitlines())) <= 80
    (calls,) = [line for line in shown.splitlines() if "≠" in line]
    assert calls.index("ls(zeal=1)") < 40 < calls.index("ls(a=true)")


def test_hostile_names_do_not_reach_the_terminal(demo) -> None:
    shown = said(text.episode, demo, ODD, None, [None], 0)
    assert "\u202e" not in shown
    assert "<U+202E>" in shown


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("files", None, [None], 0), "did you mean one of: files_1"),
        (("files_1", None, [7], 0), "it was at: eval-train: 0, 4"),
        (("files_1", None, [4], 9), "there are: 0, 1, 2, 3"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(demo, arguments, why) -> None:
    with pytest.raises(LookupError, match=why):
        text.episode(demo, *arguments)


def test_curves_of_a_former_version_are_found(tmp_path) -> None:
    before, now = (
        f'{{"step": {step}, "train/clip_{word}": {step / 4}}}\n'
        for step, word in ((1, "share"), (2, "fraction"))
    )
    for name, lines in (("now", now), ("before", before), ("resumed", before + now)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    names = ("now", "before", "resumed")
    runs = open_runs([tmp_path / name for name in names], tmp_path / "cache")
    for run in runs:
        run.index.refresh()
    with Site(runs).opened() as opened:
        named = list(zip(names, opened, strict=True))
        ((_, chart),) = curves.headline(named)
    assert [(each.name, each.points) for each in chart.curves] == [
        ("now", [(2, 0.5)]),
        ("before", [(1, 0.25)]),
        ("resumed", [(1, 0.25), (2, 0.5)]),
    ]


def test_a_run_has_one_color_in_all_curves(tmp_path) -> None:
    """Also where another run lacks the metric."""
    lines = {
        "a": {"train/kl": 0.1},
        "b": {"train/kl": 0.1, "train/entropy": 0.2},
    }
    evaluations = [{"eval/split": split, "eval/pass_rate": 0.5} for split in ("train", "test")]
    for name, figures in lines.items():
        (tmp_path / name).mkdir()
        rows = [{"step": 1} | each for each in (figures, *evaluations)]
        metrics = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(metrics)
    runs = open_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "cache")
    for run in runs:
        run.index.refresh()
    with Site(runs).opened() as opened:
        shown = curves.headline([(run.name, db) for run, db in zip(runs, opened, strict=True)])
    pens = {chart.title: [(c.name, c.pen, c.style) for c in chart.curves] for _, chart in shown}
    assert pens == {
        "Evaluations": [("a test", 0, 0), ("a train", 0, 1), ("b test", 1, 0), ("b train", 1, 1)],
        "KL to the reference": [("a", 0, 0), ("b", 1, 0)],
        "Entropy": [("b", 1, 0)],
    }


def test_each_evaluated_suite_has_a_color_of_its_own(tmp_path) -> None:
    rows = [
        {"step": 1, "eval/split": split, "eval/pass_rate": 0.5}
        for split in ("train", "aime-24", "test", "math")
    ]
    metrics = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(metrics)
    (run,) = open_runs([tmp_path / "run"], tmp_path / "cache")
    run.index.refresh()
    with run.index.connect() as db:
        ((_, chart),) = curves.headline([("run", db)])
    pens = {curve.name: curve.pen for curve in chart.curves}
    assert pens == {"test": 0, "train": 1, "aime-24": 2, "math": 3}
