"""Is this site fit to take part? Looks at everything that stops one, and sends nothing but a greeting."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from participant.approvals import consented
from participant.base_model import base_digest, in_four_bits, memory_of
from participant.charging import Charges
from participant.client import OfferedPlan
from participant.config import DataSet, Home, load_home
from participant.diagnose import explain
from participant.enrol import AUTHORITY, TLS_CERTIFICATE
from participant.pace import UploadTime
from participant.policy import Waits
from participant.proxy import Route, ignored
from participant.rows import Columns, read_rows
from participant.site import Site
from privacy.checks import (
    Check,
    certificate,
    clock,
    disk,
    fail,
    failed,
    looked_at,
    ok,
    read_certificate,
    versions,
    warn,
)
from privacy.errors import Refusal, UserError, VeilsumError
from privacy.job import Job
from privacy.plan import parse_plan

#: Bytes for records, ledgers and notes, beside what plans take.
LEAST_FREE = 256 << 20
#: Bytes a coordinate takes at a site: quantised vector, spool, total, adapters.
BYTES_A_COORDINATE = 20
#: Seconds for torch to be imported and to look at the devices.
TORCH_S = 180
#: In a process of its own: torch takes seconds and hundreds of MB, and a broken driver may end the process.
TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"torch": torch.__version__, "gpus": gpus}))
"""


def examine(directory: Path) -> list[Check]:
    """All checks; where the configuration cannot be read, few."""
    now = datetime.datetime.now(datetime.UTC)
    try:
        home = load_home(directory)
    except VeilsumError as error:
        return [failed("configuration", error), *versions(("participant",))]
    looks: dict[str, Iterable[Check]] = {
        "certificates": _certificates(home, now),
        "roster": _site(home),
        "training": _training(home),
        "base models": _models(home),
        **{f"data set '{name}'": _data_set(home, name, data) for name, data in sorted(home.settings.datasets.items())},
        "versions": versions(("participant",)),
    }
    first = ok("configuration", f"site '{home.settings.member}', coordinator {home.settings.coordinator}")
    return [first, *(check for name, look in looks.items() for check in looked_at(name, look))]


def _certificates(home: Home, now: datetime.datetime) -> Iterator[Check]:
    own = read_certificate(home.directory / TLS_CERTIFICATE, "this site's TLS certificate")
    authority = read_certificate(home.directory / AUTHORITY, "the federation's authority certificate")
    files = [home.records, *home.directory.glob("*.toml"), *home.ledgers.glob("*.jsonl")]
    yield clock(files, [own, authority], now)
    yield certificate("certificate", own, now)
    yield certificate("authority", authority, now)


def _site(home: Home) -> Iterator[Check]:
    """What takes the identity key and the pinned roster: both, the coordinator, the disk, the ledgers, the plans."""
    site = Site.open(home.directory)
    yield ok("roster", f"pinned {site.roster.hash.hex()[:16]}…, and this site's identity key is in it")
    offered: list[OfferedPlan] = []
    yield from looked_at("coordinator", _coordinator(site, offered))
    yield from looked_at("upload", _uploads(site, offered))
    yield from looked_at("disk", _disk(site, offered))
    for name, data in sorted(home.settings.datasets.items()):
        yield from looked_at(f"ledger of '{name}'", _ledger(site, name, data))
    yield from _plans(site)


def _coordinator(site: Site, offered: list[OfferedPlan]) -> Iterator[Check]:
    address = site.home.settings.coordinator
    route = Route.to(address)
    if text := ignored(route.host):
        yield warn("proxy", text, "set it as gRPC reads it, or unset it: docs/how-to/proxy.md")
    if route.proxy:
        yield ok("proxy", f"connections to {address} go through {route.proxy}")
    if fault := explain(address, site.home.directory):
        yield fail("coordinator", fault, "mend that first; a coordinator that is down is its operator's to start")
        return
    client = site.client()
    try:
        client.hello()
        offered += client.plans()
    finally:
        client.close()
    yield ok("coordinator", f"{address} answers{route.via}, with the pinned roster; {len(offered)} plans")


def _jobs(site: Site, offered: list[OfferedPlan]) -> list[Job]:
    """The open plans with consent; what is wrong with one that this roster does not allow, `plans` says."""
    found = []
    for file in (parse_plan(plan.toml) for plan in offered if plan.state in ("open", "released")):
        try:
            job = Job.of(file, site.roster, site.home.factors)
        except (Refusal, UserError):
            continue
        with suppress(Waits):
            consented(site.home, file, job)
            found.append(job)
    return found


