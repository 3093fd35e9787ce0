"""The curves of the overview: which metrics, under which names, in which order. Pure but for
reading the index."""

import dataclasses
import sqlite3
from collections.abc import Sequence

from jaxgrpo.viewer import queries
from jaxgrpo.viewer.charts import Chart, Curve


@dataclasses.dataclass(frozen=True)
class Shown:
    """A metric that has a name of its own: its unit ("%" for shares) and what it says, in a
    sentence."""

    key: str
    title: str
    unit: str
    says: str

    def series(self, db: sqlite3.Connection) -> list[tuple[int, float | None]]:
        """Return its values by step. Version 0.1.0 called fractions shares; a run that was resumed
        has both names."""
        former = self.key.replace("_fraction", "_share")
        names = [self.key] if former == self.key else [former, self.key]
        return sorted(
            {point[0]: point for name in names for point in queries.series(db, name)}.values()
        )


SHOWN = (
    Shown("train/reward_mean", "Reward", "", "The mean reward of a batch's episodes."),
    Shown(
        "train/pass_rate",
        "Pass rate in training",
        "%",
        "The share of a batch's episodes that passed.",
    ),
    Shown(
        "train/completion_tokens_mean",
        "Completion tokens",
        "",
        "How long an episode is after its prompt, tool results included.",
    ),
    Shown(
        "train/kl",
        "KL to the reference",
        "",
        "How far the policy is from the reference: the mean over trained tokens.",
    ),
    Shown(
        "train/clip_fraction",
        "Clip fraction",
        "%",
        "The share of trained tokens whose probability ratio was clipped.",
    ),
    Shown(
        "train/entropy",
        "Entropy",
        "",
        "How open the policy's choice is, in nats per token; near zero nothing is explored.",
    ),
    Shown("train/overlong_fraction", "Overlong episodes", "%", "The share that ran out of tokens."),
    Shown(
        "train/no_signal_fraction",
        "Groups without signal",
        "%",
        "The share of groups in which all rewards are alike: they teach nothing.",
    ),
    Shown(
        "train/mismatch_mean",
        "Sampler/trainer mismatch",
        "",
        "By how much the two log-probabilities of a sampled token differ.",
    ),
    Shown(
        "train/grad_norm",
        "Gradient norm",
        "",
        "Before clipping, the mean over a batch's optimizer steps.",
    ),
    Shown(
        "speed/sampled_tokens_per_second",
        "Sampled tokens per second",
        "",
        "How fast the sampler is.",
    ),
    Shown(
        "speed/trained_tokens_per_second",
        "Trained tokens per second",
        "",
        "How fast the update is.",
    ),
)

_PHASES = ("rollout", "reference", "update", "probe", "publish", "check", "record", "checkpoint")


def headline(runs: Sequence[tuple[str, sqlite3.Connection]]) -> list[tuple[Shown, Chart]]:
    """The charts of the overview, each with all runs that have the metric; those that none has
    are left out."""
    several = len(runs) > 1
    found = [(evaluated, chart) for evaluated, chart in [_held_out(runs)] if chart.curves]
    for shown in SHOWN:
        curves = [
            Curve(name if several else shown.title, points, pen)
            for pen, (name, db) in enumerate(runs)
            if (points := shown.series(db))
        ]
        if curves:
            found.append((shown, Chart(shown.title, curves, shown.unit)))
    phases = _phases(runs)
    return [*found, *([phases] if phases[1].curves else [])]


def _held_out(runs: Sequence[tuple[str, sqlite3.Connection]]) -> tuple[Shown, Chart]:
    curves = []
    keys = {key for _, db in runs for key in queries.metric_keys(db)}
    splits = sorted(split for split, key in keys if key == "eval/pass_rate")
    splits.sort(key=lambda split: split not in ("test", "train"))
    for place, (name, db) in enumerate(runs):
        for split, key in queries.metric_keys(db):
            if key == "eval/pass_rate":
                low, high = (
                    dict(queries.series(db, f"eval/pass_rate_{end}", split))
                    for end in ("low", "high")
                )
                points = queries.series(db, key, split)
                band = [
                    (s, a, b)
                    for s, _ in points
                    if (a := low.get(s)) is not None and (b := high.get(s)) is not None
                ]
                number = splits.index(split)
                pen, style = (place, number) if len(runs) > 1 else (number, 0)
                title = f"{name} {split}" if len(runs) > 1 else split
                curves.append(Curve(title, points, pen, band, style))
    says = (
        "pass@1 of each evaluation with its 95 % interval; test: tasks that are never trained on."
    )
    return Shown("eval/pass_rate", "Evaluations", "%", says), Chart(
        "Evaluations", curves, "%", few=True
    )


def _phases(runs: Sequence[tuple[str, sqlite3.Connection]]) -> tuple[Shown, Chart]:
    """The seconds of each phase, of the first run only: several runs' would not be readable."""
    name, db = runs[0]
    found = [(phase, queries.series(db, f"time/{phase}_seconds")) for phase in _PHASES]
    shown = [(phase, points) for phase, points in found if any(value for _, value in points)]
    curves = [Curve(phase, points, pen) for pen, (phase, points) in enumerate(shown)]
    says = f"Seconds a batch spends in each phase{f', of {name}' if len(runs) > 1 else ''}."
    return Shown("time/rollout_seconds", "Seconds by phase", "", says), Chart(
        "Seconds by phase", curves
    )


def one(runs: Sequence[tuple[str, sqlite3.Connection]], key: str, split: str = "") -> Chart:
    """Any metric, of all runs that have it; drawn as on the overview where it is there."""
    headlines = {shown.key: chart for shown, chart in headline(runs)}
    if not split and key in headlines:
        return headlines[key]
    known = next((shown for shown in SHOWN if shown.key == key), Shown(key, key, "", ""))
    found = [(name, queries.series(db, key, split) or known.series(db)) for name, db in runs]
    curves = [Curve(name, points, pen) for pen, (name, points) in enumerate(found) if points]
    return Chart(known.title, curves, known.unit)
