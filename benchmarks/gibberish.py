"""Count the errors of LocalGibberish on sensible texts and on gibberish.

    python -m benchmarks.gibberish [--tokenizer assets/tiny-qwen2.5]

Sensible texts are the demonstrations of all BFCL tasks in both protocols and the queries of its
users. For ordinary English they are the docstrings of Python's standard library and this project's
documentation. Gibberish is random tokens, alone and after a demonstration, sentences in random
order, and repeated sentences and calls.
"""

import argparse
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.tasks import CATEGORIES, BfclTask
from jaxgrpo.rewards.penalties import LocalGibberish
from jaxgrpo.storage.pretrained import load_tokenizer
from jaxgrpo.types import Task

Episodes = Sequence[Sequence[str]]
SAMPLES = 200
PIECE = 800  # characters of a page that count as one text
SENTENCES = (
    "I will look at the files. ",
    "The folder has two entries. ",
    "Now the report has to be moved. ",
    "I do not know which one is meant. ",
    "It should be the final report. ",
    "Then I post the tweet. ",
)


def tasks(suite: Bfcl) -> list[Task]:
    return [*suite.tasks("train"), *suite.tasks("test")]


def sensible() -> Iterator[tuple[str, Episodes]]:
    """Yield texts in which nothing should be found."""
    for category in CATEGORIES:
        for protocol in ("tags", "native"):
            suite = Bfcl(categories=(category,), protocol=protocol, max_turns=99)
            yield (
                f"demonstrations, {category}, {protocol}",
                [suite.demonstration(t) for t in tasks(suite)],
            )
    payloads = [task.payload for task in tasks(Bfcl(categories=CATEGORIES))]
    turns = [
        turn for payload in payloads if isinstance(payload, BfclTask) for turn in payload.turns
    ]
    yield "users' queries", [(turn.query,) for turn in turns if turn.query]
    yield "docstrings", [(text,) for text in docstrings()]
    pages = "".join(
        path.read_text() for path in (Path("README.md"), *sorted(Path("docs").glob("*.md")))
    )
    yield "pages", [(pages[i : i + PIECE],) for i in range(0, len(pages), PIECE)]


def docstrings() -> list[str]:
    """Return docstrings of 200 characters or more from Python's standard library."""
    found = set()
    for name in sorted(sys.stdlib_module_names - {"antigravity", "this", "idlelib", "turtledemo"}):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not on this platform
        members = [m for m in vars(module).values() if isinstance(m, type | types.FunctionType)]
        found |= {inspect.getdoc(item) or "" for item in [module, *members]}
    return sorted(text for text in found if len(text) >= 200)


def gibberish(
    random_tokens: Callable[[int], str], rng: np.random.Generator
) -> Iterator[tuple[str, Episodes]]:
    """Yield texts in each of which something should be found."""
    suite = Bfcl()
    demonstrations = [suite.demonstration(task) for task in tasks(suite)]
    for count in (10, 20, 40, 80, 200, 500):
        yield f"{count} random tokens", [(random_tokens(count),) for _ in range(SAMPLES)]
    yield (
        "a demonstration, then 60 random tokens",
        [(d[0] + random_tokens(60),) for d in demonstrations],
    )
    for count in (40, 80):
        texts = ["".join(rng.choice(SENTENCES, count)) for _ in range(SAMPLES)]
        yield f"{count} sentences of six, in random order", [(text,) for text in texts]
    for times in (3, 4, 5, 8):
        yield (
            f"a demonstration, then a sentence {times} times",
            [(d[0] + SENTENCES[i % 6] * times,) for i, d in enumerate(demonstrations)],
        )
    for times in (3, 4, 5):
        yield f"a demonstration's call {times} times", [d[:1] * times for d in demonstrations]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("assets/tiny-qwen2.5"),
        help="a folder with the tokenizer of the random tokens",
    )
    tokenizer = load_tokenizer(parser.parse_args().tokenizer)
    warnings.simplefilter("ignore")  # the standard library's deprecated modules
    rng, judge = np.random.default_rng(0), LocalGibberish()

    def random_tokens(count: int) -> str:
        return tokenizer.decode(rng.integers(0, len(tokenizer) - 10, count).tolist())

    for title, sets in (("sensible", sensible()), ("gibberish", gibberish(random_tokens, rng))):
        print(f"{title:50} {'texts':>6} {'found':>6}")
        for name, episodes in sets:
            found = [findings for episode in episodes if (findings := judge.findings(episode))]
            print(
                f"  {name:48} {len(episodes):6} {len(found):6}  {found[0][0][:60] if found else ''}"
            )


if __name__ == "__main__":
    main()
