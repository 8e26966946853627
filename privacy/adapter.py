"""The adapter as both sides see it: tensors under PEFT's names, a flat float32 vector, and its public start.

Coordinator, participants and auditors must agree on all of this bit for bit, so only numpy, safetensors and
``cryptography`` are used: no torch, no BLAS, no libm. Names and shapes come from the plan
(:class:`privacy.sections.Adapter`), never from a message. A is frozen and B trained (FFA-LoRA, Sun et al. 2024, arXiv
2403.12313), because then the mean of the B matrices is the exact aggregate: mean(B A) = mean(B) A.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import math
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import safetensors.numpy
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from safetensors import SafetensorError

from privacy import faults
from privacy.errors import UserError, shown
from privacy.files import disk_errors, fsync_directory, fsync_file, rename, replace_durably
from privacy.sections import Adapter

FROZEN_A_LABEL = b"veilsum/1/frozen-a\0"
START_LABEL = b"veilsum/1/start-adapter\0"

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
#: The model card of a release, which other adapters do not have.
CARD_FILE = "README.md"

#: Coordinates that are computed at a time, which bounds the extra memory.
TILE = 1 << 16

Vector = NDArray[np.float32]
Matrix = NDArray[np.float64]
Tensors = dict[str, NDArray[np.float32]]
Shape = tuple[int, ...]

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the adapter's tensors; both tuples are in sorted-name order, which orders the vector."""

    #: LoRA A, (rank, in_features) each; frozen, from the public seed. Where the head alone is trained, B as well; where
    #: B alone is, the head.
    frozen: tuple[tuple[str, Shape], ...]
    #: LoRA B, (out_features, rank) each, and the head, or one of the two, or with A; these are trained and released.
    trained: tuple[tuple[str, Shape], ...]

    @property
    def size(self) -> int:
        """d, the number of trained coordinates."""
        return sum(math.prod(shape) for _, shape in self.trained)


def layout_of(adapter: Adapter) -> Layout:
    """The tensors that a plan's adapter has, under the names in a saved PEFT adapter."""
    frozen: dict[str, Shape] = {}
    trained: dict[str, Shape] = {}
    (frozen if adapter.train == "lora" else trained).update(
        {f"{PREFIX}{name}": tuple(shape) for name, shape in adapter.head.items()}
    )
    (trained if adapter.train == "both" else frozen).update(
        {a_name(module): (adapter.rank, inputs) for module, (_, inputs) in adapter.modules.items()}
    )
    (frozen if adapter.train == "head" else trained).update(
        {b_name(module): (outputs, adapter.rank) for module, (outputs, _) in adapter.modules.items()}
    )
    return Layout(tuple(sorted(frozen.items())), tuple(sorted(trained.items())))


def a_name(module: str) -> str:
    """PEFT's name of a module's A matrix."""
    return f"{PREFIX}{module}.lora_A.weight"


def b_name(module: str) -> str:
    """PEFT's name of a module's B matrix."""
    return f"{PREFIX}{module}.lora_B.weight"


def _require(tensors: Mapping[str, NDArray[np.float32]], wanted: tuple[tuple[str, Shape], ...]) -> None:
    """Raise ValueError unless ``tensors`` are exactly the ``wanted`` names, in the wanted shapes, in float32."""
    names = {name for name, _ in wanted}
    for name in sorted(names ^ tensors.keys()):
        raise ValueError(f"adapter: {'missing' if name in names else 'unexpected'} tensor {name!r}")
    for name, shape in wanted:
        found = tensors[name]
        if found.shape != shape or found.dtype != np.float32:
            raise ValueError(
                f"adapter: expected {name!r} as float32 {list(shape)}, found {found.dtype} {list(found.shape)}"
            )


def check_tensors(tensors: Mapping[str, NDArray[np.float32]], layout: Layout) -> None:
    """Raise ValueError unless ``tensors`` are the whole adapter of ``layout``, every number finite."""
    _require(tensors, tuple(sorted(layout.frozen + layout.trained)))
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"adapter: expected finite numbers in {name!r}")


def trained_part(tensors: Mapping[str, NDArray[np.float32]], layout: Layout) -> Tensors:
    """Only the trained tensors of a whole adapter."""
    return {name: tensors[name] for name, _ in layout.trained}


def flatten(tensors: Mapping[str, NDArray[np.float32]], layout: Layout) -> Vector:
    """The trained tensors as one (d,) float32 vector, in sorted-name order, each row-major.

    Raises:
        ValueError: a tensor is missing, too many, or of another shape or type.
    """
    _require(tensors, layout.trained)
    if not layout.trained:
        return np.zeros(0, np.float32)
    return np.concatenate([tensors[name].reshape(-1) for name, _ in layout.trained])


