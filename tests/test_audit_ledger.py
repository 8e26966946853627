"""Everything that can be wrong with a ledger, and the class in which the auditor finds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import merkle
from privacy.budget.anchors import Anchor
from privacy.budget.audit import audit_ledger
from privacy.budget.checkpoint import sign_checkpoint
from privacy.budget.entries import canonical, line_of, signed_bytes
from privacy.budget.findings import Code
from privacy.budget.ledger import Ledger
from privacy.budget.report import completeness, ledger_text, to_html, to_json
from privacy.secagg.keys import identity_public
from tests.audits import (
    SELF_TEST,
    TERMS,
    anchor_of,
    audit,
    bodies,
    honest,
    private_job,
    rewritten,
)
from tests.ledgers import DATASET, KEY, OTHER_KEY, POLICY, SITE

Bodies = list[dict[str, Any]]


def lines_of(ledger: Ledger) -> list[bytes]:
    return ledger.path.read_bytes().splitlines(keepends=True)


# -- attacks on the file by somebody without the key

Tamper = Callable[[list[bytes]], list[bytes]]
TAMPERED: dict[str, tuple[Tamper, Code]] = {
    "a line is edited": (lambda x: [*x[:1], x[1].replace(b'"sigma":"1.2"', b'"sigma":"9.2"'), *x[2:]], Code.BROKEN),
    "a signature is edited": (lambda x: [*x[:-1], x[-1][:-12] + b"00000000" + x[-1][-4:]], Code.BROKEN),
    "two lines change places": (lambda x: [*x[:1], x[2], x[1], *x[3:]], Code.BROKEN),
    "a line in the middle is deleted": (lambda x: [*x[:2], *x[3:]], Code.BROKEN),
    "the first line is deleted": (lambda x: x[1:], Code.BROKEN),
    "a line is played again": (lambda x: [*x, x[1]], Code.BROKEN),
    "the end is cut off": (lambda x: x[:-1], Code.TRUNCATED),
    "a line is cut in the middle": (lambda x: [*x[:-1], x[-1][:40]], Code.BROKEN),
    "a backup of long ago is restored": (lambda x: x[:1], Code.TRUNCATED),
    "nothing is left": (lambda _: [], Code.BROKEN),
    "an empty line stands between": (lambda x: [*x[:2], b"\n", *x[2:]], Code.BROKEN),
    "garbage is appended": (lambda x: [*x, b"\xff\x00{\n"], Code.BROKEN),
}


@pytest.mark.parametrize("attack", TAMPERED)
def test_attacks_on_the_file(attack: str, tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl")
    tamper, code = TAMPERED[attack]
    report = audit(b"".join(tamper(lines_of(ledger))), anchor_of(ledger))
    assert report.code == code
    assert "complete" not in completeness(report)
    assert ledger_text(report)
    assert to_html([report], [], "now")
    assert to_json([report])["exit"] == code


@settings(max_examples=80)
@given(data=st.data())
def test_no_file_makes_the_auditor_fail(data: st.DataObject, ledger_lines: list[bytes], anchor: Anchor) -> None:
    """Bytes and lines changed, doubled, deleted and moved anywhere: each time a finding, never an error."""
    lines = list(ledger_lines)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(lines) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "delete", "double", "move"]))
        line = lines[where]
        if kind == "byte":
            at = data.draw(st.integers(0, len(line) - 1))
            lines[where] = line[:at] + bytes([data.draw(st.integers(0, 255))]) + line[at + 1 :]
        elif kind == "cut":
            lines[where] = line[: data.draw(st.integers(0, len(line)))] + b"\n"
        elif kind == "delete" and len(lines) > 1:
            del lines[where]
        elif kind == "double":
            lines.insert(data.draw(st.integers(0, len(lines))), line)
        else:
            lines.insert(data.draw(st.integers(0, len(lines) - 1)), lines.pop(where))
    report = audit(b"".join(lines), anchor)
    assert (report.code == Code.OK) == (lines == ledger_lines)


@pytest.fixture(scope="module")
def ledger_lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return lines_of(honest(tmp_path_factory.mktemp("ledger") / "news.jsonl"))


@pytest.fixture(scope="module")
def anchor(ledger_lines: list[bytes]) -> Anchor:
    return _anchor_of(b"".join(ledger_lines))


def test_a_witness_with_an_impossible_date_is_no_clock(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl")
    for time in (
        "0001-01-01T00:00:00Z",
        "8000-01-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
        "2026-11-25T23:00:00",
        "soon",
        "",
    ):
        assert audit(ledger.path.read_bytes(), anchor_of(ledger, 2, time)).found == []


def test_an_honest_ledger_has_no_finding(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl", jobs=2)
    report = audit(ledger.path.read_bytes(), anchor_of(ledger))
    assert report.found == []
    assert report.anchored == len(ledger.entries)
    assert [j.state for j in report.jobs] == ["committed", "committed"]
    first, second = report.jobs
    assert first.pld == pytest.approx(float(first.claimed))
    assert first.pld_after == pytest.approx(first.pld, abs=1e-9)
    assert first.pld < second.pld_after < second.naive_after == pytest.approx(2 * first.pld)
    assert second.pld_after <= report.rdp_after <= second.enforced_after <= 8


# -- attacks by the site itself, which can sign anything


def _swap(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**body, **changes}


def _mechanism(**changes: Any) -> Callable[[Bodies], Bodies]:
    return lambda x: [x[0], _swap(x[1], mechanism={**x[1]["mechanism"], **changes}), *x[2:]]


def _self_test(changes: dict[str, Any]) -> Callable[[Bodies], Bodies]:
    """The result in START with other values; ``None`` takes a value out, and ``passed`` stays true unless changed."""
    whole = SELF_TEST | changes | {"passed": changes.get("passed") is not False}
    found = {key: value for key, value in whole.items() if value is not None}
    return lambda x: [*x[:2], _swap(x[2], selftest=found), *x[3:]]


def _bomb(lines: Bodies) -> Bodies:
    step = {
        "type": "PoissonSampledDpEvent",
        "sampling_probability": "0.1",
        "event": {"type": "GaussianDpEvent", "noise_multiplier": "0.01"},
    }
    event = {"type": "SelfComposedDpEvent", "count": 1000, "event": step}
    return _mechanism(rate="0.1", sigma="0.01", steps=1000, event=event)(lines)


SIGNED: dict[str, tuple[Callable[[Bodies], Bodies], Code]] = {
    "a bomb of sigma = 0.01": (_bomb, Code.UNSUPPORTED),
    "an unknown kind of mechanism": (_mechanism(kind="shuffled"), Code.UNSUPPORTED),
    "another event than the fields say": (_mechanism(sigma="1.3"), Code.UNSUPPORTED),
    "shuffling sold as Poisson": (_mechanism(sampling="shuffle"), Code.UNSUPPORTED),
    "2^60 steps": (_mechanism(steps=1 << 60), Code.BROKEN),
    "a floating-point number": (_mechanism(sigma=1.2), Code.BROKEN),
    "a key too many": (lambda x: [x[0], _swap(x[1], gdp="0.1"), *x[2:]], Code.BROKEN),
    "a time that is none": (lambda x: [*x[:-1], _swap(x[-1], time="2026-13-77T99:99:99Z")], Code.BROKEN),
    "a job reserved twice": (lambda x: [x[0], x[1], *x[1:]], Code.REPLAY),
    "a job started twice": (lambda x: [*x[:3], *x[2:]], Code.REPLAY),
    "a round released twice": (lambda x: [*x[:4], *x[3:]], Code.REPLAY),
    "lines of another data set": (lambda x: [x[0], *(_swap(b, dataset="cd" * 32) for b in x[1:])], Code.REPLAY),
    "a release without a start": (lambda x: [*x[:2], *x[3:]], Code.BROKEN),
    "a start without a reservation": (lambda x: [x[0], *x[2:]], Code.BROKEN),
    "a commit without a release": (lambda x: [*x[:3], x[4]], Code.BROKEN),
    "a line after the abort": (
        lambda x: [*x[:3], _swap(x[2], kind="ABORT", reason="x", selftest=None), *x[3:]],
        Code.BROKEN,
    ),
    "the wall clock is set back": (lambda x: [*x[:3], _swap(x[3], time="2026-11-25T11:59:59Z"), x[4]], Code.CLOCK),
    "the monotonic clock is set back": (lambda x: [*x[:3], _swap(x[3], monotonic="123456788"), x[4]], Code.CLOCK),
    "a line from the future": (lambda x: [*x[:4], _swap(x[4], time="2026-12-25T12:00:00Z")], Code.CLOCK),
    "no self-test": (lambda x: [*x[:2], _swap(x[2], selftest=None), *x[3:]], Code.SELF_TEST),
    "a self-test that failed": (_self_test({"passed": False}), Code.SELF_TEST),
    "a self-test of nothing": (_self_test(dict.fromkeys(SELF_TEST)), Code.SELF_TEST),
    "a sensitivity of 38 clipping norms": (_self_test({"sensitivity": "38.6"}), Code.SELF_TEST),
    "a sensitivity that is no number": (_self_test({"sensitivity": "NaN"}), Code.SELF_TEST),
    "a sensitivity below none": (_self_test({"sensitivity": "-1"}), Code.SELF_TEST),
    "a sensitivity that is no decimal string": (_self_test({"sensitivity": True}), Code.SELF_TEST),
    "noise that is none": (_self_test({"noise_ks_p": "0"}), Code.SELF_TEST),
    "noise of another size": (_self_test({"noise_size_deviations": "361.9"}), Code.SELF_TEST),
    "a record drawn twice": (_self_test({"sampler_repeats": "1"}), Code.SELF_TEST),
    "a batch that sees another": (_self_test({"chunking": "0.5"}), Code.SELF_TEST),
    "a PLD claimed too low": (
        lambda x: [x[0], _swap(x[1], claim=x[1]["claim"] | {"pld": "0.5"}), *x[2:]],
        Code.DIFFERS,
    ),
    "an RDP claimed too low": (lambda x: [x[0], _swap(x[1], claim=x[1]["claim"] | {"rdp": "1"}), *x[2:]], Code.DIFFERS),
    "an epsilon claimed too high": (
        lambda x: [x[0], _swap(x[1], claim=x[1]["claim"] | {"pld": "3"}), *x[2:]],
        Code.DIFFERS,
    ),
    "a divergence charged too low": (lambda x: [x[0], _swap(x[1], rdp={"3": "0.1"}), *x[2:]], Code.DIFFERS),
    "a divergence at another order": (lambda x: [x[0], _swap(x[1], rdp={"8": "0.1"}), *x[2:]], Code.DIFFERS),
    "more steps run than charged": (lambda x: [*x[:4], _swap(x[4], steps=76)], Code.DIFFERS),
}


@pytest.mark.parametrize("attack", SIGNED)
def test_attacks_that_are_rightly_signed(attack: str, tmp_path: Path) -> None:
    change, code = SIGNED[attack]
    raw = rewritten(change(bodies(honest(tmp_path / "news.jsonl"))), write=_write_anything)
    assert audit(raw, _anchor_of(raw)).code == code


def _write_anything(body: dict[str, Any]) -> bytes:
    """A line by a site that does not even keep to the keys of a kind."""
    if body["kind"] == "ABORT":
        body = {key: value for key, value in body.items() if key != "selftest"}
    raw = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return line_of(raw, KEY.sign(signed_bytes(raw)))


def _anchor_of(raw: bytes) -> Anchor:
    """A witness who believes any bytes."""
    lines = raw.splitlines()
    return Anchor(len(lines), merkle.root([merkle.leaf_hash(line) for line in lines]), "the witness")


RAW: dict[str, tuple[bytes, bytes]] = {
    "a key stands there twice": (b'"stage":1', b'"stage":1,"stage":1'),
    "NaN": (b'"stage":1', b'"stage":NaN'),
    "Infinity": (b'"stage":1', b'"stage":Infinity'),
    "2^60": (b'"stage":1', b'"stage":1152921504606846976'),
    "an integer of five thousand digits": (b'"stage":1', b'"stage":' + b"9" * 5000),
    "spaces": (b'"stage":1', b'"stage": 1'),
    "an object ten thousand levels deep": (b'"stage":1', b'"stage":' + b"[" * 10000 + b"]" * 10000),
    "a line of a megabyte": (b'"plan":"news-1"', b'"plan":"' + b"x" * (1 << 20) + b'"'),
}


@pytest.mark.parametrize("attack", RAW)
def test_lines_that_two_readers_could_read_differently(attack: str, tmp_path: Path) -> None:
    old, new = RAW[attack]

    def write(body: dict[str, Any]) -> bytes:
        raw = canonical(body).replace(old, new)
        return line_of(raw, KEY.sign(signed_bytes(raw)))

    raw = rewritten(bodies(honest(tmp_path / "news.jsonl")), write=write)
    report = audit(raw, _anchor_of(raw))
    assert report.code == Code.BROKEN
    assert len(report.entries) == 1


def test_the_ledger_of_another_site(tmp_path: Path) -> None:
    raw = rewritten(bodies(honest(tmp_path / "news.jsonl")), OTHER_KEY)
    assert audit(raw).code == Code.REPLAY
    assert audit_ledger(raw, identity_public(OTHER_KEY), source="", anchors=[_anchor_of(raw)], terms=TERMS).found == []


def test_a_fork(tmp_path: Path) -> None:
    ledger, other = honest(tmp_path / "a" / "news.jsonl", 2), honest(tmp_path / "b" / "news.jsonl", 1)
    for line in private_job(3):
        other.append(line)
    assert len(ledger.entries) == len(other.entries)
    report = audit(ledger.path.read_bytes(), anchor_of(other))
    assert report.code == Code.FORK
    assert report.anchored is None


def test_an_old_anchor_vouches_for_its_own_lines_only(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl", 2)
    report = audit(ledger.path.read_bytes(), anchor_of(ledger, 5))
    assert report.found == []
    assert completeness(report) == "9 lines; the first 5 are complete by the anchors, 4 came later"


def test_a_sites_own_checkpoint_convicts_and_vouches_for_nothing(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl")
    raw, note, anchor = ledger.path.read_bytes(), ledger.checkpoint(), anchor_of(ledger, 2)
    short = b"".join(lines_of(ledger)[:4])
    other = sign_checkpoint(KEY, DATASET, 5, bytes(32))
    forged = sign_checkpoint(OTHER_KEY, DATASET, *ledger.head())

    def code(lines: bytes, own: bytes, *anchors: Anchor) -> Code:
        return audit_ledger(lines, SITE, source="", anchors=anchors, own=own, terms=TERMS).code

    assert code(raw, note) == Code.NO_ANCHOR
    assert code(raw, note, anchor) == Code.OK
    assert code(short, note, anchor) == Code.TRUNCATED
    assert code(raw, other, anchor) == Code.FORK
    assert code(raw, forged, anchor) == code(raw, b"garbage", anchor) == Code.BROKEN


def test_a_line_that_is_older_than_a_witness_of_those_before(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl", 2)
    raw = ledger.path.read_bytes()
    assert audit(raw, anchor_of(ledger), anchor_of(ledger, 5, "2026-11-25T12:04:59Z")).found == []
    assert audit(raw, anchor_of(ledger), anchor_of(ledger, 5, "2026-11-25T12:05:01Z")).code == Code.CLOCK


def test_without_an_anchor_nothing_is_called_complete(tmp_path: Path) -> None:
    report = audit(honest(tmp_path / "news.jsonl").path.read_bytes())
    assert report.code == Code.NO_ANCHOR
    everything = (
        "\n".join(ledger_text(report)) + json.dumps(to_json([report])["ledgers"]) + to_html([report], [], "now")
    )
    assert "complete" not in everything.lower()


def test_a_budget_raised_for_no_reason(tmp_path: Path) -> None:
    lines = bodies(honest(tmp_path / "news.jsonl"))
    common = {k: lines[-1][k] for k in ("v", "dataset", "time", "boot", "monotonic")}
    policy = POLICY.model_copy(update={"epsilon": "20"}).model_dump(mode="json")
    raw = rewritten([*lines, common | {"kind": "POLICY", "policy": policy, "reason": ""}])
    assert audit(raw, _anchor_of(raw)).code == Code.BROKEN
