"""docs/metrics.md within the viewer: every metric's row can be linked to, and no link leads out."""

import re

import pytest

from jaxgrpo.viewer import explanations
from jaxgrpo.viewer.curves import SHOWN


@pytest.mark.parametrize(
    ("key", "anchor"),
    [
        ("train/kl", "metric-train-kl"),
        ("eval/pass_rate", "metric-eval-pass_rate"),
        ("eval/pass_rate/Files", "metric-eval-pass_rate-label"),
        ("stop/step_limit", "metric-stop-reason"),
        ("train/clip_share", "metric-train-clip_fraction"),
        ("time/publish_load_seconds", "metric-time-publish_stage_seconds"),
        ("mine/own", ""),
    ],
)
def test_a_metric_has_the_anchor_of_its_row(key: str, anchor: str) -> None:
    assert explanations.anchor(key) == anchor
    assert f'<tr id="{anchor}">' in explanations.page() or not anchor


def test_every_curve_of_the_overview_is_explained() -> None:
    for shown in SHOWN:
        assert f'<tr id="{explanations.anchor(shown.key)}">' in explanations.page()


def test_links_lead_to_sections_of_the_page() -> None:
    page = explanations.page()
    links = re.findall(r'href="([^"]*)"', page)
    assert len(links) > 10
    assert "#about-the-reward-stays-flat" in links
    ids = re.findall(r' id="([^"]*)"', page)
    assert {link[1:] for link in links} <= set(ids)
    assert len(ids) == len(set(ids))


def test_each_table_has_the_name_of_its_section() -> None:
    names = re.findall(
        r'<div class="scroll" tabindex="0" role="region" aria-label="([^"]*)">', explanations.page()
    )
    assert {"Rewards and episodes", "Loss and policy", "Evaluation"} <= set(names)
    assert explanations.page().count("<table") == len(names) == len(set(names))


def test_the_contents_name_every_section() -> None:
    contents = explanations.contents()
    assert ("about-kl-grows", "KL grows", "h3") in contents
    headings = re.findall(r'<(h[23]) id="([^"]*)"', explanations.page())
    assert [(level, anchor) for anchor, _, level in contents] == headings
