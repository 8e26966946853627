"""The page docs/commands.md, written from the three commands themselves: ``python -m scripts.commands``.

Nothing on that page is typed by hand, so it cannot say what a command does not do; tests/test_docs.py compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import coordinator.cli
import participant.cli
import privacy.cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
APPS = (coordinator.cli.app, participant.cli.app, privacy.cli.app)
INTRODUCTION = """# Commands

<!-- Written by `python -m scripts.commands` from the commands themselves; do not edit. -->

What `--help` says, on one page. `--help` itself is everywhere, and each program has `--install-completion` and
`--show-completion`. [Exit codes](exit-codes.md) are the same for all; the files that commands read and write are in
[configuration.md](configuration.md).
"""


def page() -> str:
    """The whole page, as it should be on disk."""
    return "\n".join([INTRODUCTION, *(line for app in APPS for line in program(app))])


def program(app: typer.Typer) -> Iterator[str]:
    """A chapter for a program, with a section for each of its commands."""
    root: Any = typer.main.get_command(app)
    yield from (f"## {app.info.name}", "", paragraphs(root.help), "")
    for path, command in leaves(root, str(app.info.name)):
        yield from section(path, command)


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, in the order of ``--help``, with the words that call it."""
    for name, one in getattr(command, "commands", {}).items():
        yield from leaves(one, f"{path} {name}")
    if not hasattr(command, "commands") and not command.hidden:
        yield path, command


def section(path: str, command: Any) -> Iterator[str]:
    """How a command is called, what it does, and a table of what it takes."""
    taken = [one for one in command.params if not one.hidden]
    arguments = [value(one) for one in taken if one.param_type_name == "argument"]
    required = [spelt(one) for one in taken if one.param_type_name == "option" and one.required]
    usage = " ".join([path, *arguments, *required])
    yield from (f"### {path}", "", f"    {usage}", "", paragraphs(command.help), "")
    if taken:
        yield from ("| argument or option | default | what it is |", "|---|---|---|", *map(row, taken), "")


def paragraphs(text: str) -> str:
    """The text of ``--help`` with its example as code."""
    said, example, call = text.strip().partition("Example: ")
    return f"{escaped(said.strip())}\n\nExample:\n\n    {call.strip()}" if example else escaped(said)


def row(parameter: Any) -> str:
    """A parameter's line of the table."""
    return f"| `{spelt(parameter)}` | {default(parameter)} | {escaped(parameter.help or '')} |"


def spelt(parameter: Any) -> str:
    """A parameter as it is typed."""
    if parameter.param_type_name == "argument":
        return value(parameter)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {value(parameter)}"


def value(parameter: Any) -> str:
    """What stands for a parameter's value; three dots where it may come more than once."""
    word: str = parameter.metavar or parameter.name.upper().replace("_", "-")
    return word + (" ..." if parameter.multiple or parameter.nargs == -1 else "")


def default(parameter: Any) -> str:
    """The default, and the variable of the environment that stands for the parameter."""
    if parameter.required:
        said = "required"
    elif getattr(parameter, "is_flag", False):
        said = "on" if parameter.default else "off"
    else:
        said = "" if parameter.default in (None, "", [], ()) else f"`{parameter.default}`"
    return ", or ".join(part for part in (f"`{parameter.envvar}`" if parameter.envvar else "", said) if part)


def escaped(text: str) -> str:
    """Text that stands in a cell of a table and means nothing to Markdown."""
    for character in "|*_":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "&lt;")  # mkdocs takes no backslash before it


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
