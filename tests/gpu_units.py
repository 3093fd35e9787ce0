"""Units that fail, for the tests of benchmarks.gpu."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu.rows import Context, Row


def run(unit: str, context: Context) -> Iterator[Row]:
    yield {"row": "figure", "value": 1}
    if unit == "crashes":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()
    if unit == "raises":
        raise MemoryError("there is no more")
    if unit == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (context.scratch / "left").write_text("behind")
        yield {"row": "child", "pid": child.pid, "scratch": str(context.scratch)}
        time.sleep(600)
    yield {"row": "figure", "value": float("nan")}
