"""The flat vector, the public start, and PEFT's directory format."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from privacy.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Tensors,
    check_start,
    check_tensors,
    flatten,
    frozen_a,
    layout_of,
    load_peft,
    release,
    save_peft,
    start_adapter,
    start_digest,
    trained_part,
    unflatten,
)
from privacy.errors import UserError
from privacy.files import DiskError
from privacy.sections import Adapter

SEED = bytes(range(32))
#: SHA-256 of the little-endian bytes of frozen_a(SEED, "layer.0.query", 8, 384). It is the same on every machine;
#: a change of this value breaks every plan that was ever drafted.
FROZEN_A_SHA256 = "ca98c7f1d879d28322aab6a1565c88ad0210a71e59f122b50d25fdfac1959861"
#: start_digest of ADAPTER, likewise.
START_DIGEST = "19f4148a337eda1d74cd9a2d62a5b445f6cc7521860985e5440c5063742c973f"

ADAPTER = Adapter(
    rank=2,
    alpha=4.0,
    seed=SEED.hex(),
    digest="0" * 64,
    modules={"b.value": (3, 5), "a.query": (4, 6)},
    head={"classifier.weight": (3, 6), "classifier.bias": (3,)},
)
LAYOUT = layout_of(ADAPTER)


def random_tensors(seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in LAYOUT.frozen + LAYOUT.trained}


def test_layout_has_peft_names_in_sorted_order() -> None:
    assert LAYOUT.trained == (
        ("base_model.model.a.query.lora_B.weight", (4, 2)),
        ("base_model.model.b.value.lora_B.weight", (3, 2)),
        ("base_model.model.classifier.bias", (3,)),
        ("base_model.model.classifier.weight", (3, 6)),
    )
    assert LAYOUT.frozen == (
        ("base_model.model.a.query.lora_A.weight", (2, 6)),
        ("base_model.model.b.value.lora_A.weight", (2, 5)),
    )
    assert LAYOUT.size == 8 + 6 + 3 + 18


def shapes(columns: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, tuple[int, int]]]:
    names = st.text("abc.", min_size=1, max_size=8)
    return st.dictionaries(names, st.tuples(st.integers(1, 5), columns), min_size=1, max_size=4)


@given(
    modules=shapes(st.integers(3, 5)),
    head=shapes(st.integers(1, 5)),
    rank=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_unflatten_inverts_flatten(
    modules: dict[str, tuple[int, int]], head: dict[str, tuple[int, int]], rank: int, seed: int
) -> None:
    layout = layout_of(Adapter(rank=rank, alpha=1.0, seed="0" * 64, digest="0" * 64, modules=modules, head=dict(head)))
    vector = np.random.default_rng(seed).standard_normal(layout.size, np.float32)
    tensors = unflatten(vector, layout)
    assert np.array_equal(flatten(tensors, layout), vector)
    assert {name: tensor.shape for name, tensor in tensors.items()} == dict(layout.trained)


def test_unflattened_tensors_are_copies() -> None:
    vector = np.zeros(LAYOUT.size, np.float32)
    for tensor in unflatten(vector, LAYOUT).values():
        tensor += 1
    assert not vector.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model.model.classifier.bias": None}, "missing tensor 'base_model.model.classifier.bias'"),
        ({"more": np.zeros(1, np.float32)}, "unexpected tensor 'more'"),
        ({"base_model.model.classifier.bias": np.zeros(4, np.float32)}, r"float32 \[3\], found float32 \[4\]"),
        ({"base_model.model.classifier.bias": np.zeros(3, np.float64)}, r"float32 \[3\], found float64 \[3\]"),
    ],
    ids=["a tensor is missing", "a tensor too many", "another shape", "another type"],
)
def test_flatten_refuses(change: dict[str, np.ndarray | None], message: str) -> None:
    tensors = {k: v for k, v in (trained_part(random_tensors(), LAYOUT) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        flatten(tensors, LAYOUT)


@pytest.mark.parametrize(
    "vector", [np.zeros(LAYOUT.size + 1, np.float32), np.zeros(LAYOUT.size), np.zeros((1, LAYOUT.size), np.float32)]
)
def test_unflatten_refuses_another_length_or_type(vector: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected float32"):
        unflatten(vector, LAYOUT)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_tensors_refuses_what_is_not_finite(bad: float) -> None:
    tensors = random_tensors()
    check_tensors(tensors, LAYOUT)
    tensors["base_model.model.classifier.bias"][1] = bad
    with pytest.raises(ValueError, match=r"finite numbers in .*classifier\.bias"):
        check_tensors(tensors, LAYOUT)


@pytest.mark.parametrize(("rank", "features"), [(1, 1), (3, 3), (8, 384), (64, 65)])
def test_frozen_rows_are_orthonormal(rank: int, features: int) -> None:
    a = frozen_a(SEED, "module", rank, features)
    assert a.shape == (rank, features)
    assert a.dtype == np.float32
    assert np.abs(a.astype(np.float64) @ a.T.astype(np.float64) - np.eye(rank)).max() < 1e-6


def test_frozen_a_has_known_bits() -> None:
    a = frozen_a(SEED, "layer.0.query", 8, 384)
    assert hashlib.sha256(a.astype("<f4").tobytes()).hexdigest() == FROZEN_A_SHA256


def test_frozen_a_depends_on_seed_and_module_and_looks_uniform() -> None:
    one, other_seed, other_module = (
        frozen_a(SEED, "m", 4, 4096),
        frozen_a(bytes(32), "m", 4, 4096),
        frozen_a(SEED, "n", 4, 4096),
    )
    for other in (other_seed, other_module):
        assert np.abs(one.astype(np.float64) @ other.T.astype(np.float64)).max() < 0.1
    assert abs(float(one.mean())) < 4 / math.sqrt(one.size) / math.sqrt(4096)


def test_more_rows_than_features_are_refused() -> None:
    with pytest.raises(ValueError, match="expected rank <= 3 for module 'm', found 4"):
        frozen_a(SEED, "m", 4, 3)


def test_start_adapter_is_the_base_model() -> None:
    start = start_adapter(ADAPTER)
    check_tensors(start, LAYOUT)
    assert not flatten(trained_part(start, LAYOUT), LAYOUT).any()
    assert np.array_equal(start["base_model.model.a.query.lora_A.weight"], frozen_a(SEED, "a.query", 2, 6))


def test_start_digest_has_a_known_value_and_sees_names_shapes_and_bits() -> None:
    start = start_adapter(ADAPTER)
    assert start_digest(start).hex() == START_DIGEST
    renamed = {name.replace("a.query", "c.query"): tensor for name, tensor in start.items()}
    reshaped = start | {"base_model.model.classifier.weight": np.zeros((6, 3), np.float32)}
    negative_zero = start | {"base_model.model.classifier.bias": np.full(3, -0.0, np.float32)}
    assert len({start_digest(t) for t in (start, renamed, reshaped, negative_zero)}) == 4


def test_check_start_compares_with_the_plan() -> None:
    start = start_adapter(ADAPTER)
    check_start(start, ADAPTER.model_copy(update={"digest": START_DIGEST}))
    with pytest.raises(UserError, match=f"expected start adapter {'0' * 64}, found {START_DIGEST}") as caught:
        check_start(start, ADAPTER)
    assert caught.value.hint


def test_release_moves_the_trained_tensors_only() -> None:
    start = random_tensors()
    mean = np.random.default_rng(1).standard_normal(LAYOUT.size, np.float32)
    released = release(start, mean, 0.5, LAYOUT)
    check_tensors(released, LAYOUT)
    for name, _ in LAYOUT.frozen:
        assert np.array_equal(released[name], start[name])
    moved = flatten(trained_part(released, LAYOUT), LAYOUT) - flatten(trained_part(start, LAYOUT), LAYOUT)
    assert np.allclose(moved, 0.5 * mean, atol=1e-6)


def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = random_tensors()
    save_peft(tmp_path / "released", tensors, adapter=ADAPTER, base_name="tiny")
    loaded = load_peft(tmp_path / "released")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].tobytes() == tensors[name].tobytes() for name in tensors)
    assert {path.name for path in (tmp_path / "released").iterdir()} == {WEIGHTS_FILE, CONFIG_FILE}


def test_saving_again_replaces_the_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "released"
    save_peft(target, random_tensors(0), adapter=ADAPTER, base_name="tiny")
    before = target.stat().st_ino
    save_peft(target, random_tensors(0), adapter=ADAPTER, base_name="tiny")
    assert target.stat().st_ino == before
    (target / "stale").write_text("from an older version")
    save_peft(target, random_tensors(1), adapter=ADAPTER, base_name="tiny")
    assert start_digest(load_peft(target)) == start_digest(random_tensors(1))
    assert [path.name for path in tmp_path.iterdir()] == ["released"]
    assert not (target / "stale").exists()


def test_a_failed_save_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "released"
    save_peft(target, random_tensors(0), adapter=ADAPTER, base_name="tiny")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("privacy.files.os.fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        save_peft(target, random_tensors(1), adapter=ADAPTER, base_name="tiny")
    assert start_digest(load_peft(target)) == start_digest(random_tensors(0))
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


def test_saving_something_else_than_the_plans_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing tensor"):
        save_peft(tmp_path / "x", trained_part(random_tensors(), LAYOUT), adapter=ADAPTER, base_name="tiny")
    assert not list(tmp_path.iterdir())


def test_loading_what_is_no_adapter_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a PEFT adapter, found: No such file"):
        load_peft(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="expected a PEFT adapter, found"):
        load_peft(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(safetensors.numpy.save({"x": np.zeros(1)}))
    with pytest.raises(UserError, match="expected float32, found float64 in tensor 'x'"):
        load_peft(tmp_path)
