"""The small round whose every byte is in the vectors, with boxes that stay the same from run to run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from coordinator import phases
from privacy.encoding import digest, label
from privacy.secagg import keys
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.keys import HybridKey
from privacy.secagg.messages import (
    AbortProof,
    AbortStatement,
    ListedInput,
    ListProof,
    Offer,
    RoundAborted,
    Shares,
)
from privacy.secagg.signed import sign
from tests.simulation import Simulation, identity, seeded

DIRECTORY = Path(__file__).parent / "vectors"
Json = dict[str, Any]


# --- boxes that stay the same ------------------------------------------------------------------------------------


class Boxes:
    """Sealed boxes by what they hold; a box that is missing is sealed once."""

    def __init__(self) -> None:
        path = DIRECTORY / "boxes.json"
        known = json.loads(path.read_text())["boxes"] if path.exists() else []
        self._known: dict[str, Json] = {box["id"]: box for box in known}
        self.used: dict[str, Json] = {}
        self.receiver: dict[str, bytes] = {}
        self._seal = keys.seal

    def seal(self, public: bytes, plaintext: bytes, info: bytes) -> bytes:
        """Stands in for :func:`keys.seal`."""
        if not plaintext:  # a trial seal: nobody keeps it
            return self._seal(public, plaintext, info)
        name = digest("test box", public, plaintext, info).hex()[:16]
        made = self._known.get(name) or {"id": name, "box": self._seal(public, plaintext, info).hex()}
        self.used[name] = {"id": name, "info": info.hex(), "box": made["box"], "plaintext": plaintext.hex()}
        self.receiver[name] = public
        return bytes.fromhex(made["box"])


# --- one small round ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Recorded:
    """A round of four in which member 1 falls silent before M5, with every byte that made it."""

    simulation: Simulation
    boxes: Boxes
    drawn: dict[int, list[bytes]]
    to_member: dict[str, Any]
    from_member: dict[str, Any]


@contextmanager
def recorded_randomness(drawn: dict[int, list[bytes]]) -> Iterator[None]:
    """Members draw from ``seeded``, and every draw is kept."""

    def keeping(seed: str) -> Callable[[int], bytes]:
        rand, kept = seeded(seed), drawn.setdefault(int(seed.split()[1]), [])

        def draw(count: int) -> bytes:
            kept.append(rand(count))
            return kept[-1]

        return draw

    with mock.patch("tests.simulation.seeded", keeping):
        yield


@cache
def recorded_round() -> Recorded:
    boxes = Boxes()
    drawn: dict[int, list[bytes]] = {}
    to_member: dict[str, Any] = {}
    from_member: dict[str, Any] = {}

    def to(member: int, message: ToMember) -> ToMember:
        to_member.setdefault(type(message).__name__, (member, message))
        return message

    def back(member: int, message: FromMember) -> FromMember:
        body = message.root.body if isinstance(message, Shares) else message.body
        from_member.setdefault(type(body).__name__, (member, message))
        return message

    with mock.patch.object(keys, "seal", boxes.seal), recorded_randomness(drawn):
        simulation = Simulation(4, 0, size=5, silent={1: "M5"}, to_member=to, from_member=back).run()
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.is_exact()
    header = simulation.context.header
    to_member["RoundAborted"] = (0, RoundAborted(header, "too few members: é"))
    statement = sign(identity(2), 2, AbortStatement("as asked"), header.hash())
    from_member["AbortStatement"] = (2, statement)
    vote = from_member["SurvivorVote"][1]
    listed = tuple(ListedInput(m.sender, m.body.root) for m in to_member["SurvivorList"][1].inputs)
    proofs = (AbortProof(header, (statement,)), ListProof(header, listed, (vote,)))
    to_member["Offer with proofs"] = (0, Offer(replace(header, round=2), proofs))
    return Recorded(simulation, boxes, drawn, to_member, from_member)


def key_seeds() -> dict[bytes, bytes]:
    """Public key -> the 96 bytes it came from, for the share and mask keys of the recorded round."""
    found: dict[bytes, bytes] = {}
    for drawn in recorded_round().drawn.values():
        share_seed, mask_secret = drawn[:2]
        mask_seed = keys.hkdf(mask_secret, b"", label(keys.LABEL_MASK_KEY), 96)
        found |= {HybridKey.from_seed(seed).public: seed for seed in (share_seed, mask_seed)}
    return found
