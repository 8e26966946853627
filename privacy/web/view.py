"""What a status page shows, as both sides hand it on: parts with plain data, and how numbers and times are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from privacy.errors import shown

#: Longest text of another party that is shown.
MOST_TEXT = 500


@dataclass(frozen=True)
class Part:
    """One section of the page, sent again whenever it changes.

    Attributes:
        key: its id in the page.
        template: file below the side's own templates.
        data: for the template, which escapes all of it.
    """

    key: str
    template: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class View:
    """The whole page.

    Attributes:
        title: heading, and name of the browser's tab.
        about: one line below it.
        said: what goes on now, in a sentence that a screen reader speaks whenever it changes.
    """

    title: str
    about: str
    said: str
    parts: tuple[Part, ...]


def text(found: str) -> str:
    """A text that another party may have written, on one line and not without end."""
    return shown(found, MOST_TEXT)


def size(count: int) -> str:
    """A number of bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):  # noqa: B007
        if value < 1024:
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def moment(at: float) -> dict[str, str]:
    """A point in time: for machines, and for people in UTC."""
    found = datetime.fromtimestamp(at, UTC).replace(microsecond=0)
    return {"iso": found.isoformat().replace("+00:00", "Z"), "text": found.strftime("%Y-%m-%d %H:%M:%S UTC")}


def clock(at: float) -> dict[str, str]:
    """As :meth:`moment`, without the day for people."""
    return moment(at) | {"text": datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S UTC")}


def counted(number: int, what: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
