"""The figures as tables for people. Needs nothing but Python."""

from collections.abc import Iterator, Sequence

from benchmarks.gpu.rows import Row

_COLUMNS = {
    "device": "row kind memory_gib driver platform_version cores shared_memory_free_gib python "
    "packages",
    "attention": "heads case kernel with agrees worst what seconds tflops",
    "model": "case kernel with agrees worst",
    "peak": "size tflops tflops_median seconds",
    "mfu": "row model layers kernel remat prompt real_fraction seconds compile_seconds tflops mfu "
    "mfu_padded hardware mfu_of_data_sheet peak_gib predicted_gib",
    "torch": "model prompt mask checkpointing seconds first_seconds peak_gib",
    "sampler": "row model prompt prompts rows tokens_per_second step_ms first_seconds peak_gib",
    "publishing": "model gib version write_seconds read_seconds write_gb_per_second "
    "read_gb_per_second",
    "demo": "row config step split pass_rate pass_rate_low pass_rate_high seconds batch_seconds "
    "rollout_seconds update_seconds publish_seconds whole",
    "tests": "file passed skipped failed whole",
}
_SHARES = (
    "real_fraction",
    "mfu",
    "mfu_padded",
    "hardware",
    "mfu_of_data_sheet",
    "pass_rate",
    "pass_rate_low",
    "pass_rate_high",
)
_WITHOUT_TABLE = ("unit", "left out", "failed")


def summary(rows: Sequence[Row]) -> str:
    """A table a part, in Markdown, and below it what was left out, failed or was killed."""
    return (
        "\n".join(
            line
            for part in dict.fromkeys(row["part"] for row in rows)
            for line in _part(part, rows)
        )
        + "\n"
    )


def _part(part: str, rows: Sequence[Row]) -> Iterator[str]:
    own = [row for row in rows if row["part"] == part]
    figures = [row for row in own if row["row"] not in _WITHOUT_TABLE]
    seconds = sum(row.get("seconds", 0.0) for row in own if row["row"] == "unit")
    yield from (f"## {part}", "", f"{seconds:.0f} s", "")
    known = _COLUMNS.get(part, "row").split()
    columns = [name for name in known if any(row.get(name) is not None for row in figures)]
    if figures:
        yield "| " + " | ".join(columns) + " |"
        yield "|" + "---|" * len(columns)
        yield from (
            "| " + " | ".join(_shown(name, row.get(name)) for name in columns) + " |"
            for row in figures
        )
        yield ""
    told = [line for row in own if (line := problem(row))]
    yield from (*told, *[""][: len(told)])


def problem(row: Row) -> str:
    """A line for what is missing or wrong; nothing for all else."""
    names = (
        "model",
        "kernel",
        "remat",
        "prompt",
        "mask",
        "checkpointing",
        "heads",
        "rows",
        "case",
        "size",
        "version",
        "file",
        "config",
    )
    what = ", ".join([row["unit"], *(f"{name} {row[name]}" for name in names if name in row)])
    if row["row"] == "unit":
        return "" if row["status"] == "ended" else f"- {row['unit']}: {row['status']}: {row['why']}"
    if row["row"] in _WITHOUT_TABLE:
        return f"- {what}: {row['row']}: {row['why']}"
    return (
        f"- {what}: DOES NOT AGREE with {row['with']}: {row['differences']}"
        if row.get("agrees") is False
        else ""
    )


def wrong(row: Row) -> bool:
    """Whether a row says that something did not work; what is left out on purpose, or for want of
    time, does not."""
    return (
        row["row"] == "failed"
        or row.get("status") in ("failed", "killed")
        or row.get("agrees") is False
        or bool(row.get("failed"))
    )


def _shown(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "/").replace("\n", " ")
    if name in _SHARES:
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
