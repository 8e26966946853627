"""An audit's report for people and for machines: lines of text, JSON, and one HTML file with everything in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jinja2

from privacy import __version__
from privacy.budget.audit import JobReport, LedgerReport
from privacy.budget.chart import chart
from privacy.budget.events import DpSgd, Mechanism, Unprotected
from privacy.budget.findings import Code, Found, worst
from privacy.errors import shown

SHOWS = (
    "Where nothing was found: that the lines are the site's own, unaltered and in order, that the recorded jobs give "
    "the recorded epsilons by two computations that share no code, and that they keep the budget. The epsilons bound "
    "what can be learned about one unit of the data set (see the policy) from everything that left the site in these "
    "jobs, for adding or removing that unit, with Poisson-sampled DP-SGD at the recorded rate, noise and number of "
    "steps."
)
SHOWS_NOT = (
    "That the site ran the recorded code on the recorded data: the self-tests speak for the code, and no ledger can "
    "say more. That there is no second ledger, beyond what others witnessed. Nothing is said about a person who has "
    "records at several sites or, where the unit is the record, several records in this data set, about the fact that "
    "a site took part, and about jobs without differential privacy."
)
NUMBERS = {
    "enforced": "what the budget is held against: a Renyi filter at the one order fixed at registration; holds also "
    "where jobs were chosen in sight of earlier results",
    "pld": "the tight composition; holds if no job was chosen in sight of the results of earlier ones",
    "rdp": "the second accountant: our own Renyi divergences at the best order, under the same condition",
    "naive": "the sum of the jobs' epsilons; its delta is the sum of theirs",
}


def number(value: float | None) -> str:
    """An epsilon for people."""
    if value is None or value < 0:
        return "—"
    return "∞" if math.isinf(value) else f"{value:.3f}"


def _exact(value: float | None) -> float | str | None:
    return "inf" if value is not None and math.isinf(value) else value


def completeness(report: LedgerReport) -> str:
    """How much of a ledger others vouch for; nothing is called complete without them."""
    lines = len(report.entries)
    if not report.whole:
        return f"{lines} lines hold, what follows them does not"
    if report.anchored is None and report.compared:
        return f"{lines} lines; others remember more lines, or other ones"
    if report.anchored is None:
        return f"{lines} lines; nobody else's memory was compared, so lines may be missing at the end"
    if report.anchored == lines:
        return f"{lines} lines, complete as far as the anchors go"
    return (
        f"{lines} lines; the first {report.anchored} are complete by the anchors, {lines - report.anchored} came later"
    )


def described(mechanism: Mechanism | None) -> str:
    """A mechanism in one line."""
    if mechanism is None:
        return "not supported"
    if isinstance(mechanism, Unprotected):
        return "no privacy"
    unit = "record" if mechanism.unit == "record" else f"user of {mechanism.max_records_per_unit}"
    return f"q {mechanism.rate} · sigma {mechanism.sigma} · {mechanism.steps} steps · {unit}"


def ledger_json(report: LedgerReport) -> dict[str, Any]:
    """One ledger's report for machines; an infinite epsilon is the text ``inf``."""
    charged = report.charged
    last = charged[-1] if charged else None
    return {
        "source": report.source,
        "site": report.site,
        "member": report.owner,
        "dataset": report.dataset,
        "name": report.name,
        "lines": len(report.entries),
        "root": report.root,
        "whole": report.whole,
        "anchored": report.anchored,
        "policy": report.policy.model_dump(mode="json") if report.policy else None,
        "policy_changes": [{"epsilon": epsilon, "reason": reason} for epsilon, reason in report.changes],
        "enforced": _exact(last.enforced_after if last else 0.0),
        "pld": _exact(last.pld_after if last else 0.0),
        "rdp": _exact(report.rdp_after),
        "naive": _exact(last.naive_after if last else 0.0),
        "jobs": [_job_json(job) for job in report.jobs],
        "findings": [one.to_json() for one in report.found],
    }


