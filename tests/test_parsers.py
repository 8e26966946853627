"""Every parser on good input and on some thousand changed ones; `make fuzz` does the same for as long as one likes."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from privacy.console import MAX_LINE, one_line
from privacy.errors import shown
from tests.fuzz import seeds
from tests.fuzz.mutate import inputs
from tests.fuzz.targets import TARGETS, check, refusal

#: Bytes that parsing one small input may add to this process.
MEMORY = 1 << 30
SECONDS = 5.0
CHANGED = 1000


@pytest.fixture
def _little_memory() -> Iterator[None]:
    """An allocation out of proportion fails with MemoryError instead of succeeding unnoticed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_accepts_or_refuses_in_words(name: str) -> None:
    target, accepted, refused = TARGETS[name], 0, 0
    for number, data in enumerate(inputs(target.seeds(), CHANGED, target.longest, 1)):
        started = time.process_time()
        if check(target, data):
            accepted += 1
        else:
            refused += 1
        assert time.process_time() - started < SECONDS, f"input {number} of {len(data)} bytes takes too long"
    assert accepted, "no seed leads into the parser, so nothing behind its first check was tried"
    assert refused, "nothing was refused, so no refusal was tried"


def plan_with(old: str, new: str) -> bytes:
    plan = seeds.plans()[0].decode()
    assert old in plan
    return plan.replace(old, new).encode()


QUERY, HEAD = '"layer.0.query" = [384, 384]', '"classifier.bias" = [5]'
SIGNED = b',"signature":"%s"}\n' % (b"00" * 64)
#: What fuzzing and a close look found once: the parser, the input, and the refusal it gets now.
FOUND: dict[str, tuple[str, bytes, str]] = {
    "an integer of 5,000 digits in TOML": ("settings", b"cmax_uploads = " + b"1" * 5000, "expected a TOML file"),
    "a hexadecimal one": ("settings", b"cmax_uploads = 0x" + b"f" * 5000, "expected a TOML file"),
    "a key of half a million parts": ("plan", b"a." * 500_000 + b"a = 1", "more than 1000 dots"),
    "a value of 5,000 letters": ("plan", plan_with('"news-1"', f'"{"x" * 5000}"'), "key 'name'.*x…$"),
    "an unknown key with line end and escape sequence": ("plan", b'"a\\nb\\u001b[2J" = 1\n', "missing|unknown"),
    "an adapter of more memory than there is": (
        "plan",
        plan_with(QUERY, f'"q" = [{1 << 60}, 8]'),
        "at most 1073741824",
    ),
    "a head of more memory than there is": ("plan", plan_with(HEAD, f'"h" = [{1 << 40}]'), "at most 1073741824"),
    "a head of a hundred dimensions": ("plan", plan_with(HEAD, f'"h" = {[1] * 100}'), "at most 8 items"),
    "a rank that a module cannot have": ("plan", plan_with(QUERY, '"q" = [384, 4]'), "rank <= 4 for 'q', found 8"),
    "a head in the place of an A": (
        "plan",
        plan_with(HEAD, '"layer.0.query.lora_A.weight" = [5]'),
        "is a tensor of the adapter itself",
    ),
    "a ledger line that is no number": ("ledger", b'{"x":NaN' + SIGNED, "no floating-point number"),
    "a ledger line nested too deep": ("ledger", b'{"x":' + b"[" * 60_000 + SIGNED, "nested too deep"),
    "a ledger line of a megabyte": ("ledger", b"[" * (1 << 20) + b"\n", "at most 65536 bytes"),
    "a ledger line with a whole number of 5,000 digits": (
        "ledger",
        b'{"x":' + b"9" * 5000 + SIGNED,
        "whole numbers below 2\\*\\*53",
    ),
    "a record nested too deep": ("records", b"[" * 100_000 + b"\n", "expected a record"),
    "a manifest that is no JSON": ("manifest", b"", "expected the manifest of a release"),
    "a manifest that is a list": ("manifest", b"[]", "expected the manifest of a release"),
    "a manifest nested too deep": ("manifest", b"[" * 100_000, "expected the manifest of a release"),
    "an accusation that is no hex": (
        "manifest",
        b'{"named": [{"member": "north", "kind": "BadSeed", "evidence": "xyz"}]}',
        "expected the manifest of a release",
    ),
    "an adapter whose type of numbers does not print": (
        "adapter",
        seeds.adapters()[0].replace(b"F32", b"\x7f32"),
        r"expected a PEFT adapter, found: .*\\x7f32",
    ),
    "an adapter with a tensor of integers and a long name": (
        "adapter",
        safetensors.numpy.save({"x" * 5000: np.ones(1, np.int8)}),
        "expected float32, found int8 in tensor 'xxx.*…$",
    ),
    "a request for a key on another curve": ("request", b"d" + seeds.requests()[1], "ECDSA key on P-256"),
    "a request with a point that is not on the curve": (
        "request",
        b"d" + seeds.requests()[0].replace(b"\x03\x42\x00\x04", b"\x03\x42\x00\x05"),
        "expected a certificate request in PEM",
    ),
    "a request of another version": (
        "request",
        b"d" + seeds.requests()[0].replace(b"\x02\x01\x00", b"\x02\x01\x0a", 1),
        "expected a certificate request in PEM",
    ),
    "a request that another key signed": (
        "request",
        b"d" + seeds.requests()[0].replace(b"north", b"south"),
        "valid signature of its own key",
    ),
}


@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize("sentence", FOUND)
def test_found_once(sentence: str) -> None:
    name, data, expected = FOUND[sentence]
    started = time.process_time()
    assert not check(TARGETS[name], data)
    assert re.search(expected, refusal(TARGETS[name], data) or "")
    assert time.process_time() - started < SECONDS


def test_what_others_wrote_stays_on_its_line() -> None:
    assert shown("plain text, é") == "plain text, é"
    assert shown("a\nb\x1b[2J\u202e") == r"a\nb\x1b[2J\u202e"
    assert shown("x" * 121) == "x" * 120 + "…"
    event = one_line(None, "warning", {"event": "refused", "reason": "no\nlevel=info all is well", "size": 3})
    assert event == {"event": "refused", "reason": r"no\nlevel=info all is well", "size": 3}
    assert len(str(one_line(None, "info", {"event": "y" * 10**6})["event"])) == MAX_LINE + 1
