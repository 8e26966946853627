"""The import rules of the architecture, checked on the syntax tree of every file that exists.

Nothing is imported here. A rule is a row of ``RULES``; a bad example for each of them is in ``BAD``, so that a rule
which no longer bites makes a test fail. Imports inside functions and under ``TYPE_CHECKING`` count like all others,
unless the rule says otherwise.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("coordinator", "participant", "privacy")
HAND_WRITTEN = (*PRODUCT, "proto", "tests", "demo", "bench", "evidence", "scripts", "deploy")
SOURCE_SUFFIXES = {".py", ".proto", ".sh", ".js", ".css", ".html"}
MAX_LINES = 420

EVERYWHERE = tuple(f"{package}/*" for package in PRODUCT)
TRAINING = tuple(
    f"participant/{name}.py"
    for name in (
        *("training", "device", "dp_sgd", "dp_step", "features", "self_test", "canaries", "data", "evaluation"),
        *("analytic", "sending", "cores", "ranks", "different"),
        *("loading", "four_bit", "tokens", "generation", "regression"),
    )
)
PURE = (
    "coordinator/round.py",
    "coordinator/stage.py",
    "participant/round.py",
    "participant/policy.py",
    "privacy/secagg/*",
)
#: A process of its own asks Opacus' accountant, where it is installed; nothing imports it.
APART = ("privacy/budget/opacus_worker.py",)
TORCH = ("torch", "transformers", "peft", "opacus", "accelerate", "safetensors.torch")
NETWORK_AND_STORE = ("grpc", "socket", "asyncio", "sqlite3")
PROTOBUF = ("google.protobuf", "*_pb2", "*_pb2_grpc")


@dataclass(frozen=True)
class Import:
    """One imported name, absolute: ``os.urandom`` for ``from os import urandom``."""

    name: str
    line: int
    #: Inside a function, so importing the module does not import it.
    lazy: bool


@dataclass(frozen=True)
class Rule:
    """In files that match ``where`` and not ``spared``, no import matches ``forbidden`` and not ``allowed``."""

    where: tuple[str, ...]
    forbidden: tuple[str, ...]
    spared: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    allowed_lazily: tuple[str, ...] = ()


RULES = {
    "the coordinator never imports the participant": Rule(("coordinator/*",), ("participant",)),
    "the participant never imports the coordinator": Rule(("participant/*",), ("coordinator",)),
    "privacy imports neither side": Rule(("privacy/*",), ("coordinator", "participant")),
    "the product never imports tests, demo, bench or evidence": Rule(
        EVERYWHERE, ("tests", "demo", "bench", "evidence")
    ),
    "torch stays in the training modules": Rule(
        EVERYWHERE, TORCH, spared=(*TRAINING, "participant/drafting.py", *APART)
    ),
    "drafting may use transformers inside functions": Rule(
        ("participant/drafting.py",), TORCH, allowed_lazily=("transformers",)
    ),
    "pure modules see no network, file, clock or chance": Rule(
        PURE,
        (*NETWORK_AND_STORE, *TORCH, "os", "pathlib", "time", "datetime", "random"),
        allowed=("os.urandom",),  # as the default of a parameter
    ),
    "protobuf stays in privacy/wire and the gRPC shells": Rule(
        EVERYWHERE,
        PROTOBUF,
        spared=(
            *("privacy/wire/*", "coordinator/service.py", "coordinator/operator.py", "coordinator/membership.py"),
            *("coordinator/health.py", "participant/client.py", "participant/joining.py"),
        ),
    ),
    "randomness comes from the system or AES, never from a 32-bit generator": Rule(
        EVERYWHERE, ("random", "numpy.random")
    ),
}


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the name, or a package it lies in, is one of the patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


class Collector(ast.NodeVisitor):
    """Collects the imports of one module, dynamic ones with a constant name and ``np.random`` included."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.depth = 0
        self.numpy_names: set[str] = set()
        self.found: list[Import] = []

    def add(self, name: str, node: ast.expr | ast.stmt) -> None:
        self.found.append(Import(name, node.lineno, self.depth > 0))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.in_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.in_function(node)

    def in_function(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node)
            if alias.name == "numpy":
                self.numpy_names.add(alias.asname or alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
        for alias in node.names:
            self.add(f"{base}.{alias.name}", node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
            self.add(str(first.value), node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in self.numpy_names and node.attr == "random":
            self.add("numpy.random", node)
        self.generic_visit(node)


def module_name(path: str) -> str:
    """``privacy/secagg/__init__.py`` -> ``privacy.secagg``."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, source: str) -> list[Import]:
    """Every import in the source of the file at ``path``, a posix path from the root of the repository."""
    collector = Collector(module_name(path), path.endswith("/__init__.py"))
    collector.visit(ast.parse(source))
    return collector.found


def broken_by(path: str, rule: Rule, found: Import) -> bool:
    if not matches(path, rule.where) or matches(path, rule.spared) or not matches(found.name, rule.forbidden):
        return False
    return not matches(found.name, rule.allowed + (rule.allowed_lazily if found.lazy else ()))


def violations(path: str, source: str) -> list[tuple[str, str]]:
    """(rule, what and where) for every rule that the file breaks."""
    return [
        (sentence, f"{path}:{found.line} imports {found.name}")
        for found in imports(path, source)
        for sentence, rule in RULES.items()
        if broken_by(path, rule, found)
    ]


def chains(start: str, sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Every name that importing file ``start`` can reach through the files given -> the way there."""
    files = {module_name(path): path for path in sources}
    ways = {module_name(start): [module_name(start)]}
    todo = [module_name(start)]
    while todo:
        module = todo.pop()
        if module not in files:
            continue
        reached = [found.name for found in imports(files[module], sources[files[module]])]
        # Importing a.b.c runs a and a.b too; `from a import b` may name a module or something in it.
        for name in [*reached, module]:
            parts = name.split(".")
            for prefix in (".".join(parts[: i + 1]) for i in range(len(parts))):
                if prefix not in ways:
                    ways[prefix] = [*ways[module], prefix]
                    todo.append(prefix)
    return ways


def chains_to(forbidden: tuple[str, ...], where: tuple[str, ...], sources: Mapping[str, str]) -> list[str]:
    """The ways by which the files that match ``where`` reach a forbidden name."""
    return [
        " -> ".join(way)
        for path in sources
        if matches(path, where)
        for name, way in chains(path, sources).items()
        if matches(name, forbidden)
    ]


def is_generated(path: Path) -> bool:
    return "_pb2" in path.name


def product_files() -> Iterator[Path]:
    for package in PRODUCT:
        yield from (path for path in sorted((ROOT / package).rglob("*.py")) if not is_generated(path))


SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in product_files()}
NEVER_REACHED = {
    "the coordinator never reaches torch": (("coordinator/*",), TORCH),
    "privacy never reaches torch": (("privacy/*",), TORCH),
    "pure modules never reach the network, a store, torch or protobuf": (PURE, (*NETWORK_AND_STORE, *TORCH, *PROTOBUF)),
}


@pytest.mark.parametrize("path", SOURCES)
def test_a_file_keeps_the_import_rules(path: str) -> None:
    assert violations(path, SOURCES[path]) == []


@pytest.mark.parametrize("sentence", NEVER_REACHED)
def test_what_is_never_reached_through_other_modules(sentence: str) -> None:
    where, forbidden = NEVER_REACHED[sentence]
    assert chains_to(forbidden, where, {path: source for path, source in SOURCES.items() if path not in APART}) == []


def test_nothing_imports_what_stands_apart() -> None:
    names = tuple(map(module_name, APART))
    found = [path for path, source in SOURCES.items() for i in imports(path, source) if matches(i.name, names)]
    assert found == []


def test_hand_written_files_stay_short() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in HAND_WRITTEN
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SOURCE_SUFFIXES and not is_generated(path)
    }
    assert lengths, "no file found: this test looks in the wrong place"
    assert {path: lines for path, lines in lengths.items() if lines >= MAX_LINES} == {}


def test_no_top_level_package_takes_a_name_that_other_distributions_use() -> None:
    # Opacus installs `examples` and `benchmarks`; proto-plus owns `proto`, which stays a plain folder.
    taken = [name for name in ("examples", "benchmarks", "proto") if (ROOT / name / "__init__.py").exists()]
    assert taken == []
    assert not (ROOT / "examples").exists()
    assert not (ROOT / "benchmarks").exists()


# -- the checker itself: a rule that never bites is no rule

BAD = {
    "the coordinator never imports the participant": [
        ("coordinator/store.py", "import participant.round"),
        ("coordinator/store.py", "from participant import round"),
    ],
    "the participant never imports the coordinator": [
        ("participant/daemon.py", "from coordinator.round import Round"),
        ("participant/daemon.py", "def f():\n    import coordinator"),
    ],
    "privacy imports neither side": [
        ("privacy/plan.py", "if TYPE_CHECKING:\n    from participant import policy"),
        ("privacy/secagg/keys.py", "import coordinator.store as store"),
    ],
    "the product never imports tests, demo, bench or evidence": [
        ("privacy/plan.py", "from tests.simulation import Network"),
        ("coordinator/cli.py", "import evidence.run"),
    ],
    "torch stays in the training modules": [
        ("participant/daemon.py", "import torch.nn as nn"),
        ("participant/daemon.py", "async def f():\n    from torch import nn"),
        ("coordinator/publish.py", "from peft import PeftModel"),
        ("privacy/adapter.py", "from safetensors.torch import load_file"),
        ("privacy/adapter.py", "importlib.import_module('torch')"),
    ],
    "drafting may use transformers inside functions": [
        ("participant/drafting.py", "import transformers"),
        ("participant/drafting.py", "def f():\n    import torch"),
    ],
    "pure modules see no network, file, clock or chance": [
        ("participant/round.py", "from time import monotonic"),
        ("participant/round.py", "from os import path"),
        ("participant/policy.py", "import grpc.aio"),
        ("coordinator/round.py", "import os"),
        ("coordinator/stage.py", "from pathlib import Path"),
        ("privacy/secagg/shamir.py", "from os import urandom, getrandom"),
    ],
    "protobuf stays in privacy/wire and the gRPC shells": [
        ("participant/round.py", "from privacy.wire import secagg_pb2"),
        ("coordinator/daemon.py", "import privacy.wire.federation_pb2_grpc as rpc"),
        ("privacy/secagg/messages.py", "from google.protobuf import message"),
        ("privacy/budget/ledger.py", "from ..wire.secagg_pb2 import Share"),
    ],
    "randomness comes from the system or AES, never from a 32-bit generator": [
        ("privacy/secagg/quantize.py", "from random import Random"),
        ("participant/training.py", "import numpy as np\nnp.random.normal()"),
        ("participant/dp_sgd.py", "from numpy.random import default_rng"),
        ("participant/dp_sgd.py", "from numpy import random"),
    ],
}
GOOD = {
    "urandom as a default": ("participant/round.py", "from os import urandom\ndef f(rand=urandom): ..."),
    "torch where it belongs": ("participant/training.py", "import torch\nfrom transformers import AutoModel"),
    "transformers in a function of drafting": ("participant/drafting.py", "def f():\n    import transformers"),
    "stubs in the shell": ("coordinator/service.py", "from privacy.wire import federation_pb2, convert"),
    "safetensors for numpy": ("privacy/adapter.py", "import safetensors.numpy, numpy as np\nnp.zeros(1)"),
    "names that only begin alike": ("coordinator/store.py", "import participants, torchless"),
}


def test_every_rule_has_a_bad_example() -> None:
    assert list(BAD) == list(RULES)


@pytest.mark.parametrize(("rule", "path", "source"), [(rule, *bad) for rule, cases in BAD.items() for bad in cases])
def test_the_checker_finds_the_bad_example(rule: str, path: str, source: str) -> None:
    assert rule in [sentence for sentence, _ in violations(path, source)]


@pytest.mark.parametrize("example", GOOD)
def test_the_checker_passes_the_good_example(example: str) -> None:
    assert violations(*GOOD[example]) == []


def test_the_walk_finds_what_is_imported_two_modules_away() -> None:
    sources = {
        "coordinator/publish.py": "from privacy import adapter",
        "privacy/__init__.py": "",
        "privacy/adapter.py": "def f():\n    from .weights import load",
        "privacy/weights.py": "import torch",
    }
    way = "coordinator.publish -> privacy.adapter -> privacy.weights -> torch"
    assert chains_to(TORCH, ("coordinator/*",), sources) == [way]
    assert chains_to(TORCH, ("coordinator/*",), {**sources, "privacy/weights.py": ""}) == []


def test_the_walk_enters_the_package_around_a_module() -> None:
    sources = {
        "coordinator/round.py": "import privacy.secagg.keys",
        "privacy/__init__.py": "import torch",
        "privacy/secagg/keys.py": "",
    }
    assert chains_to(TORCH, ("coordinator/*",), sources) == ["coordinator.round -> privacy -> torch"]
