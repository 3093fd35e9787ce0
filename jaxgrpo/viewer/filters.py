"""What a person looks for, as it stands in the address: filters of episodes, and how SQLite is
asked for them."""

import dataclasses
import re
from collections.abc import Mapping

from jaxgrpo.viewer.failures import KINDS

SORTS = {
    "newest": "step DESC, id DESC",
    "oldest": "step, id",
    "reward": "reward, id",
    "best": "reward DESC, id",
    "longest": "tokens DESC, id",
    "repetitive": "repetition DESC, id",
}
_NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{1,15})?")


@dataclasses.dataclass(frozen=True)
class Filter:
    """Texts as they were typed. Empty ones ask for nothing, unreadable ones are left out."""

    q: str = ""
    split: str = ""
    task: str = ""
    label: str = ""
    tool: str = ""
    stop: str = ""
    failure: str = ""
    passed: str = ""
    step_from: str = ""
    step_to: str = ""
    reward_from: str = ""
    reward_to: str = ""
    tokens_from: str = ""
    sort: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Filter":
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: query.get(name, "").strip()[:500].replace("\0", "") for name in names})

    @property
    def state(self) -> dict[str, str]:
        """What is set, as the address holds it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    @property
    def order(self) -> str:
        return SORTS.get(self.sort, SORTS["newest"])

    @property
    def faults(self) -> list[str]:
        """What was typed where a number or a known kind belongs."""
        numbers = ("step_from", "step_to", "reward_from", "reward_to", "tokens_from")
        wrong = [
            f"{name}: {value!r} is no number"
            for name in numbers
            if (value := getattr(self, name)) and _number(value) is None
        ]
        if self.failure and self.failure not in (*KINDS, "any"):
            wrong.append(f"failure: {self.failure!r} is no kind; the kinds are {', '.join(KINDS)}")
        if self.q and not match(self.q):
            wrong.append(f"q: {self.q!r} has no word to search for")
        return wrong

    def where(self) -> tuple[str, list[object]]:
        """A condition on `episodes`, and its values."""
        terms, values = ["1"], list[object]()

        def add(term: str, *given: object) -> None:
            terms.append(term)
            values.extend(given)

        for column, value in (
            ("split", self.split),
            ("task", self.task),
            ("stop_reason", self.stop),
        ):
            if value:
                add(f"{column} = ?", value)
        for column, value in (("labels", self.label), ("tools", self.tool)):
            if value:
                add(f"instr({column}, ?)", f",{value},")
        if self.failure in KINDS:
            add("failure = ?", self.failure)
        elif self.failure == "any":
            add("failure != ''")
        if self.passed in ("yes", "no"):
            add("passed = ?" if self.passed == "yes" else "passed IS NOT ?", 1)
        bounds = (
            ("step >= ?", self.step_from),
            ("step <= ?", self.step_to),
            ("reward >= ?", self.reward_from),
            ("reward <= ?", self.reward_to),
            ("tokens >= ?", self.tokens_from),
        )
        for term, value in bounds:
            if (bound := _number(value)) is not None:
                add(term, bound)
        if words := match(self.q):
            add("id IN (SELECT rowid FROM said WHERE said MATCH ?)", words)
        return " AND ".join(terms), values


def match(typed: str) -> str:
    """What was typed as a query of the full-text index: every word must be there, the last may be a
    word's beginning; what stands in quotes must be there in one piece.

    >>> match('get_watchlist "user name" err')
    '"get_watchlist" "user name" "err"*'
    """
    kept = words(typed)
    if not kept:
        return ""
    ends = "" if typed.rstrip().endswith('"') else "*"
    return " ".join(f'"{word}"' for word in kept) + ends


def words(typed: str) -> list[str]:
    """The words that were typed; what stands in quotes is one.

    >>> words('get_watchlist "user name" err')
    ['get_watchlist', 'user name', 'err']
    """
    pieces = re.findall(r'"([^"]*)"|(\S+)', typed)
    found = [quoted or bare.replace('"', "") for quoted, bare in pieces]
    return [word for word in found if any(char.isalnum() for char in word)]


def _number(value: str) -> float | None:
    return float(value) if _NUMBER.fullmatch(value) else None
