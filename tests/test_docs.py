"""What README and docs say is so: commands, links, labels, types, phases, tables and worked examples."""

from __future__ import annotations

import ast
import hashlib
import hmac
import json
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from typer.testing import CliRunner

import coordinator.cli
import coordinator.config
import coordinator.phases
import participant.cli
import participant.phases
import privacy.cli
from bench import peer_claims
from participant import config
from privacy.encoding import encode, field_types, union_members
from privacy.secagg import dialogue, messages, naming
from privacy.secagg.masking import WIDTHS, pack
from privacy.secagg.messages import AbortStatement, SelfMaskShare, Share
from privacy.secagg.signed import Signed, signing_input
from privacy.secagg.threshold import abort_quorum, smallest_survivors, threshold
from privacy.settings import parse_toml
from scripts import commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README, PROTOCOL, THREATS = TEXT["README.md"], TEXT["docs/protocol.md"], TEXT["docs/threat-model.md"]
APPS = {
    "veilsum-coordinator": coordinator.cli.app,
    "veilsum-participant": participant.cli.app,
    "veilsum-audit": privacy.cli.app,
}


def code_of(text: str) -> list[str]:
    """Lines of indented blocks, and inline code."""
    return [line.strip() for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", text)


# --- commands, links, paths --------------------------------------------------------------------------------------


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {m[1] for text in TEXT.values() for code in code_of(text) if (m := re.match(r"make ([a-z-]+)", code))}
    assert {"demo", "test", "demo-compare"} <= named
    assert named <= targets


def commands_of(text: str) -> set[str]:
    """What a reader is to type of our three programs, without what a shell does with it and comments beside it."""
    found = {
        re.split(r" {3,}", code)[0] for code in code_of(re.sub(r"\\\n +", "", text)) if code.startswith(tuple(APPS))
    }
    return {re.split(r" [|>] ", " ".join(line.split()))[0] for line in found if " " in line}


COMMANDS = sorted(commands_of(README))
#: The tutorials and how-tos are typed line by line.
TYPED = sorted(set().union(*(commands_of(t) for n, t in TEXT.items() if "/tutorials/" in n or "/how-to/" in n)))


@pytest.mark.parametrize("line", sorted({*COMMANDS, *TYPED}))
def test_commands_and_options_in_the_readme_and_the_tutorials_exist(line: str) -> None:
    program, *words = shlex.split(line)
    command: Any = typer.main.get_command(APPS[program])
    path: list[str] = []
    for word in words:
        if not hasattr(command, "commands"):
            break
        assert word in command.commands, f"{program} has no command {word}"
        path.append(word)
        command = command.commands[word]
    shown = CliRunner().invoke(APPS[program], [*path, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", re.sub(r"\x1b\[[0-9;]*m", "", shown.output)), f"{line}: no {option}"


def test_the_tutorials_name_commands_of_all_three_people() -> None:
    assert len(TYPED) > 30
    assert {line.split()[0] for line in TYPED} == set(APPS)
    assert any("draft" in line and "--size 300" in line for line in TYPED)  # a line that goes on in the next ones


def test_every_claim_about_other_frameworks_that_is_run_has_its_line_and_its_place() -> None:
    page = TEXT["docs/comparison.md"]
    assert set(re.findall(r"^holds +([\w-]+): ", page, re.MULTILINE)) == set(peer_claims.CLAIMS)
    assert set(re.findall(r"\*Run\*, `([\w-]+)`", page)) == set(peer_claims.CLAIMS)
    assert all(wheel in page for wheel in peer_claims.EXTRA.values())
    places = re.findall(r"^### ([A-Z]\d): ", page, re.MULTILINE)
    assert sorted(set(re.findall(r"\[([A-Z]\d)\][,;)]", README))) == sorted(places)


def test_the_readme_shows_all_commands_of_the_three_people() -> None:
    assert len(COMMANDS) >= 12
    assert {line.split()[0] for line in COMMANDS} == set(APPS)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXT)
def test_links_resolve(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[name]):
        if re.match(r"[a-z]+://", target):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists(), f"{name}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{name}: no heading for {target}"


# --- the site ------------------------------------------------------------------------------------------------------

SITE = sorted(name.removeprefix("docs/") for name in TEXT if name.startswith("docs/"))


def pages_of(nav: Any) -> list[str]:
    """The files of mkdocs' nav, chapters and all."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(part)]


def test_every_page_is_in_the_nav_of_the_site_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages_of(nav)) == SITE
    assert pages_of(nav)[0] == "index.md"
    assert "](docs/index.md)" in README


@pytest.mark.parametrize("page", SITE)
def test_a_page_of_the_site_links_to_what_the_site_has(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)", TEXT[f"docs/{page}"]):
        if not re.match(r"[a-z]+://", target):
            path = ((ROOT / "docs" / page).parent / target).resolve()
            assert path.is_relative_to(ROOT / "docs"), f"{page}: {target} is not on the site; name it as code instead"
            assert path.is_file(), f"{page}: {target} is no page"


@pytest.mark.parametrize("page", SITE)
def test_lists_and_tables_follow_an_empty_line(page: str) -> None:
    """Without one, GitHub shows a list or table and mkdocs shows one paragraph."""
    text = re.sub(r"^```.*?^```", "", TEXT[f"docs/{page}"], flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^(?!\||\* |- |\d+\. | )\S.*\n(\* |- |1\. |\|)", text, re.MULTILINE)


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    assert TEXT["docs/commands.md"] == commands.page(), "expected a fresh page; write it: python -m scripts.commands"


def test_no_absolute_paths() -> None:
    images = {p.name: p.read_text() for p in (ROOT / "docs" / "images").glob("*.svg")}
    for name, text in (TEXT | images).items():
        assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|mnt|opt|work|var)/(?!(lib/)?veilsum)", text), name


def test_every_test_named_exists() -> None:
    named = re.findall(r"`((?:adversary/)?test_\w+\.py)(?:::(\w+))?`", THREATS)
    assert len(named) > 50
    for file, function in named:
        source = (ROOT / "tests" / file).read_text()
        assert not function or f"def {function}(" in source, f"{file}::{function}"


# --- the messages of troubleshooting ---------------------------------------------------------------------------------


def texts_in_code() -> list[str]:
    """Every constant text of the product, those between the braces of f-strings among them."""
    trees = (
        ast.parse(path.read_text("utf-8"))
        for side in ("coordinator", "participant", "privacy")
        for path in (ROOT / side).rglob("*.py")
    )
    return [
        node.value
        for t in trees
        for node in ast.walk(t)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_every_message_of_troubleshooting_is_one_of_the_code() -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", TEXT["docs/troubleshooting.md"], re.MULTILINE)
    quoted = [part for row in rows for message in re.findall(r"`([^`]+)`", row) for part in message.split("…")]
    assert len(quoted) > 50
    known = texts_in_code()
    assert [part for part in quoted if part.strip() and not any(part.strip() in text for text in known)] == []


# --- the specification against the code ----------------------------------------------------------------------------


def labels_in_code() -> set[str]:
    found: set[str] = set()
    for folder in ("privacy", "coordinator", "participant"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            found |= set(re.findall(r'\b(?:label|digest)\(\s*"([^"]+)"', source))
            found |= set(re.findall(r'^LABEL_\w+ = "([^"]+)"', source, re.MULTILINE))
            found |= set(re.findall(r'b"veilsum/1/([^"\\]+)\\0"', source))
            found |= set(re.findall(r'DOMAIN \+ b"([^"\\]+)\\0"', source))
            for kinds in re.findall(r"^KIND_[A-Z_, ]+ = (.+)$", source, re.MULTILINE):
                found |= {f"leaf-{kind}" for kind in re.findall(r'"([^"]+)"', kinds)}
    return found - {"leaf-"}


def test_the_labels_listed_are_those_in_the_code() -> None:
    section = PROTOCOL[PROTOCOL.index("## 4.") : PROTOCOL.index("## 5.")]
    listed = set(re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE))
    raw = section[section.index("Ten more") :]
    listed |= {name for name in re.findall(r"`([\w-]+)`", raw[: raw.index("(section 5)")]) if name != "label"}
    assert listed == labels_in_code()


BYTES = {"hash", "key", "share", "sig", "bytes"}


def spelt(kind: Any) -> str:
    """A declared type as the listing spells it, all byte strings alike."""
    if isinstance(kind, typing.TypeVar):
        return str(kind.__name__)
    if typing.get_origin(kind) is tuple:
        return f"[{spelt(typing.get_args(kind)[0])}]"
    for name in ("Share", "Opened", "Naming", "RetryProof"):
        if kind == getattr(naming if name == "Naming" else messages, name):
            return name
    if typing.get_args(kind):
        return f"{kind.__name__}[{', '.join(map(spelt, typing.get_args(kind)))}]"
    return {int: "int", bytes: "bytes", str: "text"}.get(kind) or str(kind.__name__)


def listed_types() -> dict[str, str]:
    """Name -> its right-hand side in the listings of sections 11 and 15."""
    blocks = re.findall(r"```types\n(.*?)```", PROTOCOL, re.DOTALL)
    found = {}
    for line in "".join(blocks).splitlines():
        name, _, rest = re.split(r"( = |: )", line, maxsplit=1)
        found[name] = rest
    return found


def test_the_types_listed_are_those_in_the_code() -> None:
    listed = listed_types()
    for name, rest in listed.items():
        if name == "Signed[B]":
            assert rest == "sender int, body B, signature sig"
            continue
        kind = next(getattr(m, name) for m in (messages, naming, dialogue) if hasattr(m, name))
        if members := union_members(kind):
            assert rest == " | ".join(map(spelt, members)), name
            continue
        fields = re.sub(r"\b(hash|key|share|sig)\b(?=[,\]]|$)", "bytes", rest)
        assert fields == ", ".join(f"{field} {spelt(hint)}" for field, hint in field_types(kind)), name
    said = {t for union in (dialogue.ToMember, dialogue.FromMember) for t in union_members(union)}
    assert {spelt(k).removeprefix("Signed[").rstrip("]") for k in said} <= set(listed)


@pytest.mark.parametrize(
    ("heading", "module"), [("member's phase", participant.phases), ("coordinator's phase", coordinator.phases)]
)
def test_the_phase_tables_are_those_in_the_code(heading: str, module: Any) -> None:
    table = PROTOCOL[PROTOCOL.index(f"| {heading}") :].split("\n\n")[0]
    found: dict[str, set[str]] = {}
    for row in table.splitlines()[2:]:
        phases, takes, *_ = (cell for cell in row.split("|")[1:])
        for phase in re.findall(r"`(\w+)`", phases):
            found[phase] = set(re.findall(r"`(\w+)`", takes))
    assert found == {p.__name__: {t.__name__ for t in taken} for p, taken in module.ACCEPTS.items()}


def test_the_threshold_table() -> None:
    section = PROTOCOL[PROTOCOL.index("## 10.") : PROTOCOL.index("## 11.")]
    rows = [list(map(int, re.findall(r"\d+", row))) for row in re.findall(r"^\| \d.*$", section, re.MULTILINE)]
    assert len(rows) == 12
    for n, c, t, lost, least, statements in rows:
        assert (t, lost, least) == (threshold(n, c), n - t, smallest_survivors(c))
        assert statements == abort_quorum(n, c)


def test_the_worked_examples() -> None:
    shown = ["".join(block.split()) for block in re.findall(r"```hex\n(.*?)```", PROTOCOL, re.DOTALL)]
    share: Any = SelfMaskShare(2, bytes(31) + b"\1\7")
    assert shown[0] == encode(share, Share).hex()
    assert shown[1] == signing_input(2, AbortStatement("no"), bytes(range(32))).hex()
    words = np.array([0x01234567, 0x89ABCDEF, 1], np.uint32)
    assert shown[2] == "".join(f"{bits}{pack(words, bits).hex()}" for bits in WIDTHS)
    assert Signed(0, AbortStatement(""), bytes(64)).signature == bytes(64)


def test_a_box_opens_by_the_description_alone() -> None:
    """Section 6 is enough to open a sealed box without an HPKE library."""
    vectors = json.loads((ROOT / "tests" / "vectors" / "boxes.json").read_text())
    seed, case = bytes.fromhex(vectors["key_seed"]), vectors["opening"][0]
    box, info = bytes.fromhex(case["box"]), bytes.fromhex(case["info"])
    kem, scalar = MLKEM768PrivateKey.from_seed_bytes(seed[:64]), X25519PrivateKey.from_private_bytes(seed[64:])
    ephemeral, own = box[1088:1120], scalar.public_key().public_bytes_raw()
    secrets = kem.decapsulate(box[:1088]) + scalar.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    shared = hashlib.sha3_256(secrets + ephemeral + own + bytes.fromhex("5c2e2f2f5e5c")).digest()
    suite = b"HPKE-v1HPKE" + bytes.fromhex("647a00010002")

    def extract(name: bytes, value: bytes, salt: bytes = b"") -> bytes:
        return hmac.digest(salt, suite + name + value, "sha256")

    def expand(key: bytes, name: bytes, context: bytes, length: int) -> bytes:
        return hmac.digest(key, length.to_bytes(2, "big") + suite + name + context + b"\1", "sha256")[:length]

    context = b"\0" + extract(b"psk_id_hash", b"") + extract(b"info_hash", info)
    secret = extract(b"secret", b"", shared)
    key, nonce = expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)
    assert AESGCM(key).decrypt(nonce, box[1120:], None).hex() == case["plaintext"]


# --- the two configuration files -----------------------------------------------------------------------------------


def test_the_configuration_in_the_docs_is_one() -> None:
    page = TEXT["docs/configuration.md"]
    block = "\n".join(line[4:] for line in page.splitlines() if line.startswith("    ") or not line)
    found = parse_toml(config.Settings, block.encode(), "docs")
    assert found.datasets["news"].policy().unit == "user"
    assert parse_toml(coordinator.config.Settings, b"", "docs").keep_uploads is False
    page = TEXT["docs/status-page.md"]
    for block in re.findall(r"(\[web\]\n(?: +\w+ = .+\n)+)", page):
        assert parse_toml(coordinator.config.Settings, block.encode(), "docs").web.listen
