"""What a job is charged with in the ledger of its data set, in the order that a crash must not shorten.

REGISTER before anything; RESERVE before training, in one step with the budget's check; START before the first batch of
records is read; RELEASE before a vector is masked; COMMIT when the coordinator has it. A crash between two of these
leaves a job that counts, never one that does not.
"""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
from dataclasses import dataclass
from typing import Any

from participant.config import DataSet
from participant.patience import patiently
from participant.registry import Registry
from participant.site import Site
from privacy import __version__
from privacy.budget import terms
from privacy.budget.accounting import bounded_pld_epsilon, rdp, rdp_epsilon
from privacy.budget.book import Book, fixed_terms, weakened
from privacy.budget.book import Job as BookJob
from privacy.budget.entries import (
    Abort,
    Claim,
    Commit,
    Facts,
    Policy,
    PolicyChange,
    Register,
    Release,
    Reserve,
    Start,
    decimal_text,
)
from privacy.budget.events import DpSgd, Mechanism, Unprotected
from privacy.budget.filter import Standing, enforced_epsilon, mechanisms_of, objection
from privacy.budget.ledger import Ledger, Stamp
from privacy.errors import Refusal, UserError, shown
from privacy.job import Job

MOST_REASON = 400
UNFINISHED = "its training ended before the vector was kept"
#: Trainings of one private plan file at a site, the first one included: a failure must not use a budget up unseen.
MOST_TRAININGS = 2
KEPT = "the vector was trained before this ledger began"


def _enter(ledger: Ledger, facts: Facts) -> None:
    """One more line, for as long as the disk takes."""
    patiently(lambda: ledger.append(facts))


def described(policy: Policy) -> str:
    """A policy in one line."""
    unit = policy.unit if policy.unit == "record" else f"user of up to {policy.max_records_per_unit} records"
    if not policy.protected:
        return "not protected"
    budget = f"epsilon {policy.epsilon}" if policy.epsilon else "no budget"
    return f"{budget} for a {unit}, delta {policy.delta}, order {policy.order}, {policy.adjacency}"


def ledger_of(site: Site, name: str) -> Ledger:
    """The ledger of a data set that stands in the site's file, begun with REGISTER if it is new.

    Raises:
        Refusal: the ledger has another policy than the site's file.
        UserError: ledger or registry is damaged, or they are not about the same data set.
    """
    return _agreed(site, name, site.ledger(name))


def _agreed(site: Site, name: str, ledger: Ledger) -> Ledger:
    """The same ledger, begun and in agreement; opening it again would verify every line again."""
    data = site.home.settings.datasets[name]
    identity = Registry(site.home).register(name, data, site.roster.roster.members[site.me].key, Stamp.now().time)
    if not ledger.entries:
        patiently(lambda: _begin(ledger, identity, name, data.policy()))
    check_agreement(ledger.book, identity, name, data)
    return ledger


def _begin(ledger: Ledger, identity: str, name: str, policy: Policy) -> None:
    ledger.reload()
    if not ledger.entries:
        ledger.append(Register(name=name, policy=policy), dataset=identity)


def check_agreement(book: Book, identity: str, name: str, data: DataSet) -> None:
    """Are ledger, registry and the site's file about one data set, under one policy? Raises :class:`Refusal`."""
    if book.dataset != identity:
        raise Refusal(
            f"data set '{name}': expected the ledger of {identity[:16]}…, as the registry says, "
            f"found that of {book.dataset[:16]}…; restore both from the same backup"
        )
    if book.policy != data.policy():
        raise Refusal(
            f"data set '{name}': expected the policy of its ledger ({described(book.policy)}), found another in "
            f"participant.toml ({described(data.policy())}); correct the file, or enter the change: "
            f"veilsum-participant dataset policy {name} --reason TEXT"
        )


def change_policy(site: Site, name: str, reason: str) -> bool:
    """Enter the policy of the site's file into the ledger; ``False`` if it stands there already.

    Raises:
        Refusal: a change of what is fixed after the first job. UserError: a weaker policy without a
            reason, or too long a reason.
    """
    ledger, new = site.ledger(name), site.home.settings.datasets[name].policy()
    if not ledger.entries:
        _agreed(site, name, ledger)
        return True
    if ledger.book.policy == new:
        return False
    if ledger.book.jobs and fixed_terms(ledger.book.policy) != fixed_terms(new):
        raise Refusal(
            f"data set '{name}': unit, adjacency, delta and order stay what they were at the first job "
            f"({described(ledger.book.policy)}), found {described(new)}"
        )
    weaker = weakened(ledger.book.policy, new)
    if (weaker and not reason.strip()) or len(reason) > MOST_REASON:
        text = f"a reason of at most {MOST_REASON} characters" + (f" for {', '.join(weaker)}" if weaker else "")
        found = f"{len(reason)} characters" if reason.strip() else "none"
        raise UserError(f"data set '{name}': expected {text}, found {found}", hint="say why by --reason")
    _enter(ledger, PolicyChange(policy=new, reason=reason))
    return True


