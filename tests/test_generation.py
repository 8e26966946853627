"""Fine-tuning a causal language model: padded and packed, what a token's loss is, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from participant import generation
from participant.base_model import base_digest
from participant.evaluation import accuracy
from participant.factors import of_base
from participant.generation import check_packing, foretell, lay_out, record_losses, say, seen_by, synthetic
from participant.loading import load_causal
from participant.text_data import Records
from participant.tokens import Tokens, encode
from participant.training import Loaded, TrainingResult, load_model, train
from privacy.adapter import layout_of, release, start_adapter, start_digest
from privacy.errors import UserError
from privacy.factors import first_start, load_factors
from privacy.methods import merged
from privacy.plan import Plan, parse_plan
from tests.helpers_text import conversation, pair, plain, talks, text_draft, text_plan, tiny_causal

MIXED = Records((*talks(5).records, plain("Once upon a time"), pair("2 + 2 = ", "4")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plan(base: Path) -> Plan:
    return text_plan(base, max_length=256)


@pytest.fixture(scope="module")
def loaded(plan: Plan, base: Path) -> Loaded:
    """The model with a B that is not zero."""
    adapter, generator = start_adapter(plan.adapter), torch.Generator().manual_seed(3)
    for name, tensor in adapter.items():
        if "lora_B" in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator).numpy()
    return load_model(plan, base, adapter, "cpu")


def tokens_of(loaded: Loaded, records: Records = MIXED) -> list[Tokens]:
    return encode(loaded.tokenizer, records.records, "model", 256)


def run(plan: Plan, base: Path, records: Records | None = None, **about: Any) -> TrainingResult:
    start = start_adapter(plan.adapter)
    return train(plan=plan, base=base, start=start, examples=records or talks(24), device="cpu", **about)


def altered(plan: Plan, section: str, **changes: Any) -> Plan:
    """``plan`` with some keys of one section replaced, not validated again."""
    return plan.model_copy(update={section: getattr(plan, section).model_copy(update=changes)})


# --- what is learnt --------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_of_what_nobody_trained_on(plan: Plan, base: Path) -> None:
    steps: list[tuple[int, int, float]] = []
    result = run(plan, base, progress=lambda *step: steps.append(step))
    layout = layout_of(plan.adapter)
    assert result.delta.shape == (layout.size,)
    assert result.delta.dtype == np.float32
    assert result.examples == 24
    assert [step for step, _, _ in steps] == list(range(1, 13))
    assert result.loss == pytest.approx(np.mean([loss for _, _, loss in steps[-6:]]))
    released = release(start_adapter(plan.adapter), result.delta, 1.0, layout)
    held_out = talks(9, 24)
    before, after = (
        accuracy(plan=plan, base=base, adapter=a, examples=held_out, device="cpu") for a in (None, released)
    )
    assert before.total == after.total == sum(len(r.messages[1].content) + 1 for r in held_out.records)
    assert after.loss < 0.95 * before.loss


def test_the_same_plan_and_data_give_the_same_delta(plan: Plan, base: Path) -> None:
    torch.manual_seed(1)
    first = run(plan, base)
    torch.manual_seed(2)
    assert np.array_equal(first.delta, run(plan, base).delta)
    assert not np.array_equal(first.delta, run(altered(plan, "training", seed=1), base).delta)


def test_what_a_user_says_is_not_learnt(plan: Plan, base: Path) -> None:
    """The gradient knows the user's words as context only: the loss is that of the answers alone."""
    losses: list[float] = []
    one = altered(plan, "training", epochs=1, batch_size=4)
    run(one, base, talks(4), progress=lambda _step, _of, loss: losses.append(loss))
    expected = accuracy(plan=plan, base=base, adapter=None, examples=talks(4), device="cpu").loss
    assert losses == [pytest.approx(expected, rel=1e-5)]


# --- padded and packed -----------------------------------------------------------------------------------------------


