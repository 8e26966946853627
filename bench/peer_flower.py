"""Flower's SecAgg+ as tasks, run by the interpreter of .venv-peers: ``python -m bench.peer_flower '{...}'``.

Only functions of the published wheel are called: those of a client in ``secaggplus_mod`` (quantise, mask, serialise)
and the unmasking stage of ``SecAggPlusWorkflow``, which gets its key shares from real clients in this process instead
of over a network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_separate
from flwr.common.serde import message_to_proto
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation import secaggplus_workflow as server
from flwr.supercore.task_identity import TaskIdentity

from bench.meter import answer, as_reply, measure

#: The package hides this module behind a function of the same name.
client = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

#: Defaults of SecAggPlusWorkflow.
CLIPPING_RANGE, TARGET_RANGE, MOD_RANGE, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
WEIGHT = 500


@dataclass
class Cohort:
    """Clients that have run SecAgg+ as far as to hold the shares of all others."""

    states: dict[int, Any]
    public_keys: dict[int, list[bytes]]
    threshold: int
    ciphertexts: dict[int, list[bytes]]
    sources: dict[int, list[int]]

    def inbox(self, node: int) -> Any:
        """What the server sends a client with the request for its masked vector."""
        return ConfigRecord({Key.CIPHERTEXT_LIST: self.ciphertexts[node], Key.SOURCE_LIST: self.sources[node]})


def cohort(n: int) -> Cohort:
    """Stages "setup" and "share keys" of ``n`` clients, all of them neighbours."""
    threshold = max(2, round(0.6 * n))
    config = {
        Key.SAMPLE_NUMBER: n,
        Key.SHARE_NUMBER: n,
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: CLIPPING_RANGE,
        Key.TARGET_RANGE: TARGET_RANGE,
        Key.MOD_RANGE: MOD_RANGE,
        Key.MAX_WEIGHT: MAX_WEIGHT,
    }
    made = Cohort({}, {}, threshold, {i: [] for i in range(1, n + 1)}, {i: [] for i in range(1, n + 1)})
    for node in made.sources:
        state = made.states[node] = client.SecAggPlusState()
        state.nid = node
        keys = client._setup(state, ConfigRecord(dict(config)))
        made.public_keys[node] = [keys[Key.PUBLIC_KEY_1], keys[Key.PUBLIC_KEY_2]]
    listed = {str(node): pair for node, pair in made.public_keys.items()}
    for node, state in made.states.items():
        shares = client._share_keys(state, ConfigRecord(dict(listed)))
        for to, ciphertext in zip(shares[Key.DESTINATION_LIST], shares[Key.CIPHERTEXT_LIST], strict=True):
            made.ciphertexts[to].append(ciphertext)
            made.sources[to].append(node)
    return made


def participant(vector: Path, n: int, repeats: int) -> dict[str, Any]:
    """Quantise, mask and serialise a float32 vector, as the client mod does."""
    parameters = ndarrays_to_parameters([np.load(vector)])
    made = cohort(n)
    inbox = made.inbox(1)
    return as_reply(measure(lambda: client._collect_masked_vectors(made.states[1], inbox, WEIGHT, parameters), repeats))


def upload(vector: Path, n: int) -> dict[str, Any]:
    """Bytes of the message that carries the masked vector."""
    made = cohort(n)
    found = client._collect_masked_vectors(
        made.states[1], made.inbox(1), WEIGHT, ndarrays_to_parameters([np.load(vector)])
    )
    content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(found)})
    return {"bytes": len(message_to_proto(_message(content)).SerializeToString())}


def _message(content: Any) -> Any:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    return Message(content=content, dst_node_id=1, message_type="train", group_id="1")


class _Grid:
    """Stands for the network: asks the clients, in this process, for the shares the server wants."""

    def __init__(self, states: dict[int, Any]) -> None:
        self._states = states

    def send_and_receive(self, messages: Sequence[Any], *, timeout: float | None = None) -> list[Any]:
        """One reply for each message."""
        assert timeout is None
        return [self._reply(m.metadata.dst_node_id, m.content.config_records[RECORD_KEY_CONFIGS]) for m in messages]

    def _reply(self, node: int, request: Any) -> Any:
        content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(client._unmask(self._states[node], request))})
        return SimpleNamespace(
            content=content, metadata=SimpleNamespace(src_node_id=node), has_error=lambda: False, error=""
        )


def coordinator(size: int, n: int, repeats: int) -> dict[str, Any]:
    """The unmasking stage with one dropout: combine shares, expand and subtract masks, dequantise.

    The masked sum holds uniform ring elements: what they are does not change the work.
    """
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    made = cohort(n)
    for node, state in made.states.items():  # what a client keeps when it masks
        for source, ciphertext in zip(made.sources[node], made.ciphertexts[node], strict=True):
            plain = client.decrypt(state.ss2_dict[source], ciphertext)
            _, _, state.rd_seed_share_dict[source], state.sk1_share_dict[source] = share_keys_plaintext_separate(plain)
    everybody, alive = set(made.states), set(made.states) - {1}
    # Only that one process's peak matters, and it is not part of this comparison: CPU time is.
    masked = np.random.default_rng(0).integers(0, MOD_RANGE, size, dtype=np.int64)
    context = SimpleNamespace(
        state=RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})}),
        strategy=SimpleNamespace(aggregate_fit=lambda _round, _results, _failures: (None, {})),
    )
    workflow = server.SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.6)

    def unmask() -> None:
        state = server.WorkflowState(
            active_node_ids=set(alive),
            sampled_node_ids=set(everybody),
            threshold=made.threshold,
            clipping_range=CLIPPING_RANGE,
            quantization_range=TARGET_RANGE,
            mod_range=MOD_RANGE,
            nid_to_neighbours={node: set(everybody) for node in everybody},
            nid_to_publickeys=made.public_keys,
            aggregate_ndarrays=[np.ones(1, np.int64), masked],
        )
        if not workflow.unmask_stage(_Grid(made.states), context, state):
            raise RuntimeError("Flower's unmasking stage failed")

    return as_reply(measure(unmask, repeats))


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "participant": lambda r: participant(Path(r["vector"]), r["n"], r["repeats"]),
    "coordinator": lambda r: coordinator(r["size"], r["n"], r["repeats"]),
    "upload": lambda r: upload(Path(r["vector"]), r["n"]),
    "version": lambda _r: {"version": importlib.metadata.version("flwr")},
}

if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    answer(TASKS)
