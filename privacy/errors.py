"""Whose fault is it? The three kinds of error, and how a user meets them.

* :class:`ProtocolError` -- a peer broke the protocol; the text names message, sender and what was wrong.
* :class:`Refusal` -- nothing is broken, but our own policy does not allow it.
* :class:`UserError` -- the person at the keyboard can mend it; one line says what was expected, what was
  found and what to do.

A bug of ours is none of these: it stays a ``RuntimeError`` or an ``AssertionError`` and keeps its traceback.
"""

from __future__ import annotations


def shown(text: str, most: int = 120) -> str:
    """``text`` that somebody else wrote, fit for one line of a log or a terminal.

    What does not print, line ends and escape sequences among it, is escaped; of more than ``most`` characters the
    beginning is shown.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return line if len(line) <= most else f"{line[:most]}…"


class VeilsumError(Exception):
    """Base of the errors whose text is meant for people."""


class ProtocolError(VeilsumError):
    """A peer sent something that the protocol does not allow; its message was dropped and nothing changed."""

    def __init__(self, message: str, *, culprit: int | None = None) -> None:
        super().__init__(message)
        #: Roster index of the member proven to have cheated, ``None`` where nobody is named.
        self.culprit = culprit


class Refusal(VeilsumError):
    """This site's policy, or the pinned policy of the federation, does not allow what was asked."""


class UserError(VeilsumError):
    """Something the user can mend: the text says what was expected, what was found and what to do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        #: What to do, shown on a line of its own.
        self.hint = hint
