"""Base models in 4 bits: what they compute is what their files say, in float32, with gradients, for every task.

The other side of each comparison is the same model in full, which ``tests/helpers_four_bit.py`` unpacks by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from opacus.grad_sample import GradSampleHooks
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from participant import dp_step, generation
from participant.analytic import collect
from participant.base_model import base_digest
from participant.dp_sgd import train_private
from participant.four_bit import packed_layers, weight_of
from participant.loading import load_causal, load_classifier
from participant.self_test import SelfTest
from participant.training import Loaded, load_model, logits_of, tokenise, train
from privacy.adapter import layout_of, release, save_peft, start_adapter
from privacy.plan import Plan, parse_plan
from tests.helpers_four_bit import Pair, causals, classifiers, needs, quantised, unpacked
from tests.helpers_learning import privacy_section, private_plan, tiny_base, tiny_plan, word_examples
from tests.helpers_text import talks, text_draft, text_plan

EXAMPLES = word_examples((8, 8, 8))
PRIVACY = privacy_section(steps=3)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return classifiers(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return causals(tmp_path_factory.mktemp("causal"))


def moved(plan: Plan, base: Path) -> Loaded:
    """With B and the head away from zero, where nearly nothing has a gradient."""
    loaded = load_model(plan, base, start_adapter(plan.adapter), "cpu")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in dp_step.trainable(loaded.model):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return loaded


def close(found: Any, wanted: Any, most: float = 1e-5) -> None:
    """Apart by rounding only, measured against the largest number, and not both zero."""
    size = float(np.abs(np.asarray(wanted)).max())
    assert size > 0
    assert float(np.abs(np.asarray(found) - np.asarray(wanted)).max()) <= most * size


def gradients(loaded: Loaded, loss: torch.Tensor) -> dict[str, Any]:
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.numpy() for name, p in loaded.model.named_parameters() if p.grad is not None}


# --- the weights -----------------------------------------------------------------------------------------------------


@needs
@pytest.mark.parametrize("which", ["classifier", "causal"])
def test_a_weight_is_what_the_files_say_to_the_bit(which: str, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(which).packed
    model = load_causal(base)[0] if which == "causal" else load_classifier(base, 3)[0]
    files, layers = load_file(base / "model.safetensors"), packed_layers(base)
    named = {name.removeprefix("bert."): module for name, module in model.named_modules()}
    assert len(layers) == (14 if which == "causal" else 13)
    for name in layers:
        weight = weight_of(named[name])
        assert weight.dtype == torch.float32
        assert torch.equal(weight, unpacked(files, name))
        assert named[name].weight.dtype == torch.uint8, "it is not kept in full"


@needs
@pytest.mark.parametrize("shape", [(3, 50), (7, 9), (5, 64), (65, 129)])
def test_blocks_that_do_not_end_with_a_row_are_unpacked(shape: tuple[int, int]) -> None:
    """Rows, blocks and bytes need not end together; an odd number of weights leaves half a byte."""
    import bitsandbytes

    torch.manual_seed(1)
    layer = bitsandbytes.nn.Linear4bit(shape[1], shape[0], quant_type="nf4", compress_statistics=shape[0] > 5)
    before = layer.weight.detach().clone()
    layer.to("cpu")  # which packs
    files = {f"x.{name}": value for name, value in layer.state_dict().items()}
    assert torch.equal(weight_of(layer), unpacked(files, "x"))
    assert float((weight_of(layer) - before).abs().max()) < 0.2 * float(before.abs().max())


@needs
def test_everything_else_is_in_float32(classifier: Pair, causal: Pair) -> None:
    for model in (load_classifier(classifier.packed, 3)[0], load_causal(causal.packed)[0]):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}
    head = load_classifier(classifier.packed, 3)[0].classifier
    assert (type(head), head.weight.dtype) == (torch.nn.Linear, torch.float32)


@needs
def test_the_head_over_a_language_model_is_in_float32(causal: Pair) -> None:
    """Its config.json says nothing of a head, and what is left out by itself is the output of a language model."""
    model, _, missing = load_classifier(causal.packed, 3)
    assert missing == {"score.weight"}
    assert (type(model.score), model.score.weight.dtype) == (torch.nn.Linear, torch.float32)
    assert type(model.model.layers[1].mlp.down_proj).__name__ == "Linear4bit"


@needs
def test_layers_that_were_left_out_when_it_was_made_are_read_in_full(tmp_path: Path) -> None:
    original = tiny_base(tmp_path / "original")
    skipped = ["encoder.layer.1.output.dense", "pooler.dense"]
    base = quantised(original, tmp_path / "packed", transformers.AutoModel, llm_int8_skip_modules=skipped)
    model = load_classifier(base, 3)[0].bert
    whole = load_file(original / "model.safetensors")
    for layer in skipped:
        assert torch.equal(model.get_submodule(layer).weight, whole[f"{layer}.weight"])
    assert type(model.encoder.layer[0].output.dense).__name__ == "Linear4bit"


# --- what is computed ------------------------------------------------------------------------------------------------


@needs
def test_logits_and_gradients_of_a_classifier_are_those_in_full(classifier: Pair) -> None:
    found, wanted = (moved(tiny_plan(base), base) for base in (classifier.packed, classifier.full))
    texts, labels = tokenise(found.tokenizer, EXAMPLES.texts, 8), torch.tensor(EXAMPLES.labels)
    ours, theirs = (logits_of(loaded, texts) for loaded in (found, wanted))
    close(ours.detach(), theirs.detach())
    one, other = gradients(found, cross_entropy(ours, labels)), gradients(wanted, cross_entropy(theirs, labels))
    assert one.keys() == other.keys()
    assert len(one) == len(layout_of(tiny_plan(classifier.packed).adapter).trained)
    for name in other:
        close(one[name], other[name], 1e-4)


@needs
def test_gradients_pass_through_a_model_that_was_asked_without_before(causal: Pair) -> None:
    """bitsandbytes' own layers repack themselves when nobody wants a gradient, and then have none any more."""
    found: list[dict[str, Any]] = []
    for base in (causal.packed, causal.full):
        loaded = moved(text_plan(base), base)
        generation.check_packing(loaded, 96)  # in inference mode
        tokens = generation.synthetic(loaded, (12, 30))
        said = generation.say(loaded, generation.lay_out(tokens, loaded.tokenizer.pad_token_id))
        found.append(gradients(loaded, said.losses.sum()))
    assert len(found[0]) == len(text_plan(causal.packed).adapter.modules) == 4
    for name in found[1]:
        close(found[0][name], found[1][name], 1e-4)


