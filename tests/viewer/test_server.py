"""The server: every page answers, whoever should not ask is refused, and bad input is shown or
named."""

import gzip
import json
import re
import time
from urllib.parse import quote

import pytest

from jaxgrpo.run.records import write_records
from tests.viewer.conftest import serving
from tests.viewer.demo import ODD, record, with_content, write_demo

TASK = quote(ODD)
PAGES = [
    "/overview",
    "/overview?smooth=0.9&metric=train/kl",
    "/compare",
    "/metrics",
    "/r/demo/tasks",
    "/r/demo/tasks?split=eval-train&solved=gained&sort=worst&label=Files&q=temp",
    "/r/demo/episodes",
    "/r/demo/episodes?q=zeal&sort=longest&page=2",
    "/r/demo/failures?split=train",
    f"/r/demo/task?task={TASK}",
    "/r/demo/task?task=files_1&a_split=train&a_step=2&a_sample=1&b_split=eval-train&b_step=4&b_sample=0",
    f"/r/demo/episode?task={TASK}&split=train&step=2&sample=0",
    f"/r/demo/episode?task={TASK}&split=train&step=2&sample=3&view=tokens&by=weight_versions",
    f"/r/demo/group?task={TASK}&split=train&step=2",
    f"/r/demo/raw?task={TASK}&split=train&step=2&sample=0",
    "/curve.svg?key=train/kl",
    "/state",
    "/static/style.css",
]


@pytest.fixture(scope="module")
def server(demo_folder, tmp_path_factory):
    with serving([demo_folder], tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.mark.parametrize("path", PAGES)
def test_every_page_answers(server, path) -> None:
    answer = server.get(path)
    assert answer.status == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert "\u202e" not in re.sub(r'value="[^"]*"', "", answer.text) or "/raw" in path


def test_a_page_has_no_inline_script_or_style(server) -> None:
    for path in PAGES[:14]:
        text = server.get(path).text
        assert not re.search(r"<script(?![^>]*(src=|application/json))", text)
        assert not re.search(r"<[^>]*\s(style|on[a-z]+)=", text)
        assert "<style" not in text


def test_every_curve_is_explained_and_can_be_had_as_a_file(server) -> None:
    pytest.importorskip("resvg_py")
    overview, metrics = server.get("/overview").text, server.get("/metrics").text
    figures = re.findall(r'<figure id="([^"]*)"', overview)
    explained = re.findall(r'href="/metrics#([^"]*)"', overview)
    assert figures == [
        "eval-pass_rate",
        "train-reward_mean",
        "train-pass_rate",
        "train-kl",
        "train-entropy",
        "time-rollout_seconds",
    ]
    assert explained == [f"metric-{figure}" for figure in figures]
    assert all(f'<tr id="{anchor}">' in metrics for anchor in explained)
    files = re.findall(r'href="(/curve\.[^"]*)" download', overview)
    assert len(files) == 2 * len(figures)
    for path in files:
        answer = server.get(path)
        kind = "image/svg+xml" if ".svg" in path else "image/png"
        assert (answer.status, answer.headers["content-type"]) == (200, kind)


def test_hits_are_shown_with_their_surroundings(server) -> None:
    shown = re.findall(
        r'<td class="snippet">(.*?)</td>', server.get("/r/demo/episodes?q=zeal").text
    )
    assert len(shown) == 6
    assert all("&#34;args&#34;: {&#34;<mark>zeal</mark>&#34;: 1}" in one for one in shown)
    assert '<td class="snippet">' not in server.get("/r/demo/episodes").text


def test_hits_are_named_by_their_beginning_when_time_is_up(server, monkeypatch) -> None:
    monkeypatch.setattr("jaxgrpo.viewer.pages.PATIENCE", -1)
    text = server.get("/r/demo/episodes?q=zeal").text
    assert (text.count('<td class="snippet">'), text.count('<td class="preview">')) == (0, 6)


def test_a_sample_that_a_step_lacks_gives_way_to_one_that_it_has(server) -> None:
    text = server.get("/r/demo/task?task=files_1&b_split=train&b_step=2&b_sample=77").text
    assert "step <b>2</b>, sample <b>0</b>" in text


LOST = [
    "/nope",
    "/r/other/tasks",
    "/r/demo/episode?task=nope&split=train&step=2&sample=0",
    "/r/demo/episode",
    "/r/demo/group?task=files_1&split=train&step=x",
    "/r/demo/task?task=nope",
    "/r/demo/task?task=files_1&a_run=other",
    "/compare?a_split=nope",
    "/compare?a_run=nope",
    "/static/../index.py",
    "/static/%2e%2e%2findex.py",
    "/static/..%5cindex.py",
    "//etc/passwd",
    "/r/..%2f..%2fetc/raw?task=files_1&split=train&step=2&sample=0",
    "/r/demo/raw?task=../../config.json&split=train&step=2&sample=0",
    "/%00",
]


@pytest.mark.parametrize("path", LOST)
def test_what_is_not_there_is_not_found(server, path) -> None:
    assert server.get(path).status == 404


@pytest.mark.parametrize(
    "query",
    [
        "step_from=1e999",
        "page=-5",
        "page=999999999999",
        "page=nan",
        "sort=x",
        "failure=x",
        "q=%22",
        "q=%00%ff",
        "reward_from=inf",
        "tool=%27",
    ],
)
def test_odd_queries_are_answered(server, query) -> None:
    assert server.get(f"/r/demo/episodes?{query}").status == 200
    assert server.get(f"/r/demo/tasks?{query}").status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "169.254.1.1"]
)
def test_another_hosts_name_is_refused(server, host) -> None:
    assert server.get("/overview", host=host).status == 403


