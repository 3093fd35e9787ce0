"""The viewer in a headless Chromium: click, type, look at what is on the page.

    python -m pytest -m browser tests/viewer/test_browser.py

The run is tests/viewer/demo.py's; with JAXGRPO_DEMO_RUN naming the folder of a run of
configs/cpu_demo.py, that one is opened too. JAXGRPO_CHROMIUM names the browser (default: `chromium`
on the path, else Playwright's own).
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from jaxgrpo.run.records import EpisodeFigures, to_line, with_figures, write_records
from jaxgrpo.types import Difference
from tests.viewer.conftest import serving
from tests.viewer.demo import ODD, record, write_demo

pytestmark = pytest.mark.browser


def texts(page, selector):
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def test_the_overview_shows_values_on_hover_and_opens_a_steps_episodes(page, tmp_path) -> None:
    with serving([write_demo(tmp_path / "demo")], tmp_path / "cache") as server:
        page.goto(server.url)
        assert texts(page, "figcaption h2")[:3] == [
            "Evaluations",
            "Reward",
            "Pass rate in training",
        ]
        assert texts(page, ".facts > div")[0] == "pass@1 on train 43.8 % → 50.0 %"
        reward = page.locator("#train-reward_mean svg.chart")
        box = reward.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 16, box["y"] + 40)
        assert page.locator(".tip").inner_text().startswith("step 4\n0.5")
        page.mouse.click(box["x"] + box["width"] - 16, box["y"] + 40)
        page.wait_for_url("**/episodes?*step_from=4*")
        assert texts(page, "[role=status]") == ["16 episodes"]


def test_runs_lie_over_one_another_and_are_smoothed(page, two_runs) -> None:
    page.goto(two_runs.url + "/overview")
    assert texts(page, ".cards tbody tr") == [
        "demo 43.8 % → 50.0 % 0.5 50 % 64 4 3",
        "other 43.8 % → 50.0 % 0.5 50 % 32 4 2",
    ]
    figure = page.locator("#train-reward_mean")
    assert texts(page, "#train-reward_mean .legend li") == ["demo", "other"]
    assert figure.locator("path.raw").count() == 0
    page.select_option("select[name=smooth]", "0.6")
    page.wait_for_url("**smooth=0.6**")
    assert page.locator("#train-reward_mean path.raw").count() == 2
    page.select_option("select[name=metric]", "train/kl")
    page.wait_for_url("**metric=train**")
    assert page.locator("figure h2").first.inner_text() == "KL to the reference"


def test_every_curve_links_its_explanation(page, two_runs) -> None:
    page.emulate_media(reduced_motion="reduce")  # no smooth scrolling
    page.goto(two_runs.url + "/overview")
    figures = page.locator(".charts figure")
    assert figures.count() == 6
    for number in range(6):
        assert figures.nth(number).locator("a.why").count() == 1
    page.click("#train-kl a.why")
    page.wait_for_url("**/metrics#metric-train-kl")
    row = page.locator("#metric-train-kl")
    assert "k3 estimate of KL(policy, reference)" in row.inner_text()
    assert row.evaluate("row => row.matches(':target')")
    box, top = row.bounding_box(), page.locator("header.top").bounding_box()
    assert top["height"] <= box["y"] < 900  # in the window, below the header
    row.locator("a:text-is('KL')").click()
    page.wait_for_url("**/metrics#about-kl-grows")
    assert page.locator("h3:target").inner_text() == "KL grows"


def test_a_curve_is_downloaded(page, two_runs) -> None:
    page.goto(two_runs.url + "/overview")
    for kind, begins in (("SVG", b"<svg "), ("PNG", b"\x89PNG")):
        with page.expect_download() as expected:
            page.click(f"#time-rollout_seconds .files a:text-is('{kind}')")
        assert expected.value.suggested_filename.endswith(kind.lower())
        assert Path(expected.value.path()).read_bytes().startswith(begins)


def test_a_run_that_goes_on_appends_by_itself(page, tmp_path) -> None:
    folder = write_demo(tmp_path / "demo")
    with serving([folder], tmp_path / "cache", every=0.1) as server:
        page.goto(server.url)
        page.wait_for_selector("dd:text-is('64')")
        write_records(
            folder / "trajectories" / "train-000006.jsonl.gz",
            [record("files_1", "train", 6, 0, True)],
        )
        page.wait_for_selector("dd:text-is('65')")


def test_the_heat_map_is_filtered_and_opens_before_and_after(page, two_runs) -> None:
    page.goto(two_runs.url + "/r/demo/tasks?split=eval-train")
    assert texts(page, "tbody th a") == [
        "files_1",
        "easy_4",
        "trading_2",
        ODD.replace("\u202e", "U+202E"),
    ]
    assert texts(page, ".heat tbody tr:first-child .cell") == ["0", "100"]
    page.select_option("select[name=solved]", "lost")
    page.wait_for_url("**solved=lost**")
    assert texts(page, ".heat tbody .change") == ["-75"]
    page.select_option("select[name=solved]", "")
    page.wait_for_url(lambda url: "solved" not in url)
    page.select_option("select[name=label]", "Files")
    page.wait_for_url("**label=Files**")
    page.fill("input[name=q] >> nth=1", "temp folder")
    page.press("input[name=q] >> nth=1", "Enter")
    page.wait_for_url("**q=temp**")
    assert texts(page, "tbody th a") == ["files_1"]
    page.click("tbody th a")
    assert page.locator("h1").inner_text().startswith("files_1")


def test_before_and_after_stand_side_by_side_and_arrows_walk_the_steps(page, two_runs) -> None:
    page.goto(two_runs.url + "/r/demo/task?task=files_1")
    assert texts(page, ".side .where") == [
        "eval-train, step 0, sample 0",
        "eval-train, step 4, sample 0",
    ]
    assert texts(page, ".side .verdict") == ["✗ failed", "✓ passed"]
    assert texts(page, ".turn >> nth=0 >> .line") == ["differs: ls(zeal=1)", "differs: ls(a=true)"]
    assert page.locator(".call.changed").count() == 2
    assert "(missing)" in page.locator(".findings .actual").inner_text()
    boxes = [page.locator(".turn >> nth=0 >> .call").nth(n).bounding_box() for n in (0, 1)]
    assert abs(boxes[0]["y"] - boxes[1]["y"]) < 2
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**b_step=0**")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**b_step=4**")
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_url("**a_step=4**")
    page.click(".side >> nth=0 >> .sample:has-text('2')")
    page.wait_for_url("**a_sample=2**")
    page.click(".strip a[title*='train step 2: show as after']")
    page.wait_for_url("**b_split=train&b_step=2**")
    page.click("a[title='show step 4 as before'] >> nth=1")
    page.wait_for_url("**a_split=train&a_step=4**")


def test_two_runs_stand_side_by_side(page, two_runs) -> None:
    page.goto(two_runs.url + "/r/demo/task?task=files_1")
    page.select_option("select[name=a_run]", "other")
    page.wait_for_url("**a_run=other**")
    assert texts(page, ".side h2") == ["Before other", "After demo"]


def test_an_episode_is_read_as_turns_and_as_tokens(page, two_runs) -> None:
    page.goto(two_runs.url + "/r/demo/episode?task=files_1&split=eval-train&step=4&sample=1")
    assert texts(page, ".turn .line") == ["ls(a=true)"]
    assert '"files"' in page.locator(".result pre").inner_text()
    page.keyboard.press("t")
    page.wait_for_url("**view=tokens**")
    assert "".join(page.locator(".tokens .t").all_inner_texts()).startswith(
        "<reasoning>I call ls.</reasoning>"
    )
    first = page.locator(".tokens .t").first
    first.hover()
    readout = page.locator("[data-readout]")
    assert "sampler log-probability -0.01" in readout.inner_text()
    assert "loss mask sampled" in readout.inner_text()
    first.click()
    page.keyboard.press("ArrowRight")
    assert "token 1" in readout.inner_text()
    page.locator(".tokens .t.not").first.hover()
    assert "loss mask not sampled" in readout.inner_text()
    page.select_option("select[name=by]", "weight_versions")
    page.wait_for_url("**by=weight_versions**")
    page.keyboard.press("]")
    page.wait_for_url("**sample=2**")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**step=0**")


def test_ids_are_copied(page, two_runs) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(
        two_runs.url + "/r/demo/episode?task=files_1&split=eval-train&step=4&sample=1&view=tokens"
    )
    page.click("text=Copy ids")
    page.wait_for_selector("text=Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert re.fullmatch(r"\d+( \d+)+", copied)
    assert len(copied.split()) == page.locator(".tokens .t").count()


def test_where_an_episode_was_cut_off_is_marked(page, two_runs) -> None:
    page.goto(
        two_runs.url + "/r/demo/episode?task=files_1&split=eval-train&step=0&sample=3&view=tokens"
    )
    assert page.locator(".truncated").inner_text() == "▮ cut off here"
    assert "its completion tokens ran out" in page.locator("main").inner_text()


def test_a_group_parts_where_its_tokens_differ(page, two_runs) -> None:
    page.goto(two_runs.url + "/r/demo/group?task=files_1&split=train&step=2")
    assert texts(page, ".tree li:first-child .sample") == ["0✓", "1✗", "2✗", "3✗"]
    assert page.locator(".tree .leaf").count() == 4
    assert page.locator("text=No signal").count() == 0
    page.goto(two_runs.url + "/r/demo/group?task=easy_4&split=train&step=2")
    assert "all rewards are 1" in page.locator(".warn").inner_text()
    assert page.locator(".tree .leaf").count() == 1


def test_failures_open_their_examples(page, two_runs) -> None:
    page.goto(two_runs.url + "/r/demo/failures?split=train")
    assert texts(page, "tbody >> nth=0 >> th") == [
        "gibberish",
        "no call",
        "malformed json",
        "wrong arguments",
        "passed",
    ]
    page.click("tbody th a:text-is('malformed json')")
    assert texts(page, "[role=status]") == ["4 episodes"]
    page.click("tbody tr:first-child a")
    assert "not a call:" in page.locator(".turn").first.inner_text()


def test_two_evaluations_are_compared(page, two_runs) -> None:
    page.goto(two_runs.url + "/compare?a_run=demo&b_run=demo")
    # differences 1, -3/4, 0 and 0 of four tasks: 6.25 +- 3.1824 * 71.807 / 2, within 100; of the
    # signs of 1 and 3/4 all four patterns reach 1/4
    assert texts(page, ".big dd") == ["43.8 %", "50.0 %", "+6.2 [-100.0, +100.0]", "1.0000"]
    assert texts(page, ".big dt")[3] == "p, exact sign-flip test"
    assert [texts(page, f".beside section >> nth={n} >> td a") for n in (0, 1)] == [
        ["files_1"],
        [ODD.replace("\u202e", "U+202E")],
    ]
    page.select_option("select[name=a_split]", "train")
    page.wait_for_url("**a_split=train**")
    page.select_option("select[name=b_run]", "other")
    page.wait_for_url("**b_run=other**")
    page.click(".beside section >> nth=0 >> td a >> nth=0")
    assert page.locator(".side").count() == 2


def test_search_filters_and_the_address_hold_the_whole_state(page, two_runs) -> None:
    page.goto(two_runs.url + "/r/demo/episodes")
    page.keyboard.press("/")
    page.keyboard.type("zeal")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=zeal**")
    assert texts(page, "[role=status]") == ["6 episodes"]
    assert page.locator(".snippet").count() == 6
    assert set(texts(page, ".snippet mark")) == {"zeal"}
    assert 'args": {"zeal": 1}' in texts(page, ".snippet")[0]
    page.select_option("select[name=split]", "train")
    page.wait_for_url("**split=train**")
    page.fill("input[name=step_from]", "4")
    page.press("input[name=step_from]", "Enter")
    page.wait_for_url("**step_from=4**")
    assert texts(page, "[role=status]") == ["1 episode"]
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    assert texts(page, "[role=status]") == ["1 episode"]
    assert page.input_value("input[name=step_from]") == "4"
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/episode?**")
    assert "q=zeal" in page.url
    assert "zeal" in texts(page, ".turn mark")
    page.go_back()
    assert texts(page, "[role=status]") == ["1 episode"]


@pytest.mark.parametrize(
    ("name", "value", "count"),
    [
        ("passed", "no", 34),
        ("failure", "gibberish", 11),
        ("stop", "token_limit", 11),
        ("label", "Maths", 16),
        ("tool", "add", 16),
        ("task", "trading_2", 16),
        ("reward_from", "0.5", 30),
    ],
)
def test_each_filter_narrows(page, two_runs, name, value, count) -> None:
    page.goto(two_runs.url + "/r/demo/episodes")
    assert texts(page, "[role=status]") == ["64 episodes"]
    field = page.locator(f".filters [name={name}]")
    if field.evaluate("field => field.tagName") == "SELECT":
        field.select_option(value)
    else:
        field.fill(value)
        field.press("Enter")
    page.wait_for_url(f"**{name}={value}**")
    assert texts(page, "[role=status]") == [f"{count} episodes"]


def test_episodes_and_tasks_are_sorted(page, two_runs) -> None:
    page.goto(two_runs.url + "/r/demo/episodes?task=files_1&split=train")
    page.select_option("select[name=sort]", "longest")
    page.wait_for_url("**sort=longest**")
    tokens = [int(text) for text in texts(page, "tbody td:nth-child(7)")]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > tokens[-1]
    page.goto(two_runs.url + "/r/demo/tasks?split=eval-train")
    assert texts(page, ".heat tbody .change") == ["+100", "0", "0", "-75"]
    page.select_option("select[name=sort]", "worst")
    page.wait_for_url("**sort=worst**")
    assert texts(page, ".heat tbody .change") == ["-75", "0", "0", "+100"]


def test_keys_walk_rows_and_show_help(page, two_runs) -> None:
    page.goto(two_runs.url + "/r/demo/episodes?task=easy_4")
    focused = lambda: page.evaluate("document.activeElement.closest('tr')?.rowIndex")
    for key, row in (("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        assert focused() == row
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


def recorded(folder):
    """A trained episode that failed, as the recorder writes it, and its task's ground truth."""
    made = record("files_1", "train", 8, 0, False)
    differs = Difference("state", "turn 0: Bot.list", "[]", "['ZETA']")
    score = dataclasses.replace(made.trajectory.score, notes={}, differences=(differs,))
    trajectory = dataclasses.replace(made.trajectory, score=score)
    n = len(trajectory.completion_ids_C)
    per_token = {
        "train_logprobs": [-0.5] * n,
        "old_logprobs": [-0.75] * n,
        "reference_logprobs": [-0.5] * n,
        "entropies": [0.7] * n,
        "loss_weights": 0.125,
    }
    line = to_line(dataclasses.replace(made, trajectory=trajectory))
    line = with_figures(line, EpisodeFigures(-1.25, per_token))
    (folder / "trajectories" / "train-000008.jsonl").write_text(line + "\n")
    due = {"name": "ls", "arguments": {"a": True}}
    truth = {"task": "files_1", "ground_truth": [due]}
    (folder / "ground_truth.jsonl").write_text(json.dumps(truth) + "\n")


