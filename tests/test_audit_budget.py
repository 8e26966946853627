"""Budgets, states and reports of audited ledgers, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from privacy.adapter import start_adapter
from privacy.budget.audit import Terms
from privacy.budget.checkpoint import sign_checkpoint
from privacy.budget.entries import Claim, PolicyChange, Start, decimal_text
from privacy.budget.events import DpSgd, Unprotected
from privacy.budget.findings import SEVERITY, Code, Found, worst
from privacy.budget.rdp import rdp
from privacy.budget.recompute import recompute
from privacy.budget.report import ledger_text, to_json
from privacy.budget.self_tests import lack_of
from privacy.cli import app
from privacy.errors import UserError
from tests.audits import (
    MECHANISM,
    NOW,
    anchor_of,
    audit,
    honest,
    later,
    private_job,
    reservation,
)
from tests.ledgers import DATASET, OTHER_KEY, POLICY, SITE, abort, commit, job, new_ledger, release, reserve


def test_more_than_the_budget(tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"epsilon": "5.1"})
    ledger = honest(tmp_path / "news.jsonl", 2, policy)  # the filter is the site's; here nobody asked it
    report = audit(ledger.path.read_bytes(), anchor_of(ledger))
    assert report.code == Code.OVER_BUDGET
    assert report.jobs[1].enforced_after > 5.1 > report.jobs[0].enforced_after
    assert [f.text.split(" (")[0] for f in report.found] == [
        f"news: line 6: with this reservation {report.jobs[1].enforced_after:.4f} is charged of a budget of 5.1",
        f"news: at the end {report.jobs[1].enforced_after:.4f} is charged of a budget of 5.1",
    ]


def test_a_budget_may_be_raised_for_a_reason_that_is_shown(tmp_path: Path) -> None:
    low = POLICY.model_copy(update={"epsilon": "5.1"})
    ledger = honest(tmp_path / "news.jsonl", 1, low)
    ledger.append(PolicyChange(policy=POLICY.model_copy(update={"epsilon": "20"}), reason="a second study"))
    for line in private_job(2):
        ledger.append(line)
    report = audit(ledger.path.read_bytes(), anchor_of(ledger))
    assert report.found == []
    assert report.changes == [("20", "a second study")]
    assert "a second study" in "\n".join(ledger_text(report))


def test_a_lowered_budget_that_is_spent_already(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl")
    ledger.append(PolicyChange(policy=POLICY.model_copy(update={"epsilon": "1"}), reason=""))
    report = audit(ledger.path.read_bytes(), anchor_of(ledger))
    assert [found.code for found in report.found] == [Code.OVER_BUDGET]
    assert "at the end" in report.found[0].text


def test_a_job_without_privacy_breaks_any_budget(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "news.jsonl", *private_job(1), reserve(2), Start(job=job(2), selftest=None))
    report = audit(ledger.path.read_bytes(), anchor_of(ledger))
    assert report.code == Code.OVER_BUDGET
    assert report.jobs[-1].pld_after == float("inf")
    assert to_json([report])["ledgers"][0]["enforced"] == "inf"


def test_a_job_without_privacy_and_without_a_budget_is_only_told(tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"epsilon": None, "protected": False})
    ledger = new_ledger(
        tmp_path / "news.jsonl", reserve(1), Start(job=job(1), selftest=None), release(1), commit(1), policy=policy
    )
    report = audit(ledger.path.read_bytes(), anchor_of(ledger))
    assert report.found == []
    assert "NOT PROTECTED" in "\n".join(ledger_text(report))


def test_a_job_that_never_started_costs_nothing(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "news.jsonl", reservation(1), abort(1), *private_job(2))
    report = audit(ledger.path.read_bytes(), anchor_of(ledger))
    assert report.found == []
    assert [j.charged for j in report.jobs] == [False, True]
    assert report.jobs[1].pld_after == pytest.approx(report.jobs[1].pld, abs=1e-9)


def test_a_job_that_started_is_never_given_back(tmp_path: Path) -> None:
    lines = [*private_job(1)[:2], abort(1)]
    ledger = new_ledger(tmp_path / "news.jsonl", *lines)
    report = audit(ledger.path.read_bytes(), anchor_of(ledger))
    assert report.jobs[0].charged
    assert report.jobs[0].enforced_after > 0


def test_an_open_reservation_counts_in_full_and_grows_old(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "news.jsonl", reservation(1))
    raw, anchor = ledger.path.read_bytes(), anchor_of(ledger)
    report = audit(raw, anchor, terms=later(days=29))
    assert report.found == []
    assert report.jobs[0].is_open
    assert report.jobs[0].enforced_after > 0
    assert audit(raw, anchor, terms=later(days=31)).code == Code.OPEN_TOO_LONG


def test_a_mechanism_that_promises_less_than_the_budget_is_about(tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"unit": "user", "max_records_per_unit": 4})
    ledger = honest(tmp_path / "news.jsonl", policy=policy)
    assert audit(ledger.path.read_bytes(), anchor_of(ledger)).code == Code.UNSUPPORTED


def test_an_accountant_without_an_answer_is_a_finding(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl")
    terms = Terms(now=NOW, seconds=0.05, with_opacus=False)
    report = audit(ledger.path.read_bytes(), anchor_of(ledger), terms=terms)
    assert report.code == Code.UNSUPPORTED
    assert report.jobs[0].pld == float("inf")


def test_opacus_is_asked_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    ledger = honest(tmp_path / "news.jsonl")
    report = audit(ledger.path.read_bytes(), anchor_of(ledger), terms=Terms(now=NOW))
    assert report.jobs[0].opacus == pytest.approx(report.jobs[0].rdp, abs=1e-6)


def test_private_jobs_before_an_unprotected_one_keep_their_numbers() -> None:
    sums = recompute((MECHANISM, Unprotected(), MECHANISM), 1e-5, 60, 4096, with_opacus=False)
    assert [value == float("inf") for value in sums.pld.each] == [False, True, False]
    assert [value == float("inf") for value in sums.pld.after] == [False, True, True]
    assert [value == float("inf") for value in sums.rdp.after] == [False, True, True]


def test_a_real_self_test_has_what_the_audit_asks_for(tmp_path: Path) -> None:
    from participant.dp_sgd import train_private
    from tests.helpers_learning import private_plan, tiny_base, word_examples

    base, found = tiny_base(tmp_path), []
    plan = private_plan(base, steps=1)
    train_private(
        plan=plan,
        base=base,
        start=start_adapter(plan.adapter),
        examples=word_examples((9, 8, 7)),
        on_selftest=lambda result: found.append(result.to_json()),
    )
    assert lack_of(found[0]) == ""
    assert lack_of(found[0] | {"passed": "true"}) == "after a self-test that did not pass"


def test_the_most_serious_class_decides() -> None:
    assert set(SEVERITY) == set(Code)
    assert worst([]) == Code.OK
    assert worst([Found(Code.NO_ANCHOR, ""), Found(Code.CLOCK, ""), Found(Code.FORK, "")]) == Code.FORK


# -- the command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["ledger", *arguments])


def test_the_command(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl")
    anchor, page = tmp_path / "site.anchor", tmp_path / "audit.html"
    other = sign_checkpoint(OTHER_KEY, "ee" * 32, 3, bytes(32))  # a ledger that is not asked about
    anchor.write_bytes(other + b"\n" + ledger.checkpoint())
    found = run(str(ledger.path), "--key", SITE.hex(), "--anchor", str(anchor), "--html", str(page))
    assert (found.exit_code, "result: nothing found (exit 0)" in found.output) == (0, True)
    html = page.read_text(encoding="utf-8")
    assert "http" not in html.replace("http-equiv", "").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "<script" not in html
    assert "<svg" in html
    assert "That the site ran the recorded code on the recorded data" in html


def test_the_command_as_json(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl")
    found = run(str(ledger.path), "--key", SITE.hex(), "--json")
    assert found.exit_code == Code.NO_ANCHOR
    report = json.loads(found.output)
    assert report["exit"] == 40
    assert report["ledgers"][0]["jobs"][0]["mechanism"] == MECHANISM.to_json()
    assert report["findings"] == []


def test_a_forged_anchor_is_a_bad_signature(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl")
    anchor = tmp_path / "site.anchor"
    anchor.write_bytes(sign_checkpoint(OTHER_KEY, DATASET, *ledger.head()))
    assert run(str(ledger.path), "--key", SITE.hex(), "--anchor", str(anchor)).exit_code == Code.BROKEN


def test_one_ledger_under_two_names(tmp_path: Path) -> None:
    """A copy is a second budget for the same records; the same file named twice is not."""
    ledger, copy, anchor = honest(tmp_path / "news.jsonl"), tmp_path / "copy.jsonl", tmp_path / "site.anchor"
    copy.write_bytes(ledger.path.read_bytes())
    anchor.write_bytes(ledger.checkpoint())
    options = ("--key", SITE.hex(), "--anchor", str(anchor))
    found = run(str(ledger.path), str(copy), *options)
    assert found.exit_code == Code.REPLAY, found.output
    assert f"[23 replay] data set {DATASET[:16]}… stands in 2 ledgers" in found.output
    assert run(str(ledger.path), str(ledger.path), *options).exit_code == Code.OK


def test_an_anchor_that_contradicts_is_not_called_missing(tmp_path: Path) -> None:
    ledger, anchor = honest(tmp_path / "news.jsonl"), tmp_path / "site.anchor"
    anchor.write_bytes(ledger.checkpoint())
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines[:-1]))
    ledger.path.with_suffix(".checkpoint").unlink()
    found = run(str(ledger.path), "--key", SITE.hex(), "--anchor", str(anchor))
    assert found.exit_code == Code.TRUNCATED
    assert "others remember more lines, or other ones" in found.output
    assert "nobody else's memory" not in found.output


def test_anchors_of_other_data_sets_are_said_to_be(tmp_path: Path) -> None:
    ledger, anchor = honest(tmp_path / "news.jsonl"), tmp_path / "site.anchor"
    anchor.write_bytes(sign_checkpoint(OTHER_KEY, "ee" * 32, 3, bytes(32)))
    found = run(str(ledger.path), "--key", SITE.hex(), "--anchor", str(anchor))
    assert found.exit_code == Code.NO_ANCHOR
    assert "note: the anchors given are about other data sets than that of " in found.output
    assert "note:" not in run(str(ledger.path), "--key", SITE.hex()).output


def test_a_page_that_cannot_be_written_costs_no_report(tmp_path: Path) -> None:
    ledger = honest(tmp_path / "news.jsonl")
    found = run(str(ledger.path), "--key", SITE.hex(), "--html", str(tmp_path / "none" / "audit.html"))
    assert "result: no anchor (exit 40)" in found.output
    assert isinstance(found.exception, UserError)
    assert "make its directory" in found.exception.hint


@pytest.mark.parametrize("arguments", [(), ("--key", "12"), ("--key", "zz" * 32)])
def test_wrong_usage(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert run(str(tmp_path / "news.jsonl"), *arguments).exit_code == 2


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\x1b[31m"
    ledger = new_ledger(tmp_path / "news.jsonl", *private_job(1))
    ledger.append(PolicyChange(policy=POLICY.model_copy(update={"epsilon": "9"}), reason=evil))
    ledger.append(reservation(2, plan=evil))
    ledger.append(Start(job=job(2), selftest=None))
    page = tmp_path / "audit.html"
    found = run(str(ledger.path), "--key", SITE.hex(), "--html", str(page))
    assert found.exit_code == Code.SELF_TEST
    assert "<script" not in page.read_text(encoding="utf-8")
    assert "\x1b" not in found.output
    assert r"\x1b[31m" in found.output


@pytest.mark.parametrize("sigma", ["0.2", "0.25"])
def test_a_guarantee_that_means_nothing_is_infinite(sigma: str, tmp_path: Path) -> None:
    hopeless = DpSgd("1", sigma, "1", "0.00001", 1000, 40, 1000)
    claim = Claim(pld="inf", rdp="inf", accountant="none", version="0")
    line = reserve(1, hopeless, rdp={"3": decimal_text(rdp(hopeless, 3))}, claim=claim)
    ledger = new_ledger(tmp_path / "news.jsonl", line)
    report = audit(ledger.path.read_bytes(), anchor_of(ledger))
    assert report.jobs[0].pld == float("inf")
    assert report.code == Code.OVER_BUDGET
