"""A federation whose plan has an analytic head and then the adapter behind it, on a real engine with real sites."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from participant.analytic import means_of
from privacy.adapter import Tensors, load_peft
from privacy.analytic import head_of, pack
from tests.analytic import Part
from tests.on_disk import OnDisk
from tests.staged import released
from tests.test_end_to_end import SITE, toy_plan

FEATURES = 8
HEAD = "base_model.model.classifier.weight"
B = "base_model.model.encoder.query.lora_B.weight"
SECTIONS = b"""[aggregation]
head = "analytic"
[aggregation.analytic]
ridge = 0.001
feature_clip = 2.0
min_class_count = 3
[round]"""
CONSENT = SITE + "min_class_count = 3\n"


def aligned_plan(stages: int = 2, stage_s: int = 100_000, *changes: tuple[bytes, bytes]) -> bytes:
    """The toy plan with an analytic head and so many stages; of one stage it is the head alone."""
    raw, train = toy_plan(), b'"lora"' if stages > 1 else b'"head"'
    for old, new in (
        (b'task = "classification"', b'task = "classification"\nstages = %d' % stages),
        (b"alpha = 4.0", b"alpha = 4.0\ntrain = " + train),
        (b"epochs = 1", b"epochs = 1\nsharpness = 10.0" if stages > 1 else b"epochs = 1"),
        (b"[round]", SECTIONS),
        (b"bits = 24", b"bits = 32"),
        *changes,
    ):
        assert old in raw, old
        raw = raw.replace(old, new, 1)
    return raw + b"stage_s = %d\n" % stage_s


def part_of(member: int, features: int = FEATURES) -> Part:
    """What a member has: 100 + member records of two classes, as features, most of them of one class."""
    rng = np.random.default_rng(member)
    labels = (rng.random(100 + member) < (0.9 if member % 2 else 0.1)).astype(int)
    centres = np.random.default_rng(99).normal(size=(2, features))
    return centres[labels] + 0.7 * rng.normal(size=(len(labels), features)), tuple(labels.tolist())


class Aligned(OnDisk):
    """Sites that leave statistics of made-up features in stage 1, and made-up deltas of B after it."""

    def vector_of(self, member: int, stage: int = 1) -> NDArray[np.int32]:
        if stage > 1:
            return super().vector_of(member, stage)
        job = self.job.at(1)
        part = part_of(member, head_of(job.plan).features)
        count, rand = len(part[1]), np.random.default_rng(member)
        return job.quantizer.quantize(
            pack(*means_of(*part, job.plan), job.plan.round.clip),
            count,
            {"weight": count, "loss": 0},
            lambda size: rand.bytes(size),
        )


def world_of(directory: Path, plan: bytes) -> Aligned:
    return Aligned(directory, plan=plan, site_toml=CONSENT)


def adapter_of(world: OnDisk, stage: int) -> Tensors:
    """As it was published."""
    return load_peft(released(world, stage) / "adapter")


def pooled_head(members: tuple[int, ...]) -> NDArray[np.float64]:
    """(classes, features): the ridge solution of these members' records, by LAPACK."""
    parts = [part_of(member) for member in members]
    z = np.clip(np.concatenate([features for features, _ in parts]) / 2.0, -1, 1)
    targets = np.eye(2)[[label for _, labels in parts for label in labels]]
    gram = z.T @ z / len(z) + 0.001 * np.eye(FEATURES)
    return np.asarray(np.linalg.solve(gram, z.T @ targets / len(z))).T / 2.0