def test_the_figures_of_a_trained_episode_are_shown_on_its_tokens(page, tmp_path) -> None:
    folder = write_demo(tmp_path / "demo")
    recorded(folder)
    with serving([folder], tmp_path / "cache") as server:
        page.goto(server.url + "/r/demo/episode?task=files_1&split=train&step=8&sample=0")
        assert "advantage -1.25" in texts(page, ".facts")[0]
        page.click(".tabs a:text-is('Tokens')")
        shown = page.locator("select[name=by] option")
        assert shown.evaluate_all("all => all.map(one => one.value)") == [
            "mask",
            "sampler_logprobs",
            "train_logprobs",
            "ratio",
            "kl",
            "gap",
            "entropies",
            "advantage",
            "loss_weights",
            "weight_versions",
        ]
        page.locator(".tokens .t").first.hover()
        readout = page.locator("[data-readout]").inner_text()
        figures = [
            "loss mask sampled", "sampler log-probability -0.01", "trainer log-probability -0.5",
            "ratio of trainer to old policy 1.284", "KL to the reference",
            "gap between trainer and sampler -0.74", "entropy 0.7", "advantage -1.25",
            "loss weight 0.125", "old policy's log-probability -0.75",
            "reference log-probability -0.5",
        ]  # fmt: skip
        places = [readout.find(figure) for figure in figures]
        assert -1 not in places, readout
        assert places == sorted(places)
        for width in (1440, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") == width
            fits = "box => box.scrollWidth <= box.clientWidth"
            assert page.locator("[data-readout]").evaluate(fits)
        for by, first in (
            ("ratio", "s4"),
            ("gap", "n8"),
            ("advantage", "n5"),
            ("loss_weights", "s8"),
        ):
            page.select_option("select[name=by]", by)
            page.wait_for_url(f"**by={by}")
            assert first in page.locator(".tokens .t").first.get_attribute("class").split()


def test_the_ground_truth_stands_beside_what_the_check_found(page, tmp_path) -> None:
    folder = write_demo(tmp_path / "demo")
    recorded(folder)
    with serving([folder], tmp_path / "cache") as server:
        page.goto(server.url + "/r/demo/tasks?truth=1")
        assert texts(page, "tbody th a") == ["files_1"]
        page.goto(server.url + "/r/demo/episode?task=files_1&split=train&step=8&sample=0")
        assert texts(page, ".truth li") == ['ls({"a": true})']
        found = ["state: turn 0: Bot.list", "[]", "['ZETA']"]
        assert texts(page, ".findings tbody tr:first-child > *") == found
        page.click("a:text-is('before and after')")
        assert texts(page, ".truth li") == ['ls({"a": true})']  # once, for both sides
        assert found[0] in texts(page, ".findings tbody th")
        page.goto(server.url + "/r/demo/group?task=files_1&split=train&step=8")
        assert "-1.25" in texts(page, "tbody td")
        page.goto(server.url + "/r/demo/episode?task=easy_4&split=train&step=4&sample=0")
        assert texts(page, ".truth") == []


@pytest.mark.skipif(
    "JAXGRPO_DEMO_RUN" not in os.environ,
    reason="JAXGRPO_DEMO_RUN names no run of configs/cpu_demo.py",
)
def test_a_real_run_of_the_demo(page, tmp_path) -> None:
    folder = Path(os.environ["JAXGRPO_DEMO_RUN"])
    with serving([folder], tmp_path) as server:
        page.goto(server.url)
        assert "Evaluations" in texts(page, "figcaption h2")
        page.click("nav a:text-is('Tasks')")
        page.click("nav a:text-is('eval-train')")
        page.wait_for_url("**split=eval-train**")
        page.select_option("select[name=solved]", "gained")
        page.wait_for_url("**solved=gained**")
        page.click("tbody tr:first-child th a")
        assert texts(page, ".side .verdict") == ["✗ failed", "✓ passed"]
        assert "multi_turn_base" in page.locator("h1").inner_text()
        page.click("text=the whole episode >> nth=1")
        page.wait_for_url("**/episode?**")
        page.keyboard.press("t")
        page.wait_for_url("**view=tokens**")
        assert page.locator(".tokens .t").first.inner_text().strip() in (
            "<reasoning",
            "<reasoning>",
            "<",
        )
        for name in ("Failures", "Compare", "Episodes"):
            page.click(f"nav a:text-is('{name}')")
            assert page.locator("h1").count() == 1
        page.goto("about:blank")  # the page asks for news, which a server that ended does not give
