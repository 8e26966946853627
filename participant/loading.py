"""Base models off the disk, of either task: nothing is fetched, no code of the model is run, no pickle is read.

transformers is shown the files that the digest of the base model counts, and no others (``participant/base_files.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from participant import four_bit
from participant.base_files import GGUF_NAME, GGUF_SUFFIX, only_counted
from participant.base_model import in_four_bits
from privacy.errors import UserError, shown
from privacy.sections import Adapter

#: Left unsaid, transformers would ask whoever sits there whether to run code that a model's files name.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
#: By transformers, safetensors and tokenizers, about files that are not what they should be.
_RAISED = (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
HINT = "name a directory with config.json, *.safetensors and tokenizer files"


@contextmanager
def loading(base: Path, kind: str) -> Iterator[dict[str, Any]]:
    """How transformers is told of a base model's files; whatever it raises about them is a UserError of one line.

    Raises:
        UserError: it cannot load it, or as :func:`participant.base_files.counted_files`.
    """
    # Its load report would tell the user to train what is new in the model, which is what we are about to do.
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    seen = base
    try:
        with only_counted(base) as seen:
            yield _place(base, seen)
    except _RAISED as error:
        if isinstance(error, ImportError) and base.suffix == GGUF_SUFFIX:
            raise UserError(
                f"{base}: expected the package gguf, which reads such a file, found none or an older one",
                hint="install veilsum with its extra: pip install 'veilsum[participant,gguf]'",
            ) from error
        reason = str(error).replace(str(seen / GGUF_NAME), str(base)).replace(str(seen), str(base))
        reason = (reason.strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{base}: expected a base model for {kind}, found: {shown(reason, 300)}", hint=HINT) from error


def finish(model: Any, tokenizer: Any) -> None:
    """Padding needs some token; decoder-only models often have none of their own. It is masked wherever it stands."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def tokenizer_for_classes(base: Path) -> Any:
    """The tokenizer of a base model for classification or regression.

    Raises:
        UserError: transformers cannot load it.
    """
    if not base.is_dir():  # transformers would take the name for one of a model hub
        raise UserError(
            f"{base}: expected the directory of a base model, found {'a file' if base.exists() else 'none'}",
            hint=HINT,
        )
    with loading(base, "sequence classification") as place:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place, **LOCAL)
    tokenizer.name_or_path = _folder(base)
    return tokenizer


def load_classifier(base: Path, outputs: int) -> tuple[Any, Any, set[str]]:
    """(model in float32, tokenizer, names of the tensors that the files do not hold) of a local base model.

    Linear layers that the files hold in 4 bits stay so, see ``participant/four_bit.py``.

    Nothing is fetched, no code of the model directory is run, and no pickle is read.

    Raises:
        UserError: transformers cannot load it.
    """
    packed = in_four_bits(base)
    tokenizer = tokenizer_for_classes(base)
    with loading(base, "sequence classification") as place:
        about = place | {"num_labels": outputs}
        model, missing = _from_files(transformers.AutoModelForSequenceClassification, base, about, packed)
    finish(model, tokenizer)
    return model, tokenizer, missing


def _from_files(auto: Any, base: Path, about: dict[str, Any], packed: bool) -> tuple[Any, set[str]]:
    """(model in float32, names of the tensors that the files do not hold); layers in 4 bits stay packed, on the CPU."""
    if packed:
        config = transformers.AutoConfig.from_pretrained(**about, **LOCAL)
        four_bit.keep_in_full(auto, config, four_bit.packed_layers(base))
        place = about["pretrained_model_name_or_path"]
        about = {"pretrained_model_name_or_path": place, "config": config, "device_map": {"": "cpu"}}
    model, report = auto.from_pretrained(
        **about, **LOCAL, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if packed:
        four_bit.take_over(model, base)
    model.name_or_path = model.config.name_or_path = _folder(base)
    return model, set(report["missing_keys"])


def _place(base: Path, seen: Path) -> dict[str, Any]:
    """How transformers is told of a directory, or of a GGUF file; ``seen`` is what :func:`only_counted` made of it."""
    if base.is_dir():
        return {"pretrained_model_name_or_path": str(seen)}
    # The whole path: a bare name would be that of a file in the working directory, if there is one.
    return {"pretrained_model_name_or_path": str(seen), "gguf_file": str(seen / GGUF_NAME)}


def _folder(base: Path) -> str:
    """Where a model is said to lie: not where its files were only shown."""
    return str(base if base.is_dir() else base.parent)


def load_tokenizer(base: Path) -> Any:
    """The tokenizer of a causal language model, for text generation.

    Raises:
        UserError: transformers cannot load it, it cannot say where in a text a token stands, or it has no token that
            ends a text.
    """
    if not base.exists():  # transformers would take the name for one of a model hub
        raise UserError(f"{base}: expected the directory of a base model or a GGUF file, found none", hint=HINT)
    if not base.is_dir() and base.suffix != GGUF_SUFFIX:
        raise UserError(f"{base}: expected a directory or a file named *{GGUF_SUFFIX}, found another", hint=HINT)
    with loading(base, "text generation") as place:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place, **LOCAL)
    tokenizer.name_or_path = _folder(base)
    if not tokenizer.is_fast:
        raise UserError(
            f"{base}: expected a tokenizer that says where in the text a token stands, found a slow one",
            hint="take a base model with tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{base}: expected a tokenizer with an end-of-sequence token, found none", hint=HINT)
    return tokenizer


