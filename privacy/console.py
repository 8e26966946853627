"""How the three commands speak: one line for a user's mistake, a hint below it, an exit code per kind; logs set up
once.
"""

from __future__ import annotations

import logging
import sys
from typing import NamedTuple, NoReturn

import structlog
import typer
from structlog.typing import EventDict

from privacy.errors import ProtocolError, Refusal, UserError, VeilsumError, shown

#: Longest text that is shown as one line; parts of it may come from the other end.
MAX_LINE = 2000
EXIT_USER, EXIT_REFUSED, EXIT_PROTOCOL, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 3, 4, 5, 130
#: Of the library that reads command lines.
EXIT_USAGE = 2


class End(NamedTuple):
    """What an exit code says to the person who sees it; Markdown."""

    means: str
    todo: str


#: docs/exit-codes.md shows it.
ENDS: dict[int, End] = {
    0: End("done; of `doctor`: nothing failed", ""),
    EXIT_USER: End(
        "something that you can mend: a file, a name, a full disk; `doctor`: a check failed", "read the hint"
    ),
    EXIT_USAGE: End("wrong usage: an unknown command or option", "`--help`"),
    EXIT_REFUSED: End(
        "refused by policy: this site's, the pinned one of the federation, or the coordinator's",
        "it is meant to be so; agree on another plan or policy, do not try again",
    ),
    EXIT_PROTOCOL: End(
        "a peer broke the protocol, or what was audited does not hold", "keep the files and tell the other members"
    ),
    EXIT_UNREACHABLE: End("the other end does not answer", "try again later; `doctor` says why"),
    EXIT_INTERRUPTED: End("interrupted; what was saved stays saved", "start again"),
}


class Unreachable(UserError):
    """The other end does not answer; it may be down, or the address wrong."""


def exit_code(error: VeilsumError) -> int:
    """The exit code of a kind of error."""
    if isinstance(error, Unreachable):
        return EXIT_UNREACHABLE
    if isinstance(error, Refusal):
        return EXIT_REFUSED
    return EXIT_PROTOCOL if isinstance(error, ProtocolError) else EXIT_USER


def fail(error: VeilsumError) -> NoReturn:
    """Print one line and a hint, and leave with the code of the error's kind."""
    typer.echo(f"error: {shown(str(error), MAX_LINE)}", err=True)
    hint = getattr(error, "hint", "")
    if hint:
        typer.echo(f"  hint: {hint}", err=True)
    raise SystemExit(exit_code(error))


def run(app: typer.Typer) -> None:
    """Run a command-line application; no traceback for anything that is not our bug."""
    try:
        app()
    except VeilsumError as error:
        fail(error)
    except KeyboardInterrupt:
        typer.echo("interrupted; what was saved stays saved", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


def one_line(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Texts of other parties stay within their line of the log: no line ends, no escape sequences."""
    return {key: shown(value, MAX_LINE) if isinstance(value, str) else value for key, value in event.items()}


def set_up_logs(*, as_json: bool = False) -> None:
    """Structured logs on standard error; call once, before gRPC starts (it deadlocks on a later change)."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    final = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            one_line,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            final,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