def unflatten(vector: Vector, layout: Layout) -> Tensors:
    """The inverse of :func:`flatten`; the tensors are copies.

    Raises:
        ValueError: the vector is not (d,) float32.
    """
    return {name: view.copy() for name, view in _views(vector, layout).items()}


def _views(vector: Vector, layout: Layout) -> Tensors:
    """The trained tensors as views of the vector; raises as :func:`unflatten`."""
    if vector.shape != (layout.size,) or vector.dtype != np.float32:
        raise ValueError(f"adapter: expected float32 ({layout.size},), found {vector.dtype} {vector.shape}")
    tensors: Tensors = {}
    start = 0
    for name, shape in layout.trained:
        end = start + math.prod(shape)
        tensors[name] = vector[start:end].reshape(shape)
        start = end
    return tensors


class Keystream:
    """Uniform integers from AES-256-CTR, zero IV: each key is used for one stream only."""

    def __init__(self, seed: bytes, info: bytes) -> None:
        key = HKDF(SHA256(), 32, salt=None, info=info).derive(seed)
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def integers(self, count: int) -> NDArray[np.float64]:
        """(count,) float64, uniform integers in [-2^23, 2^23), exact: the upper 24 bits of little-endian words."""
        words = np.frombuffer(self._encryptor.update(bytes(4 * count)), dtype="<u4")
        return (words >> 8).astype(np.float64) - float(1 << 23)


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """sum(a b): products rounded once each, their sum correctly rounded, so the order of summation cannot matter."""
    return math.fsum(np.multiply(a, b).tolist())


def frozen_a(seed: bytes, module: str, rank: int, in_features: int) -> NDArray[np.float32]:
    """(rank, in_features) float32 with orthonormal rows from a public seed, the same bits on every machine.

    Everybody computes A alone and the plan pins its digest, so one differing bit would end the job. Hence uniform
    integers, not Gaussians (log and cos differ between libms), and Gram-Schmidt whose dot products are correctly
    rounded by ``math.fsum`` (BLAS and SIMD sums depend on their order); what remains is elementwise multiplication,
    subtraction, division and square root, which IEEE 754 defines exactly. Gram-Schmidt runs twice, which is enough for
    orthogonality to rounding error (Giraud et al. 2005). Uniform rows are not exactly rotation invariant; no property
    used here needs that.

    Raises:
        ValueError: rank > in_features; so many orthonormal rows do not exist.
    """
    if rank > in_features:
        raise ValueError(f"adapter: expected rank <= {in_features} for module {module!r}, found {rank}")
    stream = Keystream(seed, FROZEN_A_LABEL + module.encode())
    return orthonormal((stream.integers(in_features) for _ in count()), rank).astype(np.float32)


def orthonormal(candidates: Iterator[NDArray[np.float64]], rank: int) -> Matrix:
    """(rank, n) float64: Gram-Schmidt, twice, on the candidates in turn, without those in the span of others."""
    rows: list[NDArray[np.float64]] = []
    while len(rows) < rank:
        drawn = row = next(candidates)
        for previous in rows * 2:
            row = np.subtract(row, np.multiply(_dot(previous, row), previous))
        norm = math.sqrt(_dot(row, row))
        # A draw that lies almost in the span of the rows before it would be mostly rounding error: draw again.
        if norm > 2.0**-20 * math.sqrt(_dot(drawn, drawn)):
            rows.append(np.divide(row, norm))
    return np.stack(rows)


def start_adapter(adapter: Adapter) -> Tensors:
    """The whole adapter before stage 1: A from the public seed; B and the head zero, so the base model is unchanged.

    Trained or not makes no difference: the digest is that of the same tensors.

    Raises:
        ValueError: the rank is larger than a module's in_features.
    """
    seed = bytes.fromhex(adapter.seed)
    tensors = {
        a_name(module): frozen_a(seed, module, adapter.rank, inputs) for module, (_, inputs) in adapter.modules.items()
    }
    layout = layout_of(adapter)
    return {name: np.zeros(shape, np.float32) for name, shape in layout.frozen + layout.trained} | tensors


