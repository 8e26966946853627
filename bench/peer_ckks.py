"""CKKS as NVFlare uses it, as tasks, run by the interpreter of .venv-peers: ``python -m bench.peer_ckks '{...}'``.

The context is FLARE's default, a vector goes in pieces of one tensor each, as
``nvflare.app_opt.he.model_encryptor`` sends them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tenseal

from bench.meter import answer

#: Coordinates in a tensor: a LoRA B matrix of rank 16 with 4,096 outputs.
TENSOR = 1 << 16


def flare_context() -> Any:
    """A CKKS context with a key of its own and FLARE's default parameters (``nvflare.lighter.impl.he.HEBuilder``)."""
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=8192,
        coeff_mod_bit_sizes=[60, 40, 40],
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.generate_relin_keys()
    context.global_scale = 2**40
    return context


def upload(vector: Path, size: int) -> dict[str, Any]:
    """Bytes of the serialised ciphertexts of the first ``size`` coordinates."""
    context = flare_context()
    delta = np.load(vector)[:size].astype(np.float64)
    parts = (delta[low : low + TENSOR] for low in range(0, size, TENSOR))
    return {"bytes": sum(len(tenseal.ckks_vector(context, part).serialize()) for part in parts)}


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "upload": lambda r: upload(Path(r["vector"]), r["size"]),
    "version": lambda _r: {"version": importlib.metadata.version("tenseal")},
}

if __name__ == "__main__":
    answer(TASKS)
