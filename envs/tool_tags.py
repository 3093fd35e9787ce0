"""The `tags` protocol, which is now in jaxgrpo/toolkit/tags.py, under its earlier name."""

from jaxgrpo.toolkit.calls import (
    MAX_CALLS,
    MAX_JSON_CHARS,
    MAX_JSON_DEPTH,
    Action,
    ToolRequest,
    read_json,
    request,
)
from jaxgrpo.toolkit.tags import (
    FINISHED,
    GAVE_UP,
    INSTRUCTIONS,
    STOP_STRINGS,
    outcome,
    parse_action,
    result_message,
    without_reasoning,
    write_calls,
    write_end,
    write_reasoning,
)

__all__ = [
    "FINISHED",
    "GAVE_UP",
    "INSTRUCTIONS",
    "MAX_CALLS",
    "MAX_JSON_CHARS",
    "MAX_JSON_DEPTH",
    "STOP_STRINGS",
    "Action",
    "ToolRequest",
    "outcome",
    "parse_action",
    "read_json",
    "request",
    "result_message",
    "without_reasoning",
    "write_calls",
    "write_end",
    "write_reasoning",
]
