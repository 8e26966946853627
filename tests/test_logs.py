"""What the log says: in every line which plan, stage, round and member it is about, and nothing that is a secret."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import structlog
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from coordinator import phases
from participant import running
from participant.round import ParticipantRound
from privacy import console
from privacy.encoding import decode
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import UnmaskShares
from privacy.wire import federation_pb2 as pb
from tests.hostile import ANSWER_S, Hostile
from tests.on_disk import OnDisk

# --- looking for secrets ---------------------------------------------------------------------------------------------

#: Bytes that are looked for at a time; so many of a secret in a log are no accident.
WINDOW = 12


def forms(piece: bytes) -> Iterator[str]:
    """How a program may print bytes: hex, base64 wherever they begin, repr, and as numbers."""
    yield piece.hex()
    yield piece.hex().upper()
    for before in range(3):
        text = base64.b64encode(bytes(before) + piece).decode()[-(-before * 8 // 6) : -4]
        yield text
        yield text.replace("+", "-").replace("/", "_")
    yield repr(piece)[2:-1]
    yield ", ".join(map(str, piece))


def windows(secret: bytes, most: int = 64) -> Iterator[bytes]:
    """Pieces of a secret, spread over it; what is nearly constant is none."""
    for at in sorted({round(x) for x in np.linspace(0, max(0, len(secret) - WINDOW), most)}):
        piece = secret[at : at + WINDOW]
        if len(piece) == WINDOW and len(set(piece)) > WINDOW // 2:
            yield piece


def leaked(log: str, secrets: dict[str, list[bytes]]) -> list[str]:
    """Kinds of secrets of which a piece stands in the log."""
    return [
        kind
        for kind, found in secrets.items()
        if any(form in log for secret in found for piece in windows(secret) for form in forms(piece))
    ]


def private_keys(directory: Path) -> list[bytes]:
    """Every private key below a directory, raw."""
    found = []
    for path in directory.rglob("*.key"):
        key: Any = load_pem_private_key(path.read_bytes(), None)
        found += [
            path.read_bytes().splitlines()[1],
            key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        ]
    return found


@pytest.mark.parametrize("before", range(3))
def test_the_search_finds_a_secret_in_every_form(before: int) -> None:
    secret = os.urandom(48)
    for show in (
        bytes.hex,
        lambda found: found.hex().upper(),
        lambda found: base64.b64encode(os.urandom(before) + found).decode(),
        lambda found: base64.urlsafe_b64encode(os.urandom(before) + found).decode(),
        repr,
        lambda found: str(list(found)),
        lambda found: str(np.frombuffer(found, np.uint8).tolist()),
    ):
        assert leaked(f"a line {show(secret)} of a log", {"it": [secret]}) == ["it"]
    assert leaked("a line without it " + os.urandom(200).hex(), {"it": [secret]}) == []


@pytest.mark.parametrize("as_json", [False, True], ids=["console", "json"])
def test_a_round_says_nothing_of_keys_seeds_shares_and_vectors(
    tmp_path: Path, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[bytes] = []

    def rand(size: int) -> bytes:
        drawn.append(os.urandom(size))
        return drawn[-1]

    monkeypatch.setattr(running, "ParticipantRound", partial(ParticipantRound, rand=rand))
    console.set_up_logs(as_json=as_json)
    world = OnDisk(tmp_path)
    world.ready()
    world.run(until=phases.Unmasking)
    world.say(0, world.rounds[-1].row.id, world.rounds[-1].machine.message_for(1))  # type: ignore[arg-type]
    world.run()
    shares = [s.share for message in messages(world) if isinstance(message, UnmaskShares) for s in message.shares]
    log = capsys.readouterr().err
    assert all(event in log for event in ("round opened", "uploaded", "released"))
    spools = [p.read_bytes() for p in tmp_path.rglob("spool-*.bin")]
    secrets = {
        "private keys": private_keys(tmp_path),
        "seeds": drawn,
        "shares": shares,
        "vectors": [*spools, *(p.read_bytes() for p in tmp_path.rglob("quantised.i32"))],
    }
    assert all(len([w for s in found for w in windows(s)]) > 10 for found in secrets.values())
    assert leaked(log, secrets) == []
    for kind, found in secrets.items():
        structlog.get_logger().info("found", it=found[-1].hex())
        assert leaked(capsys.readouterr().err, {kind: found}) == [kind]


def messages(world: OnDisk) -> Iterator[Any]:
    """Bodies of what members sent in the last round, as the coordinator keeps them."""
    for event in world.engine.store.events(world.rounds[-1].row.id):
        if event.kind == "message":
            found: Any = decode(FromMember, event.payload)  # type: ignore[arg-type]
            yield getattr(found, "body", None)


def test_a_bug_of_ours_shows_its_traceback_and_no_variable_of_a_frame(capsys: pytest.CaptureFixture[str]) -> None:
    """Some renderers print the local variables of every frame, and those are secrets here."""
    console.set_up_logs()
    secret = "a secret in a frame"
    try:
        raise RuntimeError(str(len(secret)))
    except RuntimeError:
        structlog.get_logger().error("a bug", exc_info=True)
    shown = capsys.readouterr().err
    assert "RuntimeError" in shown
    assert secret not in shown.replace('secret = "a secret in a frame"', "")


# --- what a line is about --------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    found = Hostile(tmp_path / "h", large=False)
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, found.log])
    yield found
    found.close()


ABOUT = ("plan", "stage", "round", "member")


def test_a_line_about_a_call_says_plan_stage_round_and_member_and_the_next_call_does_not(hostile: Hostile) -> None:
    hostile.caller(3).upload(hostile.uploads[3])
    (line,) = hostile.log.find("upload received")
    assert [line[key] for key in ABOUT] == ["toy", 1, 1, "site-3"]
    with pytest.raises(grpc.RpcError):
        hostile.caller(3).stub.Send(pb.SendRequest(round=b"?"), timeout=ANSWER_S)
    line = hostile.log.find("refused")[-1]
    assert [line.get(key) for key in ABOUT] == [None, None, None, "site-3"]
    with pytest.raises(grpc.RpcError):
        hostile.caller(2).stub.Ready(pb.ReadyRequest(plan=hostile.world.digest, stage=7), timeout=ANSWER_S)
    line = hostile.log.find("expected stage")[-1]
    assert [line.get(key) for key in ABOUT] == ["toy", 7, None, "site-2"]


def test_every_line_of_the_coordinators_work_says_its_round(hostile: Hostile) -> None:
    for member, upload in hostile.uploads.items():
        hostile.caller(member).upload(upload)
    hostile.world.run()
    lines = [line for line in hostile.log.lines if line["event"] in ("survivors fixed", "unmasking", "released")]
    assert len(lines) >= 3
    assert all([line[key] for key in ABOUT[:3]] == ["toy", 1, 1] for line in lines)


def test_a_site_binds_what_it_works_on_and_lets_go_of_it(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def keep(_logger: object, _method: str, event: Any) -> Any:
        seen.append(dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.contextvars.merge_contextvars, keep])
    world = OnDisk(tmp_path)
    seen.clear()
    world.ready()
    world.run()
    assert all(line["round"] == 1 and line["plan"] == "toy" for line in seen if line["event"] == "uploaded")
    daemon = world.daemons[0]
    daemon._consider(daemon.client.plans()[0])
    (line,) = [line for line in seen if line["event"] == "plan"]
    assert (line["plan"], line["stage"]) == ("toy", 1)
    structlog.get_logger().info("after")
    assert seen[-1].keys() == {"event"}
    assert sys.exc_info() == (None, None, None)
