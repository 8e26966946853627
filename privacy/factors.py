"""The frozen factors of the method "core": U and V of W ~ U S V, from the public weights of the base model.

Between them each site trains an r x r matrix R (LoRA-XS, Balazy et al. 2024, arXiv 2405.17604; Fed-SB, Singhal et al.
2025, arXiv 2502.15436). Who has the base model computes them alone, bit for bit as everybody else
(``privacy/linear.py``), so the plan can pin their digest. Coordinator and auditors have no base model: they get the
file, and check its digest.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from privacy.adapter import PREFIX, Matrix, Shape, Tensors, a_name, start_adapter, start_digest
from privacy.errors import UserError, shown
from privacy.files import make_private_directory, read_file, write_durably
from privacy.linear import leading
from privacy.plan import Plan
from privacy.sections import Adapter

#: Directory of such files, in a release.
FACTORS = "factors"
#: A direction whose singular value is smaller than this, relative to the largest, is one of rounding error.
SMALLEST = 2.0**-20


def in_name(module: str) -> str:
    """Name of V, (rank, in_features), orthonormal rows; it is A of the adapter."""
    return f"{PREFIX}{module}.core_in"


def out_name(module: str) -> str:
    """Name of U, (out_features, rank), orthonormal columns; B of the adapter is U R."""
    return f"{PREFIX}{module}.core_out"


def factored(weights: Iterable[tuple[str, NDArray[np.float32]]], rank: int, seed: bytes) -> Tensors:
    """U and V of each module, float32.

    Args:
        weights: (module, (out_features, in_features)) of the base model.
        rank: at most the smaller of both.
        seed: where the iteration begins; public.

    Raises:
        ValueError: a weight of a smaller rank.
    """
    found: Tensors = {}
    for module, weight in weights:
        if rank > min(weight.shape):
            raise ValueError(f"expected a rank of at most {min(weight.shape)} for module '{module}', found {rank}")
        left, right = leading(weight.astype(np.float64), rank, seed, module)
        lengths = _lengths(left)
        if lengths.min() <= SMALLEST * lengths.max():
            raise ValueError(f"expected weights of rank {rank} or more in module '{module}', found a smaller rank")
        found[out_name(module)] = np.divide(left, lengths).astype(np.float32)
        found[in_name(module)] = right.astype(np.float32)
    return found


def _lengths(left: Matrix) -> NDArray[np.float64]:
    """Of the columns, added up row by row: ``np.linalg.norm`` may add in another order elsewhere."""
    total = np.zeros(left.shape[1])
    for row in left:
        total = np.add(total, np.multiply(row, row))
    return np.sqrt(total)


def first_start(adapter: Adapter, factors: Tensors | None) -> Tensors:
    """The whole adapter before stage 1; A is V where there are factors."""
    tensors = start_adapter(adapter)
    if factors is not None:
        tensors |= {a_name(module): factors[in_name(module)] for module in adapter.modules}
    return tensors


def factors_file(directory: Path, digest: str) -> Path:
    """Where the factors with this digest lie in a directory of such files."""
    return directory / f"{digest}.safetensors"


def keep_factors(directory: Path, factors: Tensors, *, private: bool = True) -> str:
    """Write factors under their digest, which is returned in hex. Raises DiskError."""
    digest = start_digest(factors).hex()
    if private:
        make_private_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_durably(factors_file(directory, digest), safetensors.numpy.save(factors), private=private)
    return digest


def load_factors(directory: Path, plan: Plan) -> Tensors:
    """The factors that a plan pins.

    Raises:
        UserError: no such file, or other factors in it.
    """
    settings = plan.aggregation.core
    assert settings is not None
    path = factors_file(directory, settings.factors)
    hint = "take the file that was drafted with the plan"
    raw = read_file(path, f"the factors of plan '{plan.name}'", hint)
    try:
        found = safetensors.numpy.load(raw)
        digest = start_digest(found).hex()
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected factors, found: {shown(str(error), 300)}", hint=hint) from error
    if digest != settings.factors or {name: t.shape for name, t in found.items()} != _shapes(plan.adapter):
        raise UserError(f"{path}: expected the factors {settings.factors}, found {digest}", hint=hint)
    return found


def _shapes(adapter: Adapter) -> dict[str, Shape]:
    inside: dict[str, Shape] = {
        in_name(module): (adapter.rank, inputs) for module, (_, inputs) in adapter.modules.items()
    }
    return inside | {out_name(module): (outputs, adapter.rank) for module, (outputs, _) in adapter.modules.items()}