def standing(site: Site, job: Job, stage: int) -> Standing | None:
    """What is charged to the plan's data set so far, for ``participant/policy.py``; ``None`` for an unknown one.

    Raises:
        Refusal: the ledger has another policy than the site's file.
    """
    name = job.plan.data.dataset
    data = site.home.settings.datasets.get(name)
    if data is None:
        return None
    ledger = site.ledger(name)
    if not ledger.entries:
        return Standing(data.policy())
    return Standing.of(_agreed(site, name, ledger).book, job.plan_file.digest.hex(), stage)


@dataclass(frozen=True)
class Charges:
    """Epsilon of a data set by its ledger: of what started, and with every open reservation."""

    policy: Policy
    spent: float
    reserved: float

    @classmethod
    def of(cls, policy: Policy, book: Book) -> Charges:
        """What the lines of a ledger add up to; raises ProtocolError for an unknown mechanism."""
        jobs = book.charged()
        spent, reserved = (
            enforced_epsilon(policy, mechanisms_of(found)) for found in ([j for j in jobs if j.started], jobs)
        )
        return cls(policy, spent, reserved)

    @property
    def left(self) -> float | None:
        """Of the budget, which counts reservations in full; ``None`` without one."""
        return None if self.policy.epsilon is None else max(0.0, float(self.policy.epsilon) - self.reserved)


def account(site: Site, name: str) -> dict[str, Any]:
    """What a site's ledger says about one data set, for people and machines; numbers are decimal strings.

    ``reserved`` is epsilon with every open reservation, ``spent`` without those that have not started; ``left`` is of
    the budget, ``None`` where there is none.
    """
    ledger, data = site.ledger(name), site.home.settings.datasets[name]
    policy = ledger.book.policy if ledger.entries else data.policy()
    charges = Charges.of(policy, ledger.book)
    return {
        "dataset": name,
        "registered": bool(ledger.entries),
        "identity": ledger.book.dataset,
        "policy": described(policy),
        "budget": policy.epsilon,
        "order": policy.order,
        "delta": policy.delta,
        "spent": f"{charges.spent:.4f}",
        "reserved": f"{charges.reserved:.4f}",
        "left": None if charges.left is None else f"{charges.left:.4f}",
        "records": Registry(site.home).records(name),
        "lines": len(ledger.entries),
        "jobs": [
            {"job": j.reserve.job, "plan": j.reserve.plan, "stage": j.reserve.stage, "state": j.state}
            for j in ledger.book.jobs.values()
        ],
    }


# --- one job ----------------------------------------------------------------------------------------------------------


def reserve(site: Site, job: Job, stage: int) -> str:
    """Charge a training that is about to begin, in full; the job's id, durable when this returns.

    A reservation that never started is taken up again. One that started without leaving a vector stays charged: what
    it saw cannot be given back, so training again is another job, and there are :data:`MOST_TRAININGS` of a plan file.
    A job without privacy just goes on, since its charge is infinite already.

    Raises:
        Refusal: the budget does not allow it, or the plan was trained too often.
    """
    ledger, digest = ledger_of(site, job.plan.data.dataset), job.plan_file.digest.hex()
    mechanism, before = terms.mechanism(job.plan), ledger.book.find(digest, stage)
    going_on = ("reserved", "started") if isinstance(mechanism, Unprotected) else ("reserved",)
    if before is not None and before.state in going_on:
        return before.reserve.job
    if before is not None and before.state == "started":
        _enter(ledger, Abort(job=before.reserve.job, reason=UNFINISHED))
    facts = _reservation(ledger.book.policy, job, stage, site.start_digest(job, stage))

    def check(book: Book) -> None:
        trained = [j for j in book.trained(digest, stage) if not isinstance(mechanism, Unprotected)]
        if len(trained) >= MOST_TRAININGS:
            raise Refusal(
                f"plan '{job.plan.name}' was trained {len(trained)} times here, each time charged to the budget: "
                "it takes a plan of another name to train again"
            )
        standing, times = (
            Standing(book.policy, Standing.of(book, digest, stage).charged),
            job.plan.trainings_from(stage),
        )
        if found := objection(standing, mechanism, times):
            raise Refusal(f"plan '{job.plan.name}' {found}")

    patiently(lambda: ledger.append(facts, check=check))
    return facts.job


def _reservation(policy: Policy, job: Job, stage: int, origin: bytes) -> Reserve:
    mechanism = terms.mechanism(job.plan)
    return Reserve(
        job=secrets.token_hex(16),
        plan=job.plan.name,
        plan_digest=job.plan_file.digest.hex(),
        stage=stage,
        mechanism=mechanism.to_json(),
        rdp=_divergence(mechanism, policy.order),
        claim=_claim(mechanism),
        code=_code(mechanism),
        model={"base": job.plan.base.digest, "start": origin.hex(), "trained": str(job.layout.size)},
    )


def _divergence(mechanism: Mechanism, order: int) -> dict[str, str]:
    return {} if isinstance(mechanism, Unprotected) else {str(order): decimal_text(rdp(mechanism, order))}