@needs
def test_a_record_of_one_token_is_computed_as_in_company(causal: Pair) -> None:
    loaded = moved(text_plan(causal.packed), causal.packed)
    one = torch.tensor([[5]])
    with torch.inference_mode():
        alone = loaded.model(input_ids=one).logits
        together = loaded.model(input_ids=one.repeat(64, 1)).logits
    close(together[7], alone[0], 1e-6)


@needs
def test_autocast_reaches_the_packed_layers(causal: Pair) -> None:
    """As on a GPU, where training without privacy computes in bf16."""
    loaded = moved(text_plan(causal.packed), causal.packed)
    layer = loaded.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = layer(x)
    said.sum().backward()
    assert said.dtype == torch.bfloat16
    close(said.detach().float(), layer(x).detach(), 2e-2)
    assert x.grad is not None
    close(x.grad, weight_of(layer).sum(0).expand(3, -1), 2e-2)


@needs
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_unpacks_the_same_bits_and_computes_the_same(causal: Pair) -> None:
    plan = text_plan(causal.packed)
    both = [load_model(plan, causal.packed, start_adapter(plan.adapter), device).model for device in ("cpu", "cuda")]
    name = "base_model.model.model.layers.0.mlp.up_proj"
    assert torch.equal(*(weight_of(model.get_submodule(name)).cpu() for model in both))
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        close(both[1](input_ids=ids.cuda()).logits.cpu(), both[0](input_ids=ids).logits)


# --- the tasks -------------------------------------------------------------------------------------------------------


