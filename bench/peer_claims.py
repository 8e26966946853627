"""What docs/comparison.md says of other frameworks and can be run: ``.venv-peers/bin/python -m bench.peer_claims``.

``scripts/peers.sh`` makes that environment. The code that runs is that of published wheels; what is written here is
what a coordinator, or one client with it, would do with the answers. ``fate`` and ``openfl`` take a wheel more each,
see :data:`EXTRA`. A claim that does not hold ends with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

SIZE = 1000
#: Wheels that one claim needs, installed with ``--no-deps``. That of fate-utils is for CPython 3.11 on x86-64 only.
EXTRA = {"fate": "fate-utils==0.1.0", "openfl": "openfl==1.9"}


# --- Flower ----------------------------------------------------------------------------------------------------------


def flower_seed(keys: int = 4000) -> tuple[bool, str]:
    """How many bits of a pairwise key ever reach the generator of its mask?"""
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.common.secure_aggregation import secaggplus_utils as utils
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key

    seeds: list[int] = []

    def generator(seed: int) -> np.random.RandomState:
        seeds.append(seed)
        return np.random.RandomState(seed)

    mine = ec.generate_private_key(ec.SECP384R1())
    numpy, utils.np = utils.np, SimpleNamespace(random=SimpleNamespace(RandomState=generator), int64=np.int64)
    try:
        for _ in range(keys):
            theirs = ec.generate_private_key(ec.SECP384R1()).public_key()
            utils.pseudo_rand_gen(generate_shared_key(mine, theirs), 1 << 32, [(1,)])
    finally:
        utils.np = numpy
    ever = int(np.bitwise_or.reduce(np.array(seeds, np.uint64)))
    return (
        ever.bit_count() <= 28,
        f"{ever.bit_count()} bits of a mask's seed ever vary, over {keys} keys ({ever:#010x})",
    )


def flower_overlap(cohorts: Sequence[int] = (4, 8, 16)) -> tuple[bool, str]:
    """One request that calls a client alive and lost at once; then its update, from its upload alone."""
    worst = max(_opened(n) for n in cohorts)
    said = f"the update of one client, opened by the server alone in cohorts of {', '.join(map(str, cohorts))}; "
    return worst < 1e-4, said + f"largest error {worst:.1e}"


def _opened(n: int) -> float:
    """Largest error of a client's update as the server gets it. Asked: the others, once each."""
    from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares
    from flwr.common.secure_aggregation.quantization import dequantize
    from flwr.common.secure_aggregation.secaggplus_constants import Key

    from bench.peer_flower import CLIPPING_RANGE, MAX_WEIGHT, MOD_RANGE, TARGET_RANGE, WEIGHT, client, cohort

    made, victim = cohort(n), 1
    update = np.random.default_rng(n).normal(0, 0.5, SIZE).astype(np.float32)
    uploads = {}
    for node, state in made.states.items():
        parameters = ndarrays_to_parameters([update * node])
        uploads[node] = client._collect_masked_vectors(state, made.inbox(node), WEIGHT, parameters)
    request = {Key.ACTIVE_NODE_ID_LIST: list(made.states), Key.DEAD_NODE_ID_LIST: [victim]}
    seeds, keys = [], []
    for node in set(made.states) - {victim}:
        answer = client._unmask(made.states[node], request)
        both = [s for i, s in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True) if i == victim]
        seeds.append(both[0])
        keys.append(both[1])
    # From here on: its upload, the public keys, and those shares.
    found = [bytes_to_ndarray(part) for part in uploads[victim][Key.MASKED_PARAMETERS]]
    shapes = [part.shape for part in found]
    private = client.bytes_to_private_key(combine_shares(keys))
    masks = [(1, combine_shares(seeds))]
    for node in set(made.states) - {victim}:
        public = client.bytes_to_public_key(made.public_keys[node][0])
        masks.append((1 if victim > node else -1, client.generate_shared_key(private, public)))
    for sign, seed in masks:
        stream = client.pseudo_rand_gen(seed, MOD_RANGE, shapes)
        found = [part - sign * mask for part, mask in zip(found, stream, strict=True)]
    (opened,) = dequantize([np.mod(found[1], MOD_RANGE)], CLIPPING_RANGE, TARGET_RANGE)
    return float(np.abs(opened * MAX_WEIGHT / WEIGHT - update).max())


def flower_dropout(n: int = 5) -> tuple[bool, str]:
    """Is there an aggregate when one of n clients is lost before, or after, it has shared its keys?"""
    early, late = _survives(n, shared=False), _survives(n, shared=True)
    return (
        not early and late,
        f"one of {n} lost after sharing: {_word(late)}; lost in setup or while sharing: {_word(early)}",
    )


def _word(survives: bool) -> str:
    return "an aggregate" if survives else "the round fails"