def load_causal(base: Path) -> tuple[Any, Any, set[str]]:
    """(model in float32, tokenizer, names of the tensors that the files do not hold) of a causal language model.

    Args:
        base: a directory with safetensors, or one GGUF file, which is dequantised.

    Raises:
        UserError: transformers cannot load it, or as :func:`load_tokenizer`.
    """
    packed = in_four_bits(base)
    tokenizer = load_tokenizer(base)
    with loading(base, "text generation") as place:
        model, missing = _from_files(transformers.AutoModelForCausalLM, base, place, packed)
    finish(model, tokenizer)
    return model, tokenizer, missing


def inspect_causal(base: Path, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Linear modules of a causal language model whose names end in one of ``targets``, with [out, in] features.

    Raises:
        UserError: not such a model, a tensor is missing from its files, or no module matches a target.
    """
    model, _, missing = load_causal(base)
    if missing:
        raise UserError(
            f"{base}: expected weights for every tensor, found none for {min(missing)!r}",
            hint="take a causal language model, with its output layer",
        )
    output = model.get_output_embeddings()  # often one with the embedding of the input, which is not trained
    return _matching(base, {name: module for name, module in _linear(model).items() if module is not output}, targets)


def _linear(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _matching(base: Path, linear: Mapping[str, torch.nn.Linear], targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """[out, in] features of the layers whose names end in one of ``targets``; UserError for one that none has."""
    modules: dict[str, tuple[int, int]] = {}
    for target in targets:
        names = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not names:
            found = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
            raise UserError(
                f"{base}: expected linear modules named {target!r}, found {found}", hint="name other targets"
            )
        modules |= {name: (linear[name].out_features, linear[name].in_features) for name in names}
    return modules


def load_base(base: Path, outputs: int) -> tuple[Any, Any, set[str]]:
    """What :func:`load_classifier` gives; without outputs the base model is a causal language model."""
    return load_classifier(base, outputs) if outputs else load_causal(base)


def check_model(model: Any, missing: set[str], adapter: Adapter, base: Path) -> None:
    """Raise UserError unless the model is the plan's: nothing random beside the head, modules and head as named."""
    for name in sorted(missing - adapter.head.keys()):
        raise UserError(
            f"{base}: expected weights for every tensor beside the head, found none for {name!r}",
            hint="it would start at random, differently at each site; take a base model that has it",
        )
    linear = _linear(model)
    for name, shape in adapter.modules.items():
        # Not the shape of its weight, which is another in 4 bits.
        found = (linear[name].out_features, linear[name].in_features) if name in linear else None
        if found != shape:
            raise UserError(
                f"{base}: expected a linear module {name!r} of shape {list(shape)}, "
                f"found {list(found) if found else 'none'}",
                hint="the plan was drafted for another model; correct adapter.modules",
            )
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, wanted in adapter.head.items():
        if (here := parameters.get(name)) != wanted:
            raise UserError(
                f"{base}: expected a head tensor {name!r} of shape {list(wanted)}, "
                f"found {list(here) if here else 'none'}",
                hint="the plan was drafted for another model or other labels; correct adapter.head",
            )


def inspect_model(
    base: Path, outputs: int, targets: Sequence[str]
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """(linear modules whose names end in one of ``targets``, head tensors), with shapes, for drafting a plan.

    The head is what the model's files do not hold. It must be one linear layer: a head of two, all zero at the start,
    has no gradient but for its last bias.

    Raises:
        UserError: not a base model, no module matches a target, or another head.
    """
    model, _, missing = load_classifier(base, outputs)
    linear = _linear(model)
    heads = {name.rpartition(".")[0] for name in missing}
    if len(heads) != 1 or not heads <= linear.keys() or linear[min(heads)].out_features != outputs:
        found = ", ".join(sorted(missing)) or "no tensor"
        raise UserError(
            f"{base}: expected weights for all but one linear head, found without weights: {found}",
            hint="take a base model without a classification head, with a pooler if its architecture has one",
        )
    modules = _matching(base, {name: module for name, module in linear.items() if name not in heads}, targets)
    head = {name: tuple(p.shape) for name, p in model.named_parameters() if name.rpartition(".")[0] in heads}
    return modules, head