def test_other_sites_and_other_methods_are_refused(server) -> None:
    assert server.get("/overview", origin="http://evil.example").status == 403
    assert server.get("/overview", origin="null").status == 403
    assert (
        server.get("/overview", sec_fetch_site="cross-site", sec_fetch_mode="no-cors").status == 403
    )
    assert server.get("/overview", method="POST").status == 405
    assert server.get("/overview", origin=server.url).status == 200
    assert server.get("/overview", host=f"localhost:{server.port}").status == 200


def test_elsewhere_a_token_is_asked_for(demo_folder, tmp_path) -> None:
    with serving([demo_folder], tmp_path, token="secret") as server:
        assert server.get("/overview").status == 403
        assert server.get("/overview?token=wrong").status == 403
        assert server.get("/static/app.js").status == 403
        answer = server.get("/overview?smooth=0.6&token=secret")
        assert (answer.status, answer.headers["location"]) == (307, "/overview?smooth=0.6")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        assert server.get("/overview", cookie=cookie.split(";")[0]).status == 200
        assert server.get("/overview", cookie="jaxgrpo_viewer=wrong").status == 403
        assert server.get("//evil.example?token=secret").headers["location"].startswith("/evil")


HOSTILE = [
    "<script>document.title='owned'</script> before \x1b a mark",
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '"><svg onload=alert(1)>',
    "</pre></script><script>1</script>",
    "javascript:alert(1)",
    "{{ 7 * 191 }} {% for x in [].__class__.__mro__ %}{% endfor %}",
    "\x1b[31mred\x1b[0m \u202egnirts\u202c \x00\x07",
    "\ud800 lone",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose tasks are named after what their episodes say; a 5 MB message; broken UTF-8; a
    damaged member."""
    folder = tmp_path_factory.mktemp("hostile") / "demo"
    base = record("files_1", "train", 2, 0, True)
    records = [with_content(base, text, f"task {n}") for n, text in enumerate(HOSTILE)]
    records.append(with_content(base, "long " * 1_000_000, "long"))
    write_records(folder / "trajectories" / "train-000002.jsonl.gz", records)
    line = json.dumps(
        {
            "format": 1,
            "task": "bytes",
            "split": "train",
            "step": 3,
            "messages": [{"role": "assistant", "content": "@@"}],
        }
    )
    bad = line.encode().replace(b"@@", b"\xff\xfe\xc0") + b"\n"
    (folder / "trajectories" / "train-000003.jsonl").write_bytes(bad + b'{"half')
    (folder / "trajectories" / "train-000004.jsonl.gz").write_bytes(
        gzip.compress(bad) + b"\x1f\x8b\x08\x00junk"
    )
    (folder / "trajectories" / "train-000005.jsonl.gz").write_bytes(b"no gzip at all")
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "train/kl": NaN, "train/reward_mean": "high", "<b>": 1}\n'
        '{"step": 2, "train/kl": 1e999}\n'
        "x\n"
    )
    (folder / "config.json").write_text('{"model": {"source": 5')
    with serving([folder], tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.mark.parametrize("number", range(len(HOSTILE)))
@pytest.mark.parametrize("view", ["turns", "tokens"])
def test_what_models_say_is_text(hostile, number, view) -> None:
    answer = hostile.get(
        f"/r/demo/episode?task=task+{number}&split=train&step=2&sample=0&view={view}"
    )
    assert answer.status == 200
    for live in (
        "<script>document",
        "<img src=x",
        "<svg onload",
        "\x1b",
        "\u202e",
        "\x00",
        "1337",
        'href="javascript:',
    ):
        assert live not in answer.text


@pytest.mark.parametrize("word", ["alert", "src", "onload", "javascript"])
def test_what_is_found_is_text(hostile, word) -> None:
    text = hostile.get(f"/r/demo/episodes?q={word}").text
    shown = re.findall(r'<td class="snippet">(.*?)</td>', text)
    assert shown
    for one in shown:
        assert "<mark>" in one
        assert set(re.findall(r"<(\w+)", one)) <= {"mark", "span"}


def test_a_message_of_five_megabytes_opens(hostile) -> None:
    answer = hostile.get("/r/demo/episode?task=long&split=train&step=2&sample=0")
    assert answer.status == 200
    assert len(answer.text) < 1_000_000
    assert "more characters" in answer.text


def test_damage_is_named_on_every_page(hostile) -> None:
    for page in ("/r/demo/tasks", "/r/demo/episodes", "/overview", "/r/demo/failures"):
        text = hostile.get(page).text
        for name in (
            "train-000003.jsonl",
            "train-000004.jsonl.gz",
            "train-000005.jsonl.gz",
            "metrics.jsonl",
        ):
            assert name in text
    assert hostile.get("/r/demo/episode?task=bytes&split=train&step=3&sample=0").status == 200


def test_a_run_that_goes_on_is_followed(tmp_path) -> None:
    folder = write_demo(tmp_path / "demo")
    with serving([folder], tmp_path / "cache", every=0.05) as server:
        before = json.loads(server.get("/state").text)["version"]
        write_records(
            folder / "trajectories" / "train-000006.jsonl.gz",
            [record("files_1", "train", 6, 0, True)],
        )
        deadline = time.monotonic() + 30
        while json.loads(server.get("/state").text)["version"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "1 episode<" in server.get("/r/demo/episodes?step_from=6").text


def test_a_run_of_an_odd_name_is_shown(tmp_path) -> None:
    pytest.importorskip("uvicorn")
    folders = [write_demo(tmp_path / name) for name in ("plain", "a\udcff\x07\u202e<b>")]
    with serving(folders, tmp_path / "cache") as server:
        overview = server.get("/overview")
        assert overview.status == 200
        (link,) = set(re.findall(r'href="(/r/a[^"]*/tasks)"', overview.text))
        assert server.get(link).status == 200
        drawing = server.get("/curve.svg?key=train/kl").text
        assert "a&lt;U+DCFF&gt;\u2407&lt;U+202E&gt;" in drawing