@needs
def test_a_classifier_is_trained_as_in_full(classifier: Pair) -> None:
    plans = [tiny_plan(base) for base in (classifier.packed, classifier.full)]
    assert plans[0].adapter == plans[1].adapter
    assert plans[0].base.digest == base_digest(classifier.packed) != plans[1].base.digest
    examples = word_examples((24, 24, 24))
    results = [
        train(plan=plan, base=base, start=start_adapter(plan.adapter), examples=examples, device="cpu")
        for plan, base in zip(plans, (classifier.packed, classifier.full), strict=True)
    ]
    assert results[0].loss < 0.9 < np.log(3)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-2)


@needs
def test_a_language_model_is_trained_and_its_adapter_loads_in_peft(causal: Pair, tmp_path: Path) -> None:
    plan, losses = text_plan(causal.packed, epochs=4), list[float]()
    start, layout = start_adapter(plan.adapter), layout_of(plan.adapter)
    result = train(
        plan=plan,
        base=causal.packed,
        start=start,
        examples=talks(16),
        device="cpu",
        progress=lambda *step: losses.append(step[2]),
    )
    assert losses[-1] < 0.8 * losses[0]
    released = release(start, result.delta, 1.0, layout)
    save_peft(tmp_path / "released", released, adapter=plan.adapter, base_name="tiny")
    plain: Any = peft.PeftModel.from_pretrained(load_causal(causal.packed)[0], str(tmp_path / "released"))
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        ours = load_model(plan, causal.packed, released, "cpu").model(input_ids=ids).logits
        assert torch.equal(plain.eval()(input_ids=ids).logits, ours)


def clipped(plan: Plan, base: Path) -> list[Any]:
    """The clipped sum of eight examples' gradients, as a private step takes it."""
    loaded = moved(plan, base)
    dp_step.make_private(loaded.model)
    hooks = GradSampleHooks(loaded.model, loss_reduction="sum")
    try:
        texts = tokenise(loaded.tokenizer, EXAMPLES.texts, plan.data.max_length)
        losses = dp_step.losses_on(loaded, texts, torch.tensor(EXAMPLES.labels), dp_step.log_prior_of(plan))
        return list(dp_step.clipped_sum(dp_step.trainable(loaded.model), losses, range(0, 24, 3), 0.5, chunk=3))
    finally:
        hooks.cleanup()


@needs
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_clipped_sums_of_a_private_step_are_those_in_full(classifier: Pair) -> None:
    sums = [clipped(private_plan(base), base) for base in (classifier.packed, classifier.full)]
    for found, wanted in zip(*sums, strict=True):
        close(found, wanted, 1e-4)


@needs
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_private_jobs_pass_the_self_test_and_train(task: str, classifier: Pair, causal: Pair) -> None:
    base = classifier.packed if task == "classification" else causal.packed
    private = (
        private_plan(base) if task == "classification" else parse_plan(text_draft(base, privacy=PRIVACY).encode()).plan
    )
    tested: list[SelfTest] = []
    result = train_private(
        plan=private,
        base=base,
        start=start_adapter(private.adapter),
        examples=EXAMPLES if task == "classification" else talks(24),
        device="cpu",
        threads=1,
        on_selftest=tested.append,
    )
    assert tested[0].passed
    assert np.isfinite(result.delta).all()
    assert np.abs(result.delta).max() > 0


@needs
def test_statistics_for_an_analytic_head_are_those_in_full(classifier: Pair) -> None:
    plans = [tiny_plan(base, head="analytic", max_weight=1024) for base in (classifier.packed, classifier.full)]
    found, wanted = (
        collect(plan=plan, base=base, start=start_adapter(plan.adapter), examples=EXAMPLES, device="cpu", threads=1)
        for plan, base in zip(plans, (classifier.packed, classifier.full), strict=True)
    )
    close(found.delta, wanted.delta)


@needs
def test_factors_of_the_method_core_are_those_in_full(classifier: Pair, tmp_path: Path) -> None:
    """They are pinned by a digest, so a weight has to be the same to the bit."""
    plans = [
        tiny_plan(base, method="core", factors_to=tmp_path / base.name) for base in (classifier.packed, classifier.full)
    ]
    assert plans[0].aggregation.core is not None
    assert plans[0].aggregation.core == plans[1].aggregation.core
    assert plans[0].adapter.digest == plans[1].adapter.digest