def _job_json(job: JobReport) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "job": job.job,
        "plan": job.plan,
        "stage": job.stage,
        "time": job.time,
        "state": job.state,
        "charged": job.charged,
        "open": job.is_open,
        "mechanism": job.mechanism.to_json() if job.mechanism else None,
        "claimed_pld": job.claimed,
    }
    if job.charged:
        numbers = ("pld", "rdp", "opacus", "enforced_after", "pld_after", "naive_after")
        facts |= {name: _exact(getattr(job, name)) for name in numbers}
    return facts


def to_json(reports: Sequence[LedgerReport], found: Sequence[Found] = (), **more: Any) -> dict[str, Any]:
    """A whole audit for machines; ``found`` is what belongs to no single ledger."""
    code = worst([*found, *(one for report in reports for one in report.found)])
    return {
        "version": __version__,
        "exit": int(code),
        "result": code.name.lower(),
        "ledgers": [ledger_json(report) for report in reports],
        "findings": [one.to_json() for one in found],
        "numbers": NUMBERS,
        "shows": SHOWS,
        "does_not_show": SHOWS_NOT,
        **more,
    }


def ledger_text(report: LedgerReport) -> list[str]:
    """One ledger's report as lines."""
    policy = report.policy
    if policy is None:
        return [f"{report.title}: no report"]
    budget = f"epsilon {policy.epsilon}" if policy.epsilon else "no budget"
    unit = policy.unit if policy.unit == "record" else f"user of up to {policy.max_records_per_unit} records"
    guarded = "" if policy.protected else "; declared NOT PROTECTED by its site"
    lines = [
        f"{shown(report.title)} (data set {report.dataset[:16]}…): {completeness(report)}",
        f"  policy: {budget}, delta {policy.delta}, unit {unit}, {policy.adjacency}, "
        f"filter order {policy.order}{guarded}",
    ]
    lines += [f"  policy changed to {epsilon}: {shown(reason) or 'no reason'}" for epsilon, reason in report.changes]
    for job in report.jobs:
        numbers = f"PLD {number(job.pld)}, RDP {number(job.rdp)}" if job.charged else "not charged"
        if job.charged and job.opacus is not None:
            numbers += f", Opacus {number(job.opacus)}"
        lines.append(
            f"  {job.time} {shown(job.plan)} stage {job.stage}: {described(job.mechanism)}: {numbers}; {job.state}"
        )
    if report.charged:
        last = report.charged[-1]
        lines.append(f"  enforced so far  {number(last.enforced_after)}  (Renyi filter, order {policy.order})")
        lines.append(f"  PLD so far       {number(last.pld_after)}  (if all jobs had been fixed in advance)")
        lines.append(f"  RDP so far       {number(report.rdp_after)}  (best order, the same condition)")
        lines.append(f"  naive sum        {number(last.naive_after)}  (at the sum of the deltas)")
    else:
        lines.append("  no job is charged")
    if waiting := sum(job.is_open for job in report.jobs):
        lines.append(f"  {waiting} open reservation(s), counted in full")
    return lines


def findings_text(found: Sequence[Found]) -> list[str]:
    """Findings as lines, the class first."""
    return [f"[{int(one.code)} {one.code.name.lower().replace('_', ' ')}] {shown(one.text, 500)}" for one in found]


def to_html(reports: Sequence[LedgerReport], found: Sequence[Found], when: str, rounds: Sequence[str] = ()) -> str:
    """The report as one self-contained HTML page: no script, nothing fetched, everything escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("privacy.budget"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "described": described, "complete": completeness}
    every = [*found, *(one for report in reports for one in report.found)]
    return environment.get_template("audit.html").render(
        reports=reports,
        charts=[chart(report) for report in reports],
        found=sorted(every, key=lambda one: one.code),
        code=worst(every),
        ok=Code.OK,
        when=when,
        rounds=rounds,
        version=__version__,
        numbers=NUMBERS,
        shows=SHOWS,
        shows_not=SHOWS_NOT,
        is_private=lambda m: isinstance(m, DpSgd),
    )
