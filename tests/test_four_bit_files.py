"""Which quantised base models are taken, what the others are told, and what doctor says of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from participant import doctor
from participant.base_model import base_digest, in_four_bits, memory_of
from participant.config import Home, Settings
from participant.four_bit import STATE
from participant.loading import load_causal, load_classifier
from participant.training import load_model
from privacy.adapter import start_adapter
from privacy.checks import Check
from privacy.errors import UserError
from tests.helpers_four_bit import Pair, causals, needs
from tests.helpers_learning import tiny_base
from tests.helpers_text import text_plan

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return causals(tmp_path_factory.mktemp("causal"))


# --- what is refused -------------------------------------------------------------------------------------------------


def says(directory: Path, settings: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    (directory / "model.safetensors").write_bytes(b"")
    return directory


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "found quant_method 'gptq'"),
    "AWQ": ({"quant_method": "awq", "bits": 4}, "found quant_method 'awq'"),
    "FP8": ({"quant_method": "fp8"}, "found quant_method 'fp8'"),
    "no name at all": ({"bits": 4}, "found quant_method None"),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "found bitsandbytes 8 bits in uint8"),
    "FP4": (BNB | {"bnb_4bit_quant_type": "fp4"}, "found bitsandbytes fp4 in uint8"),
    "packed in other numbers": (BNB | {"bnb_4bit_quant_storage": "bfloat16"}, "found bitsandbytes nf4 in bfloat16"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_quantisations_are_refused_with_what_is_taken(case: str, tmp_path: Path) -> None:
    settings, found = OTHERS[case]
    base = says(tmp_path / "base", settings)
    loads: list[Any] = [
        lambda: load_classifier(base, 3),
        lambda: load_causal(base),
        lambda: in_four_bits(base),
    ]
    for load in loads:
        with pytest.raises(UserError, match="in 4 bits by bitsandbytes") as caught:
            load()
        assert found in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_a_config_says_is_shown_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        in_four_bits(says(tmp_path / "base", {"quant_method": "x\x1b[2J\n" + "y" * 5000}))
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    base = says(tmp_path / "base", BNB)
    loads: list[Any] = [lambda: load_classifier(base, 3), lambda: load_causal(base)]
    for load in loads:
        with pytest.raises(UserError, match="expected the package bitsandbytes") as caught:
            load()
        assert "veilsum[participant,quantized]" in caught.value.hint


def test_a_model_without_quantisation_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not in_four_bits(tiny_base(tmp_path / "base"))
    assert not in_four_bits(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{")
    assert not in_four_bits(tmp_path), "transformers says what is wrong with it"


@needs
def test_a_base_of_other_bytes_is_refused(causal: Pair, tmp_path: Path) -> None:
    plan = text_plan(causal.packed)
    base = shutil.copytree(causal.packed, tmp_path / "copy")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_compute_dtype"] = "float16"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected base model tiny with digest"):
        load_model(plan, base, start_adapter(plan.adapter), "cpu")


@needs
def test_a_config_of_4_bits_over_files_in_full_is_refused(causal: Pair, tmp_path: Path) -> None:
    base = shutil.copytree(causal.full, tmp_path / "base")
    shutil.copy(causal.packed / "config.json", base)
    with pytest.raises(UserError, match="expected weights packed in 4 bits"):
        load_causal(base)


def stated(state: torch.Tensor, **changes: Any) -> torch.Tensor:
    """What is said of a packed weight, said otherwise."""
    about = json.loads(bytes(state.tolist())) | changes
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def damaged(tensors: dict[str, torch.Tensor], damage: str) -> None:
    layer = "model.layers.0.mlp.up_proj"
    weight, absmax, outer, state = (
        f"{layer}{end}" for end in (".weight", ".weight.absmax", ".weight.nested_absmax", STATE)
    )
    match damage:
        case "no scales":
            del tensors[absmax]
        case "fewer scales":
            tensors[absmax] = tensors[absmax][:-1].clone()
        case "more scales of scales":
            tensors[outer] = tensors[outer].repeat(2)
        case "fewer bytes":
            tensors[weight] = tensors[weight][:-64].clone()
        case "state is no JSON":
            tensors[state] = torch.full((40,), 255, dtype=torch.uint8)
        case "another shape":
            tensors[state] = stated(tensors[state], shape=[32, 64])
        case "blocks of nothing":
            tensors[state] = stated(tensors[state], blocksize=0)
        case "sixteen numbers of another kind":
            tensors[f"{layer}.weight.quant_map"] = tensors[f"{layer}.weight.quant_map"].half()


@needs
@pytest.mark.parametrize(
    "damage",
    [
        *("no scales", "fewer scales", "more scales of scales", "fewer bytes", "state is no JSON", "another shape"),
        *("blocks of nothing", "sixteen numbers of another kind"),
    ],
)
def test_damaged_files_are_a_users_mistake(damage: str, causal: Pair, tmp_path: Path) -> None:
    base = shutil.copytree(causal.packed, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    damaged(tensors, damage)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"expected a (weight in 4 bits|base model)") as caught:
        load_causal(base)
    assert "\n" not in str(caught.value)


def test_no_code_is_fetched_from_a_model_hub(tmp_path: Path) -> None:
    """bitsandbytes asks the package kernels for some when it is imported, on CPUs with AVX-512 BF16."""
    (tmp_path / "kernels.py").write_text("print('fetched')")
    for first, wanted in (("", "fetched"), ("import participant\n", "refused")):
        script = f"{first}try:\n    import kernels\nexcept ImportError:\n    print('refused')"
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == wanted


# --- what doctor says ------------------------------------------------------------------------------------------------


def looked(models: dict[str, Path]) -> list[Check]:
    settings = {"coordinator": "localhost:1", "member": "a", "models": {n: str(p) for n, p in models.items()}}
    return list(doctor._models(Home(Path("unused"), Settings.model_validate(settings))))


@needs
def test_doctor_says_what_a_model_in_4_bits_takes(causal: Pair) -> None:
    [found] = looked({"mine": causal.packed})
    assert found.state == "ok"
    assert base_digest(causal.packed) in found.found
    assert f"bitsandbytes {importlib.metadata.version('bitsandbytes')}" in found.found
    model, _, _ = load_causal(causal.packed)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    state = [m.quant_state for m in model.modules() if type(m).__name__ == "Linear4bit"]
    held += sum(one.absmax.numel() + 4 * (one.code.numel() + one.state2.absmax.numel() + 256) for one in state)
    assert held < memory_of(causal.packed) < 1.2 * held, "a little is said of each layer in JSON beside its numbers"


def test_doctor_names_each_model_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = looked({"a": says(tmp_path / "a", BNB), "b": says(tmp_path / "b", {"quant_method": "gptq"})})
    assert [check.state for check in found] == ["fail", "fail"]
    assert "expected the package bitsandbytes" in found[0].found
    assert "veilsum[participant,quantized]" in found[0].todo
    assert "quant_method 'gptq'" in found[1].found
