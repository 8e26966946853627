"""What is asked of torch on a GPU, as far as it can be seen without one; on a CPU nothing is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from participant import analytic, training
from participant.device import CUBLAS, Device, pick_device, repeatable
from participant.training import train
from privacy.adapter import start_adapter
from tests.helpers_learning import tiny_base, tiny_plan, word_examples


def asked() -> tuple[bool, bool, bool]:
    """(deterministic algorithms, only a warning where there is none, cuDNN tries which is fastest)."""
    torch_says = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return (*torch_says, torch.backends.cudnn.benchmark)


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CUBLAS, "so that it is put back as it was")
    monkeypatch.delenv(CUBLAS)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = asked()
    yield
    assert asked() == before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@repeatable
def settings(*, device: Device = "auto") -> tuple[bool, bool, bool]:
    del device  # is for what is around it
    return asked()


@repeatable
def diverging(*, device: Device) -> None:
    assert device == "cuda"
    assert asked() == (True, True, False)
    raise ValueError("diverged")


@pytest.mark.usefixtures("gpu")
def test_a_training_on_a_gpu_asks_for_deterministic_algorithms_while_it_runs() -> None:
    assert settings() == settings(device="cuda") == (True, True, False)
    assert settings(device="cpu") == asked() == (False, False, True)


@pytest.mark.usefixtures("gpu")
def test_what_was_asked_before_is_asked_afterwards_whatever_happens() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        before = asked()
        with pytest.raises(ValueError, match="diverged"):
            diverging(device="cuda")
        assert asked() == before == (True, False, True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("gpu")
def test_work_space_of_cublas_is_fixed_before_a_gpu_is_used_unless_somebody_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pick_device("cpu")
    assert CUBLAS not in os.environ
    assert pick_device("auto") == torch.device("cuda")
    assert os.environ[CUBLAS] == ":4096:8"
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    monkeypatch.setenv(CUBLAS, ":16:8")
    pick_device("cuda")
    assert os.environ[CUBLAS] == ":16:8"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("module", [training, analytic])
def test_training_and_statistics_are_repeatable(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool, bool]] = []

    class Enough(Exception):
        pass

    def load(*_: Any) -> Any:
        seen.append(asked())
        raise Enough

    monkeypatch.setattr(module, "load_model", load)
    plan = tiny_plan(tiny_base(tmp_path))
    begin = module.train if module is training else module.collect
    for device in ("auto", "cpu"):
        with pytest.raises(Enough):
            begin(
                plan=plan,
                base=tmp_path,
                start=start_adapter(plan.adapter),
                examples=word_examples((2, 2, 2)),
                device=device,
            )
    assert seen == [(True, True, False), (False, False, True)]


def test_on_a_cpu_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(torch, "use_deterministic_algorithms", never)
    plan = tiny_plan(tiny_base(tmp_path))
    train(
        plan=plan,
        base=tmp_path,
        start=start_adapter(plan.adapter),
        examples=word_examples((2, 2, 2)),
        device="cpu",
        threads=torch.get_num_threads(),
    )
    assert CUBLAS not in os.environ
