"""Write docs/settings.md from the definitions of the settings.

python -m jaxgrpo.tools.write_settings_doc
"""

from pathlib import Path

from jaxgrpo.config.describe import markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
_INTRODUCTION = """\
# Settings

All settings of a run, by section. A config file sets them (see the files in `configs/`), and
`--set rollout.group_size=16` overrides one. `python -m jaxgrpo.train --help-config` prints this
list. The page is generated: edit `jaxgrpo/config/settings.py`, then run
`python -m jaxgrpo.tools.write_settings_doc`.

"""


def page() -> str:
    """Return the text of docs/settings.md."""
    return _INTRODUCTION + markdown()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