def start_digest(tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """SHA-256 over names (sorted), shapes and little-endian float32 bytes, each length-prefixed (u64, big-endian)."""
    digest = hashlib.sha256(START_LABEL)
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = b"".join(side.to_bytes(8, "big") for side in tensor.shape)
        content = np.ascontiguousarray(tensor, dtype="<f4").reshape(-1).view(np.uint8).data
        for part in (name.encode(), shape, content):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.digest()


def check_start(tensors: Mapping[str, NDArray[np.float32]], adapter: Adapter) -> None:
    """Raise UserError unless ``tensors`` are the start adapter that the plan pins."""
    found = start_digest(tensors).hex()
    if found != adapter.digest:
        raise UserError(
            f"plan: expected start adapter {adapter.digest}, found {found} from adapter.seed, modules and head",
            hint="take the plan file as it was agreed, or draft it anew with this version",
        )


def release(
    start: Mapping[str, NDArray[np.float32]],
    mean_delta: Vector,
    server_lr: float,
    layout: Layout,
    *,
    in_place: bool = False,
) -> Tensors:
    """start + server_lr * mean of the deltas, on the trained tensors; the frozen ones stay.

    The mean, never the sum, is scaled.
    Computed in float64 and rounded once, elementwise, so that every member gets the coordinator's bits.

    Args:
        mean_delta: (d,) float32; with ``in_place`` the trained tensors of the result are views of it, and it is
            overwritten: one vector of memory less.
    """
    after = mean_delta if in_place else mean_delta.copy()
    tensors = _views(after, layout)
    for name, tensor in tensors.items():
        before, part = start[name].reshape(-1), tensor.reshape(-1)
        for low in range(0, part.size, TILE):
            piece = part[low : low + TILE]
            scaled = np.multiply(float(server_lr), piece.astype(np.float64))
            piece[:] = np.add(before[low : low + TILE].astype(np.float64), scaled)
    return {name: start[name] for name, _ in layout.frozen} | tensors


def peft_config(adapter: Adapter, base_name: str) -> dict[str, object]:
    """``adapter_config.json``; keys as PEFT 0.21 writes them, its other defaults unchanged.

    An adapter without a head is a causal language model's, one with a head a sequence classifier's.
    """
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if adapter.head else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(adapter.modules),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.head}) or None,
    }


def save_peft(
    directory: Path,
    tensors: Mapping[str, NDArray[np.float32]],
    *,
    adapter: Adapter,
    base_name: str,
    card: bytes | None = None,
) -> None:
    """Write a directory that ``peft.PeftModel.from_pretrained(base, directory)`` loads bit for bit.

    The files appear together or not at all: they are written beside ``directory``, fsynced, and renamed. A repeat with
    the same tensors changes nothing; other tensors replace the whole directory, never a part of it.

    Args:
        card: the model card of a release (``privacy/card.py``).

    Raises:
        ValueError: ``tensors`` are not the plan's adapter.
        DiskError: the disk is full or the place not writable; ``directory`` is as it was.
    """
    check_tensors(tensors, layout_of(adapter))
    with disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = directory.with_name(f".{directory.name}-{secrets.token_hex(8)}")
        staging.mkdir()
        try:
            _write_files(staging, tensors, peft_config(adapter, base_name), card)
            if not _is_same(staging, directory):
                _swap_in(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _write_files(
    staging: Path, tensors: Mapping[str, NDArray[np.float32]], config: Mapping[str, object], card: bytes | None
) -> None:
    """The files of an adapter, durable; raises OSError."""
    faults.point("before-write", staging / WEIGHTS_FILE)
    try:
        # PEFT's own files carry this metadata; loaders outside PEFT ask for it.
        safetensors.numpy.save_file(dict(tensors), staging / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:  # how its library says that the disk is full
        raise OSError(f"cannot write {staging / WEIGHTS_FILE}: {error}") from error
    (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    if card is not None:
        (staging / CARD_FILE).write_bytes(card)
    for path in staging.iterdir():
        with path.open("rb+") as file:
            fsync_file(file.fileno(), path)
    fsync_directory(staging)


def _is_same(staging: Path, directory: Path) -> bool:
    """Does ``directory`` hold these very files already?"""
    pairs = [(path, directory / path.name) for path in staging.iterdir()]
    return all(old.is_file() and filecmp.cmp(new, old, shallow=False) for new, old in pairs)


def load_peft(directory: Path) -> Tensors:
    """The tensors of a saved adapter; check them with :func:`check_tensors`.

    Raises:
        UserError: no such file, or not a safetensors file of float32 tensors.
    """
    path = directory / WEIGHTS_FILE
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"{path}: expected a PEFT adapter, found: {shown(reason, 300)}",
            hint="name the directory of a released adapter",
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise UserError(f"{path}: expected float32, found {tensor.dtype} in tensor {shown(repr(name))}")
    return tensors


def _swap_in(staging: Path, directory: Path) -> None:
    """Rename ``staging`` to ``directory``; an older directory steps aside first, since rename needs an empty target."""
    if directory.exists():
        aside = staging.with_name(staging.name + "-old")
        rename(directory, aside)
        replace_durably(staging, directory)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        replace_durably(staging, directory)