def _claim(mechanism: Mechanism) -> Claim:
    """Epsilon of this job alone at its own delta: tight by PLD, and the looser bound by RDP."""
    if not isinstance(mechanism, DpSgd):
        return Claim(pld="inf", rdp="inf", accountant="none", version="0")
    delta = float(mechanism.delta)
    pld, bound = bounded_pld_epsilon([mechanism], delta), rdp_epsilon([mechanism], delta)
    version = importlib.metadata.version("dp-accounting")
    return Claim(pld=decimal_text(pld), rdp=decimal_text(bound), accountant="dp-accounting", version=version)


def _code(mechanism: Mechanism) -> dict[str, str]:
    found = {"veilsum": __version__, "python": platform.python_version()}
    for package in ("numpy", "torch", "transformers", "peft", "opacus", "dp-accounting"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not isinstance(mechanism, Unprotected):
        found["rng"] = "aes256ctr-urandom"
    return found


def start(site: Site, job: Job, identity: str, selftest: dict[str, Any] | None) -> None:
    """From here on records are read; durable when this returns. A job without privacy may go on after a crash.

    Raises:
        Refusal: a private job that started before: its one charge paid for that training.
    """
    ledger = site.ledger(job.plan.data.dataset)

    def check(book: Book) -> None:
        if book.jobs[identity].started:
            raise Refusal(f"plan '{job.plan.name}': its training began before, and its charge paid for that one only")

    try:
        patiently(lambda: ledger.append(Start(job=identity, selftest=selftest), check=check))
    except Refusal:
        if not isinstance(terms.mechanism(job.plan), Unprotected):
            raise


def give_up(site: Site, job: Job, stage: int, reason: str) -> None:
    """The last job of a plan ends with its plan; one whose upload is committed stays as it is."""
    name = job.plan.data.dataset
    if name not in site.home.settings.datasets:
        return
    ledger = site.ledger(name)
    found = ledger.book.find(job.plan_file.digest.hex(), stage)
    if found is not None:
        _end(site, ledger, found, reason)


def _end(site: Site, ledger: Ledger, found: BookJob, reason: str) -> None:
    """ABORT for what nobody will ask for again: given back before the start, after it charged for good.

    The vector goes first, so that no job stands as ended whose vector could still be masked.
    """
    if found.state == "committed":
        return
    if found.started:
        facts = found.reserve
        patiently(lambda: site.store.forget_trained(facts.plan, facts.stage, facts.plan_digest))
    _enter(ledger, Abort(job=found.reserve.job, reason=shown(reason, MOST_REASON) or "no reason given"))


def close(site: Site, name: str, prefix: str, reason: str) -> str:
    """End an open job by hand, where its coordinator is gone and nobody will ask for it; its id.

    Raises:
        UserError: no open job of the data set, or several, begin with ``prefix``; or there is no reason.
    """
    ledger = site.ledger(name)
    found = [job for job in ledger.book.open() if prefix and job.reserve.job.startswith(prefix)]
    if len(found) != 1:
        known = ", ".join(f"{job.reserve.job[:8]} (plan '{job.reserve.plan}')" for job in ledger.book.open()) or "none"
        raise UserError(f"data set '{name}': expected the id of one open job, found '{shown(prefix)}'; open: {known}")
    if not reason.strip():
        raise UserError(f"data set '{name}': expected a reason, found none", hint="say why by --reason")
    _end(site, ledger, found[0], reason)
    return found[0].reserve.job


def charged(site: Site, job: Job, stage: int) -> str:
    """The id of the job that trained the kept vector; one that the ledger does not know is charged now.

    Raises:
        Refusal: the budget does not allow it.
    """
    ledger = ledger_of(site, job.plan.data.dataset)
    found = ledger.book.find(job.plan_file.digest.hex(), stage)
    if found is not None and found.started:
        return found.reserve.job
    identity = reserve(site, job, stage)
    selftest = None if isinstance(terms.mechanism(job.plan), Unprotected) else {"passed": False, "reason": KEPT}
    start(site, job, identity, selftest)
    return identity


def release(site: Site, job: Job, stage: int, round_number: int, t2: bytes, vector: bytes) -> None:
    """The vector is about to be masked for a round; durable when this returns."""
    facts = Release(
        job=charged(site, job, stage),
        round=round_number,
        t2=t2.hex(),
        vector_digest=vector.hex(),
        coordinator=job.roster.coordinator,
    )
    _enter(site.ledger(job.plan.data.dataset), facts)


def commit(site: Site, job: Job, stage: int, round_number: int, root: bytes) -> None:
    """The coordinator has the whole upload of a round; said once."""
    ledger = site.ledger(job.plan.data.dataset)
    found = ledger.book.released_in(job.plan_file.digest.hex(), stage, round_number)
    if found is None or round_number in found.committed:
        return
    mechanism = terms.mechanism(job.plan)
    steps = mechanism.steps if isinstance(mechanism, DpSgd) else 0
    _enter(ledger, Commit(job=found.reserve.job, steps=steps, round=round_number, root=root.hex()))