def test_a_tokens_loss_is_that_of_its_record_alone(loaded: Loaded) -> None:
    """Against the model itself, one record at a time and without any mask: padding and packing change nothing."""
    expected, right, owners = [], [], []
    for number, tokens in enumerate(tokens_of(loaded)):
        with torch.inference_mode():
            logits = loaded.model(input_ids=tokens.ids[None]).logits[0, :-1]
        chosen = tokens.counted[1:]
        expected.append(cross_entropy(logits[chosen], tokens.ids[1:][chosen], reduction="none"))
        right.append(logits[chosen].argmax(-1) == tokens.ids[1:][chosen])
        owners += [number] * int(chosen.sum())
    for width in (None, 256):
        laid = lay_out(tokens_of(loaded), loaded.tokenizer.pad_token_id, width)
        assert laid.ids.shape[0] == (2 if width else 7)
        with torch.inference_mode():
            said = say(loaded, laid)
        torch.testing.assert_close(said.losses, torch.cat(expected), rtol=1e-4, atol=1e-4)
        assert torch.equal(said.right, torch.cat(right))
        assert said.owners.tolist() == owners
        means = record_losses(said, len(expected))
        torch.testing.assert_close(means, torch.stack([e.mean() for e in expected]), rtol=1e-4, atol=1e-4)


def test_padded_and_packed_training_differ_by_rounding_alone(base: Path) -> None:
    both = [text_plan(base, max_length=256, batch_size=8, packing=packing) for packing in (False, True)]
    padded, packed = (run(plan, base) for plan in both)
    assert packed.examples == padded.examples == 24, "a record is an example, packed or not"
    assert packed.loss == pytest.approx(padded.loss, rel=1e-4)
    apart = np.linalg.norm(packed.delta - padded.delta) / np.linalg.norm(padded.delta)
    assert 0 < apart < 1e-2


def test_a_packed_record_does_not_see_the_others(loaded: Loaded) -> None:
    first, second = synthetic(loaded, (6, 7))
    other = replace(first, ids=first.ids.flip(0))
    found = []
    for before in (first, other):
        with torch.inference_mode():
            said = say(loaded, lay_out([before, second], 0, 20))
        found.append(said.losses[said.owners == 1])
    assert torch.equal(*found)


def test_what_a_method_sees_of_the_records_is_padded_whatever_the_plan_says(base: Path, loaded: Loaded) -> None:
    """One row a record, its own tokens first: statistics are taken record by record."""
    seen = seen_by(loaded, text_plan(base, packing=True, max_length=256), MIXED)
    assert [text.tolist() for text in seen.texts] == [tokens.ids.tolist() for tokens in tokens_of(loaded)]
    with torch.inference_mode():
        logits = seen.forward(seen.texts[:3])
        alone = seen.forward(seen.texts[1:2])
    assert logits.shape == (3, max(map(len, seen.texts[:3])), len(loaded.tokenizer))
    torch.testing.assert_close(logits[1, : len(seen.texts[1])], alone[0], rtol=1e-4, atol=1e-4)


def test_rows_are_filled_in_the_order_of_the_records() -> None:
    batch = [Tokens(torch.arange(10, 10 + n), torch.tensor([False] + [True] * (n - 1))) for n in (3, 2, 4, 1)]
    laid = lay_out(batch, 0, 6)
    assert laid.ids.tolist() == [[10, 11, 12, 10, 11], [10, 11, 12, 13, 10]]
    assert laid.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert laid.owners.tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 3]]
    assert laid.counted.int().tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 1, 0]]
    padded = lay_out(batch, 7)
    assert padded.ids.tolist() == [[10, 11, 12, 7], [10, 11, 7, 7], [10, 11, 12, 13], [10, 7, 7, 7]]
    assert padded.owners.tolist() == [[0, 0, 0, -1], [1, 1, -1, -1], [2] * 4, [3, -1, -1, -1]]
    assert (padded.packed, laid.packed) == (False, True)


