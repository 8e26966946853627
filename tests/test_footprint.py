"""What ``bench/footprint.py`` counts, against what it has to be."""

from __future__ import annotations

from pathlib import Path

from bench.footprint import Footprint, footprint, plan_for
from participant.training import load_model
from privacy.adapter import start_adapter
from tests.helpers_four_bit import causals, needs
from tests.helpers_learning import tiny_base


def test_what_is_kept_grows_with_the_batch_and_the_adapter_with_the_rank(tmp_path: Path) -> None:
    base, found = tiny_base(tmp_path), dict[tuple[int, int], Footprint]()
    for rank in (2, 4):
        plan = plan_for(base, task="classification", targets=("query", "value"), rank=rank, length=8)
        loaded = load_model(plan, base, start_adapter(plan.adapter), "cpu")
        found |= {(rank, size): footprint(plan, base, loaded, size) for size in (2, 4)}
    assert 1.8 < found[2, 4].kept / found[2, 2].kept < 2.2
    # Four layers of 32 by 32: A is frozen, B is trained, and so is a head of five rows.
    assert found[2, 2].adapter == 4 * 32 * 2 * (4 + 16) + 16 * (5 * 32 + 5)
    assert found[4, 2].adapter - found[2, 2].adapter == 4 * 32 * 2 * (4 + 16)
    assert found[2, 2].weights == (base / "model.safetensors").stat().st_size // 4 * 4 - _header(base)


def _header(base: Path) -> int:
    with (base / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@needs
def test_in_4_bits_the_weights_take_less_and_nothing_more_is_kept(tmp_path: Path) -> None:
    pair = causals(tmp_path)
    found = []
    for base in (pair.packed, pair.full):
        plan = plan_for(base, task="generation", targets=("q_proj", "v_proj"), rank=4, length=32)
        found.append(footprint(plan, base, load_model(plan, base, start_adapter(plan.adapter), "cpu"), 2))
    assert found[0].weights < 0.6 * found[1].weights
    assert found[0].adapter == found[1].adapter
    assert found[0].kept <= found[1].kept, "an unpacked weight is not kept for the gradient"