def _survives(n: int, *, shared: bool) -> bool:
    from flwr.app import ConfigRecord, RecordDict
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD
    from flwr.server.workflow.constant import Key as WorkflowKey
    from flwr.server.workflow.secure_aggregation import secaggplus_workflow as server
    from flwr.supercore.task_identity import TaskIdentity

    from bench.peer_flower import MOD_RANGE, TARGET_RANGE, client, cohort

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    made, lost = cohort(n), 1
    for node, state in made.states.items():
        for source, ciphertext in zip(made.sources[node], made.ciphertexts[node], strict=True):
            if shared or source != lost:
                plain = client.decrypt(state.ss2_dict[source], ciphertext)
                kept = client.share_keys_plaintext_separate(plain)[2:]
                state.rd_seed_share_dict[source], state.sk1_share_dict[source] = kept

    def reply(message: Any) -> Any:
        """What a node sends back; an exception of the client becomes an error there, too."""
        node, error = message.metadata.dst_node_id, ""
        content = RecordDict()
        try:
            asked = message.content.config_records[RECORD_KEY_CONFIGS]
            content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(client._unmask(made.states[node], asked))})
        except KeyError as missing:
            error = f"KeyError: {missing}"
        metadata = SimpleNamespace(src_node_id=node)
        return SimpleNamespace(content=content, metadata=metadata, has_error=lambda: bool(error), error=error)

    everybody = set(made.states)
    state = server.WorkflowState(
        active_node_ids=everybody - {lost},
        sampled_node_ids=everybody,
        threshold=made.threshold,
        clipping_range=8.0,
        quantization_range=TARGET_RANGE,
        mod_range=MOD_RANGE,
        nid_to_neighbours=dict.fromkeys(everybody, everybody),
        nid_to_publickeys=made.public_keys,
        aggregate_ndarrays=[np.ones(1, np.int64), np.zeros(SIZE, np.int64)],
    )
    context = SimpleNamespace(
        state=RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})}),
        strategy=SimpleNamespace(aggregate_fit=lambda _round, _results, _failures: (None, {})),
    )
    grid = SimpleNamespace(send_and_receive=lambda messages, **_: [reply(message) for message in messages])
    workflow = server.SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.6)
    return bool(workflow.unmask_stage(grid, context, state))


# --- NVIDIA FLARE ----------------------------------------------------------------------------------------------------


def flare_key() -> tuple[bool, str]:
    """Does the context that FLARE gives every client open what another client encrypted?

    The parameters and the call of ``serialize`` are those of ``nvflare.lighter.impl.he.HEBuilder``.
    """
    import tenseal

    from bench.peer_ckks import flare_context

    kit = flare_context().serialize(
        save_public_key=True, save_secret_key=True, save_galois_keys=False, save_relin_keys=True
    )
    update = np.random.default_rng(0).normal(0, 0.01, SIZE)
    one, another = tenseal.context_from(kit), tenseal.context_from(kit)
    sent = tenseal.ckks_vector(one, update).serialize()
    error = float(np.abs(np.array(tenseal.ckks_vector_from(another, sent).decrypt()) - update).max())
    return error < 1e-6, f"one client's kit opens another client's ciphertext; largest error {error:.1e}"


# --- FATE ------------------------------------------------------------------------------------------------------------


def fate_low_bits(members: Sequence[int] = (2, 5, 11)) -> tuple[bool, str]:
    """What of a single masked vector, as FATE's own binary makes it, is not masked at all?"""
    from fate_utils.secure_aggregation_helper import RandomMix

    values = np.random.default_rng(0).normal(0, 1e-3, 100 * SIZE)
    step, agree = 2.0**-30, True
    for n in members:
        seeds = {rank: np.random.default_rng(rank).bytes(32) for rank in range(1, n)}
        decimal, _ = RandomMix(seeds, 0).mix_one(values, None)
        # Sums of masks below n are multiples of `step`; adding them rounds what is below 2**-53 times n.
        agree &= bool(np.allclose(_below(decimal, step), _below(values, step), rtol=0, atol=n * 2.0**-50))
    size = values.size * len(members)
    return agree, f"x mod 2^-30 read off each of {size:,} masked coordinates, {', '.join(map(str, members))} members"


def _below(values: Any, step: float) -> Any:
    """What is left of multiples of ``step``, centred on zero, so that rounding does not wrap."""
    return np.remainder(values + step / 4, step)


# --- OpenFL ----------------------------------------------------------------------------------------------------------


def openfl_mask() -> tuple[bool, str]:
    """Is a mask of OpenFL a vector, or one number?"""
    crypto = _module("openfl/utilities/secagg/crypto.py")
    private = crypto.pseudo_random_generator(0.123)
    pairs = [[1, other, bytes([other]) * 32] for other in (2, 3, 4)]
    mask = private + crypto.calculate_shared_mask(pairs)
    return isinstance(
        mask, float
    ), f"the whole mask of a client, for all coordinates and rounds: one float ({mask:.4f})"


def _module(path: str) -> ModuleType:
    """One file of an installed package, without the package's own imports: its other dependencies are not here."""
    package = path.partition("/")[0]
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError(package)
    spec = importlib.util.spec_from_file_location(
        "claimed", f"{found.submodule_search_locations[0]}/{path[len(package) + 1 :]}"
    )
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLAIMS: dict[str, Callable[[], tuple[bool, str]]] = {
    "flower-seed": flower_seed,
    "flower-overlap": flower_overlap,
    "flower-dropout": flower_dropout,
    "flare-key": flare_key,
    "fate-low-bits": fate_low_bits,
    "openfl-mask": openfl_mask,
}


def main(arguments: Sequence[str]) -> int:
    """Run all claims, or those whose name begins as asked; 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="BEGINNING", help="claims whose names begin so")
    only, failed = parser.parse_args(arguments).only, False
    for name, claim in CLAIMS.items():
        if not name.startswith(only):
            continue
        try:
            holds, found = claim()
        except ModuleNotFoundError as missing:
            wheel = EXTRA.get(name.partition("-")[0], "scripts/peers.sh")
            print(f"not run  {name}: expected the package {missing.name}, found none; it comes with {wheel}")
            continue
        failed |= not holds
        print(f"{'holds' if holds else 'DIFFERS':<8} {name}: {found}")
    return int(failed)


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    sys.exit(main(sys.argv[1:]))
