"""In a headless Chromium: what episodes say never acts, exports open from disk, pages fit and can
be used by all.

    python -m pytest -m browser tests/viewer/test_browser_safety.py

JAXGRPO_AXE names the file axe.min.js of npm's axe-core.
"""

import os
from pathlib import Path
from urllib.parse import quote

import pytest

from jaxgrpo.run.records import write_records
from jaxgrpo.viewer.__main__ import main
from tests.viewer.conftest import serving
from tests.viewer.demo import record, with_content, write_demo
from tests.viewer.test_server import HOSTILE

pytestmark = pytest.mark.browser
WIDTHS = {"wide": (1440, 900), "laptop": (1024, 768), "phone": (390, 844)}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "demo"
    base = record("files_1", "train", 2, 0, True)
    names = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    write_records(
        folder / "trajectories" / "train-000002.jsonl.gz",
        [with_content(base, text, name) for text, name in zip(HOSTILE, names, strict=True)],
    )
    with serving([folder], tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_no_script_of_an_episode_runs(page, hostile, number) -> None:
    page.add_init_script("window.alert = () => { document.title = 'owned'; }")
    name = quote(HOSTILE[number].encode("utf-8", "replace").decode())
    place = f"task={name}&split=train&step=2&sample=0"
    for path in (
        f"episode?{place}",
        f"episode?{place}&view=tokens",
        f"group?{place}",
        f"task?task={name}",
        "episodes",
        "tasks",
        f"raw?{place}",
    ):
        page.goto(f"{hostile.url}/r/demo/{path}")
        assert page.title() != "owned"
        assert (
            page.locator(
                "main img, main svg:not(.chart):not(.legend svg), main "
                "script:not([type='application/json'])"
            ).count()
            == 0
        )
        if path.startswith("episode?") and "view" not in path:
            shown = page.locator("main > .message.user pre").inner_text()
            assert (
                HOSTILE[number][:8].replace("\x1b", "\u241b").replace("\ud800", "U+D800") in shown
            )


def test_no_script_of_an_episode_runs_in_an_export(page, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "cache"))
    page.add_init_script("window.alert = () => { document.title = 'owned'; }")
    base = record("files_1", "train", 2, 0, False)
    records = [with_content(base, text, f"task {n}") for n, text in enumerate(HOSTILE)]
    write_records(tmp_path / "run" / "trajectories" / "train-000002.jsonl.gz", records)
    for out in (tmp_path / "out.html", tmp_path / "out"):
        assert main([str(tmp_path / "run"), "--export", str(out)]) == 0
    for path in (tmp_path / "out.html", *(tmp_path / "out").glob("*.html")):
        page.goto(path.as_uri())
        assert page.title() != "owned"
        assert page.locator("main img").count() == 0


def test_the_exported_page_opens_from_disk(page, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "cache"))
    assert main([str(write_demo(tmp_path / "demo")), "--export", str(tmp_path / "out.html")]) == 0
    page.goto((tmp_path / "out.html").as_uri())
    assert page.locator("section.part").count() > 8
    page.locator("svg.chart").nth(1).hover()
    assert page.locator(".tip").inner_text().startswith("step ")
    assert page.locator("text=differs: ").count() >= 2
    page.click("#train-kl a.why")
    assert page.locator("#metric-train-kl").evaluate("row => row.matches(':target')")


def test_the_exported_folder_opens_from_disk(page, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "cache"))
    assert main([str(write_demo(tmp_path / "demo")), "--export", str(tmp_path / "out")]) == 0
    page.goto((tmp_path / "out" / "overview.html").as_uri())
    page.click("#train-kl a.why")
    assert page.locator("#metric-train-kl").evaluate("row => row.matches(':target')")
    page.click("nav a:text-is('Tasks')")
    page.click("tbody th a:text-is('files_1')")
    assert page.locator(".call.changed").count() == 2
    page.click("text=the whole episode >> nth=1")
    assert page.locator(".turn").count() == 2


PAGES = {
    "overview": "/overview",
    "tasks": "/r/demo/tasks?split=eval-train",
    "episodes": "/r/demo/episodes?q=zeal",
    "task": "/r/demo/task?task=files_1",
    "episode": "/r/demo/episode?task=files_1&split=eval-train&step=0&sample=3",
    "tokens": "/r/demo/episode?task=files_1&split=eval-train&step=0&sample=0"
    "&view=tokens&by=sampler_logprobs",
    "group": "/r/demo/group?task=files_1&split=train&step=2",
    "failures": "/r/demo/failures",
    "compare": "/compare?a_run=demo&b_run=demo",
    "metrics": "/metrics",
}


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_the_window(page, two_runs, width) -> None:
    page.set_viewport_size(dict(zip(("width", "height"), WIDTHS[width], strict=True)))
    for path in PAGES.values():
        page.goto(two_runs.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0], path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_serious_hinders_access(page, two_runs, name, scheme) -> None:
    axe = Path(os.environ.get("JAXGRPO_AXE", "node_modules/axe-core/axe.min.js"))
    if not axe.exists():
        pytest.skip("axe-core is not there: npm install axe-core, or name it in JAXGRPO_AXE")
    page.emulate_media(color_scheme=scheme)
    page.goto(two_runs.url + PAGES[name])
    page.evaluate(axe.read_text())  # the page's own policy would not load it
    found = page.evaluate(
        "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']})"
    )
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [n["html"][:150] for n in v["nodes"][:4]]) for v in serious] == []