def _uploads(site: Site, offered: list[OfferedPlan]) -> Iterator[Check]:
    """Can uploads be in time at the rate that the file allows?"""
    rate = site.home.settings.max_upload_rate
    for job in _jobs(site, offered) if rate is not None else ():
        found = UploadTime.of(job, rate)
        check = {"late": fail, "tight": warn}.get(found.state)
        text = f"plan '{job.plan.name}' {found}"
        yield check("upload", text, found.todo) if check else ok("upload", text)


def _disk(site: Site, offered: list[OfferedPlan]) -> Iterator[Check]:
    jobs = _jobs(site, offered)
    needed = sum(BYTES_A_COORDINATE * job.quantizer.total_size for job in jobs)
    yield disk(site.home.directory, LEAST_FREE + needed, f"{len(jobs)} plans with consent")


def _ledger(site: Site, name: str, data: DataSet) -> Iterator[Check]:
    book = site.ledger(name).book
    charges = Charges.of(book.policy if book.size else data.policy(), book)
    what = f"ledger of '{name}'"
    text = f"{book.size} lines verify, epsilon {charges.reserved:.3f} charged"
    if charges.left is None:
        yield ok(what, text + ", no budget")
    elif charges.left > 0:
        yield ok(what, f"{text}, {charges.left:.3f} left of {charges.policy.epsilon}")
    else:
        yield warn(what, f"{text}, nothing left of {charges.policy.epsilon}", "no private plan can run on it any more")


def _plans(site: Site) -> Iterator[Check]:
    """What stopped here, in the words of the last try."""
    for name, note in sorted(site.notes().items()):
        if note["state"] in ("failed", "refused"):
            yield warn(
                "plans", f"'{name}' is {note['state']}: {note['reason']}", note["todo"] or f"decide about '{name}'"
            )


def _training(home: Home) -> Iterator[Check]:
    """Can torch be imported, and is there the device that the file asks for?"""
    wanted, todo = home.settings.device, "pip install 'veilsum[participant]', with the constraints of its release"
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=TORCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        yield fail("training", f"torch did not start within {TORCH_S} s", "look at the driver of the GPU")
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield fail("training", f"torch does not start: {reason}", todo)
        return
    found = json.loads(done.stdout)
    gpus = ", ".join(found["gpus"]) or "no GPU"
    text = f'torch {found["torch"]}, {gpus}, device = "{wanted}"'
    if wanted == "cuda" and not found["gpus"]:
        yield fail("training", text, 'install the GPU\'s driver and a CUDA build of torch, or set device = "auto"')
    else:
        yield ok("training", text)


def _models(home: Home) -> Iterator[Check]:
    if not home.settings.models:
        yield warn("base models", "none in participant.toml", "name one under [models]")
    for name, entry in sorted(home.settings.models.items()):
        if entry.startswith("hub:"):
            yield ok("base models", f"'{name}' is fetched from a model hub when a plan needs it")
            continue
        yield from looked_at("base models", _model(name, home.path(entry)))


def _model(name: str, path: Path) -> Iterator[Check]:
    found = f"'{name}' has digest {base_digest(path)}"
    if in_four_bits(path):
        found += f", linear layers in 4 bits, takes {memory_of(path) / 1e9:.2f} GB of memory where it trains"
        found += f", bitsandbytes {importlib.metadata.version('bitsandbytes')}"
    yield ok("base models", found)


def _data_set(home: Home, name: str, data: DataSet) -> Iterator[Check]:
    """The first record; ``dataset check`` reads them all."""
    columns = Columns((), (data.text, data.label, data.messages, data.prompt, data.response))
    first = list(islice(read_rows(home.path(data.path), data.format, columns), 1))
    if not first:
        yield fail(f"data set '{name}'", "no record", "check path and format in participant.toml")
    elif not first[0].values:
        yield fail(
            f"data set '{name}'", "its first record has none of the columns", "name the columns in participant.toml"
        )
    else:
        text = f"readable, columns {', '.join(sorted(first[0].values))}"
        yield ok(f"data set '{name}'", f"{text}; every record: veilsum-participant dataset check {name}")