def test_packing_is_refused_where_the_model_would_let_records_see_one_another(
    base: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_packing(loaded, 256)
    check_packing(loaded, 4)
    real = generation.logits_of

    def blind(loaded: Loaded, laid: generation.Laid) -> torch.Tensor:
        return real(loaded, replace(laid, packed=False))  # a mask of padding, and no positions

    monkeypatch.setattr(generation, "logits_of", blind)
    with pytest.raises(UserError, match="expected packed records not to see one another") as caught:
        run(text_plan(base, packing=True), base)
    assert "packing = false" in caught.value.hint
    run(text_plan(base, epochs=1), base, talks(4))


def test_layers_of_another_kind_are_not_adapted(tmp_path: Path) -> None:
    """GPT-2 has its own class for what elsewhere is linear."""
    base = tiny_causal(tmp_path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    with pytest.raises(UserError, match="expected linear modules named 'c_attn', found none"):
        text_draft(base, targets=("c_attn",))


SMALL: dict[str, Any] = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
LLAMAS: dict[str, Any] = SMALL | {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMAS: dict[str, Any] = LLAMAS | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
NEOX: dict[str, Any] = SMALL | {"intermediate_size": 64, "num_attention_heads": 4}
#: Architecture -> (its smallest model, does it tell packed records apart?).
ARCHITECTURES: dict[str, tuple[Callable[[], Any], bool]] = {
    "Qwen": (lambda: transformers.Qwen2Config(**LLAMAS), True),
    "Mistral, with a window": (lambda: transformers.MistralConfig(**LLAMAS, sliding_window=8), True),
    "Gemma, with a window in some layers": (lambda: transformers.Gemma2Config(**GEMMAS), True),
    "GPT-NeoX": (lambda: transformers.GPTNeoXConfig(**NEOX, eos_token_id=0), True),
    "BLOOM": (lambda: transformers.BloomConfig(**SMALL, n_head=4), False),
    "Falcon": (lambda: transformers.FalconConfig(**SMALL, num_attention_heads=4), False),
    "Mamba": (lambda: transformers.MambaConfig(**SMALL), False),
}


@pytest.mark.parametrize(("config", "tells"), ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_the_model_itself_is_asked_whether_it_tells_packed_records_apart(
    loaded: Loaded, config: Callable[[], Any], tells: bool
) -> None:
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = replace(loaded, model=auto.from_config(config()).eval())
    with nullcontext() if tells else pytest.raises(UserError, match="packed records not to see one another"):
        check_packing(model, 64)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_adds_up_over_batches_of_any_size(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(loaded)
    whole = foretell(loaded, tokens)
    monkeypatch.setattr(generation, "BATCH_TOKENS", 1)  # a record alone is taken whatever its length
    singly = [foretell(loaded, [one]) for one in tokens]
    split = foretell(loaded, tokens)
    assert (
        whole.tokens == split.tokens == sum(one.tokens for one in singly) == sum(int(t.counted.sum()) for t in tokens)
    )
    assert whole.right == split.right == sum(one.right for one in singly)
    assert whole.nats == pytest.approx(sum(one.nats for one in singly), rel=1e-5)
    assert whole.nats == pytest.approx(split.nats, rel=1e-5)


# --- what is cut, and what is refused --------------------------------------------------------------------------------


def test_a_record_whose_answer_is_cut_off_stays_an_example(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records((*talks(6).records, conversation("long " * 60, "unheard")))
    plan = text_plan(base, epochs=1, batch_size=1, max_length=128)
    result = run(plan, base, records)
    assert result.examples == 7
    assert np.isfinite(result.delta).all()
    assert "nothing to learn" in capsys.readouterr().out


def test_records_with_nothing_to_learn_are_a_users_mistake(base: Path) -> None:
    with pytest.raises(UserError, match="expected records with a token that counts within 16 tokens, found none"):
        run(text_plan(base, max_length=16), base)


def test_a_model_that_lacks_a_tensor_is_refused(base: Path, tmp_path: Path) -> None:
    other = tiny_causal(tmp_path, tie_word_embeddings=False)
    model, _, _ = load_causal(other)
    model.model.save_pretrained(other)  # without its output layer
    for what in (
        lambda: text_plan(other),
        lambda: run(altered(text_plan(base), "base", digest=base_digest(other)), other),
    ):
        with pytest.raises(UserError, match=r"expected weights for every tensor.*found none for 'lm_head\.weight'"):
            what()


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    base = tiny_causal(tmp_path)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="expected a tokenizer with an end-of-sequence token"):
        load_causal(base)


def test_what_is_no_base_model_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the directory of a base model or a GGUF file, found none"):
        load_causal(tmp_path / "gone")
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(UserError, match=r"expected a directory or a file named \*\.gguf"):
        load_causal(tmp_path / "model.bin")
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(UserError, match="expected a base model for text generation, found: ") as caught:
        load_causal(tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)


def test_a_missing_package_for_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("no gguf")

    (tmp_path / "model.gguf").write_text("x")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(UserError, match="expected the package gguf") as caught:
        load_causal(tmp_path / "model.gguf")
    assert "veilsum[participant,gguf]" in caught.value.hint


# --- the plan --------------------------------------------------------------------------------------------------------


def test_a_draft_for_text_generation_is_a_plan(base: Path) -> None:
    plan = parse_plan(
        text_draft(base, template="chatml", packing=True, targets=("o_proj", "mlp.down_proj")).encode()
    ).plan
    assert plan.generation is not None
    assert (plan.task, plan.generation.template, plan.generation.packing) == ("generation", "chatml", True)
    assert (plan.data.labels, plan.adapter.head, plan.training.loss) == ((), {}, "cross_entropy")
    assert plan.adapter.modules == {
        f"model.layers.{layer}.{name}": shape
        for layer in (0, 1)
        for name, shape in (("self_attn.o_proj", (32, 32)), ("mlp.down_proj", (32, 64)))
    }
    assert text_plan(base).adapter.modules.keys() == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    }
    assert plan.base.digest == base_digest(base)


def test_targets_that_are_not_there_and_the_output_layer_are_named(base: Path) -> None:
    for target in ("query", "lm_head"):
        with pytest.raises(
            UserError, match=rf"linear modules named '{target}', found down_proj, gate_proj, k_proj, o_proj"
        ):
            text_draft(base, targets=(target,))


LABELLED = '[data]\nlabels = ["a", "b"]\n'
HEADED = '[adapter.head]\n"score.weight" = [2, 32]\n[adapter.modules]'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[generation]\n", "[generations]\n", "unknown key 'generations'"),
        ('task = "generation"', 'task = "classification"', "at least two labels"),
        ("[data]\n", '[data]\nlabels = ["a"]\n', r"data\.labels: expected none for task"),
        ("[adapter.modules]", HEADED, r"adapter\.head: expected none"),
        ('"cross_entropy"', '"logit_adjusted"', r"training\.loss: expected cross_entropy"),
        ('template = "model"', 'template = "own"', r"generation\.template"),
    ],
)
def test_what_a_plan_cannot_say(base: Path, old: str, new: str, message: str) -> None:
    text = text_draft(base)
    assert old in text
    with pytest.raises(UserError, match=message):
        parse_plan(text.replace(old, new, 1).encode())


def test_a_section_of_text_generation_has_no_place_in_another_plan(base: Path) -> None:
    text = text_draft(base)
    other = text.replace('task = "generation"', 'task = "classification"').replace("[data]\n", LABELLED)
    other = other.replace("[adapter.modules]", HEADED)
    with pytest.raises(UserError, match="expected this section with task"):
        parse_plan(other.encode())
    lines = text.splitlines()
    start = lines.index("[generation]")
    without = "\n".join(lines[:start] + lines[lines.index("[training]") :])
    with pytest.raises(UserError, match="expected this section with task"):
        parse_plan(without.encode())


def test_a_language_model_has_factors_too(tmp_path: Path) -> None:
    """Method "core": drafting and a site factor the causal model alike, and the core between them learns."""
    base = tiny_causal(tmp_path / "base")
    plan = text_plan(base, method="core", factors_to=tmp_path, learning_rate=0.1, epochs=6)
    assert plan.aggregation.core is not None
    factors = of_base(base, 0, tuple(plan.adapter.modules), plan.adapter.rank, plan.adapter.seed)
    assert start_digest(factors).hex() == plan.aggregation.core.factors
    records = Records((plain("the cat sat on the mat"),) * 8)
    start = first_start(plan.adapter, load_factors(tmp_path, plan))
    vector = train(plan=plan, base=base, start=start, examples=records, device="cpu", factors=factors).delta
    after = merged(start, vector, plan, factors=factors).tensors
    losses = [accuracy(plan=plan, base=base, adapter=a, examples=records, device="cpu").loss for a in (start, after)]
    assert losses[1] < 0.9 * losses[0]
