"""Check tools made of functions: schemas, descriptions, and errors that a policy can learn from."""

import dataclasses
import enum
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from jaxgrpo.toolkit.functions import ArgumentsError, read_docstring, signature_of, tool_of


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Place:
    city: str
    zip: int = 0


def order(
    item: str,
    count: int,
    how: Literal["air", "sea"] = "sea",
    to: Place | None = None,
    tags: list[str] = [],  # noqa: B006 - a shared default must not be shared
) -> str:
    """Order an item.

    It arrives later.

    Args:
        item: The name of the item, as the
            catalog writes it.
        count (int): How many.

    Returns:
        A receipt.
    """
    tags.append("ordered")
    return f"{count} {item}"


def test_the_schema_is_that_of_signature_and_docstring() -> None:
    tool = tool_of(order)
    assert (tool.name, tool.description) == ("order", "Order an item.\n\nIt arrives later.")
    schema = tool.schema["function"]["parameters"]
    assert list(schema) == ["type", "properties", "required", "$defs"]
    assert schema["type"] == "object"
    assert schema["required"] == ["item", "count"]
    assert schema["properties"]["item"] == {
        "type": "string",
        "description": "The name of the item, as the catalog writes it.",
    }
    assert schema["properties"]["count"] == {"type": "integer", "description": "How many."}
    assert schema["properties"]["how"] == {
        "type": "string",
        "enum": ["air", "sea"],
        "default": "sea",
    }
    assert (
        signature_of("order", schema)
        == 'order(item: str, count: int, how: "air" | "sea" = "sea", to: Place | null = null, '
        "tags: list[str] = [])"
    )


def test_arguments_are_converted_by_their_types() -> None:
    def paint(color: Color, x: float, at: Place, note: dict[str, int]) -> None: ...

    bound = tool_of(paint).bind(
        {"color": "red", "x": "1.5", "at": {"city": "Oslo", "zip": "7"}, "note": {"a": 1.0}}
    )
    assert bound == {"color": Color.RED, "x": 1.5, "at": Place("Oslo", 7), "note": {"a": 1}}


def test_a_default_is_not_shared() -> None:
    tool = tool_of(order)
    first = tool.bind({"item": "rope", "count": 1})
    tool.function(**first)
    assert tool.bind({"item": "rope", "count": 1})["tags"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"item": "rope"}, "the argument 'count' is missing"),
        ({"item": "rope", "count": "two"}, "the argument 'count' is \"two\", but should be"),
        ({"item": "rope", "count": 1.5}, "the argument 'count' is 1.5, but should be"),
        ({"item": None, "count": 1}, "the argument 'item' is null, but should be a valid string"),
        ({"item": "a", "count": 1, "how": "rail"}, "is \"rail\", but should be 'air' or 'sea'"),
        ({"item": "a", "count": 1, "colour": "red"}, "there is no argument 'colour'"),
        ({"item": "a", "count": 1, "tags": ["x", 7]}, "the argument 'tags.1' is 7"),
        ({"item": "a", "count": 1, "to": {"zip": 1}}, "the argument 'to.city' is missing"),
    ],
)
def test_an_error_names_the_argument_what_was_given_and_what_is_expected(
    arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ArgumentsError) as error:
        tool_of(order).bind(arguments)
    assert said in str(error.value)
    assert "Expected order(item: str, count: int" in str(error.value)


def test_an_error_stays_short() -> None:
    given = {f"argument_{i}" * 100: "x" * 10_000 for i in range(100)}
    with pytest.raises(ArgumentsError) as error:
        tool_of(order).bind(given | {"count": "y" * 10_000})
    assert len(str(error.value)) < 1_500
    assert "and 97 more" in str(error.value)


def test_the_tools_own_value_error_is_not_one_of_arguments() -> None:
    def fails(a: int) -> None:
        raise ValueError("no")

    assert tool_of(fails).bind({"a": 1}) == {"a": 1}


def untyped(a) -> None: ...  # type: ignore[no-untyped-def]
def many(*a: int) -> None: ...
def keywords(**a: int) -> None: ...
def positional(a: int, /) -> None: ...
def unresolved(a: "Nowhere") -> None: ...  # type: ignore[name-defined] # noqa: F821
def schemaless(a: object.__class__) -> None: ...  # type: ignore[name-defined]
def misdocumented(item: str) -> None:
    """Do.

    Args:
        itme: The item.
    """


class Opaque: ...


def opaque(a: Opaque) -> None: ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (untyped, "argument 'a' of tool untyped has no type"),
        (many, "tool many takes \\*a: int"),
        (keywords, "tool keywords takes \\*\\*a: int"),
        (positional, "tool positional takes a: int"),
        (unresolved, "tool unresolved cannot be read: name 'Nowhere'"),
        (opaque, "tool opaque has a type without a schema"),
        (misdocumented, "describes 'itme'; its arguments are: item"),
        (lambda a: a, "must be a function with a name"),
        (3, "must be a function with a name"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused_by_name(function: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        tool_of(function)


@pytest.mark.parametrize(
    ("text", "description", "arguments"),
    [
        ("", "", {}),
        ("Do it.", "Do it.", {}),
        ("Do.\n\nArgs:\n  a: One.\n  b: Two:\n    more.", "Do.", {"a": "One.", "b": "Two: more."}),
        ("Do.\n\nArgs:\n  a: One,\n    that is: 1.", "Do.", {"a": "One, that is: 1."}),
        ("Do.\n\nArgs:\n  a: One,\n    b: or two.", "Do.", {"a": "One, b: or two."}),
        ("Do.\n\nArgs:\n    a (int, optional): One.\n\nRaises:\n    b: no.", "Do.", {"a": "One."}),
        ("Args:\n    a: One.\nAfter.", "", {"a": "One."}),
        ("Do.\n\nReturns:\n    x: not an argument", "Do.", {}),
        ("Note: this is no section.", "Note: this is no section.", {}),
    ],
)
def test_google_docstrings_are_read(text: str, description: str, arguments: dict[str, str]) -> None:
    assert read_docstring(text) == (description, arguments)


def test_models_of_pydantic_and_their_bounds_work() -> None:
    class Order(BaseModel):
        title: str
        count: int = Field(ge=1)

    def place(
        order: Order, priority: Annotated[int, Field(le=3, description="From 0.")] = 0
    ) -> None:
        """Place."""

    tool = tool_of(place)
    assert tool.bind({"order": {"title": "a", "count": 2}})["order"] == Order(title="a", count=2)
    with pytest.raises(ArgumentsError, match="'priority' is 4, but should be less than or equal"):
        tool.bind({"order": {"title": "a", "count": 2}, "priority": 4})
    priority = tool.parameters["properties"]["priority"]
    assert priority["description"] == "From 0."
    definition = tool.parameters["$defs"]["Order"]
    assert set(definition["properties"]) == {"title", "count"}


def test_the_toolkit_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, jaxgrpo.toolkit.suite; "
        "print([m for m in ('torch', 'transformers', 'jax', 'datasets') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
