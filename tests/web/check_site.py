"""A site's page in a browser: of a real process that lives through a round, and of one with a training and a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.federation import Federation, free_port
from participant import prepare
from participant.live import Live
from participant.web.app import make_page
from participant.web.curves import Curves
from privacy.web.server import serving
from privacy.web.settings import Web
from tests.charging import BUDGET, PRIVACY, World
from tests.test_end_to_end import NAMES, PATIENT, POLICY, SITE, put_trained
from tests.web.browser import Browser

pytestmark = pytest.mark.browser

#: Steps of the training in the pictures, and how many of them are done.
STEPS, DONE = 240, 150


def test_a_site_lives_through_a_round(browser: Browser, tmp_path: Path) -> None:
    port = free_port()
    sites = dict.fromkeys(NAMES, SITE) | {"site-1": f'{SITE}[web]\nlisten = "{port}"\n'}
    federation = Federation(tmp_path, NAMES, POLICY, sites)
    federation.create()
    for name in NAMES:
        put_trained(federation, name, PATIENT)
    (tmp_path / "plan.toml").write_bytes(PATIENT)
    try:
        federation.start_coordinator()
        federation.start_site("site-1")
        browser.wait(lambda: "status page" in federation.log_tail("site-1", 20))
        browser.open(port)
        browser.wait(lambda: browser.text("#link") == "live")
        assert browser.text("#said") == "No plan has been seen yet."
        federation.operator("plan", "submit", str(tmp_path / "plan.toml"))
        browser.wait(lambda: browser.text("#said") == "toy is ready.")
        for name in NAMES[1:]:
            federation.start_site(name)
        browser.wait(lambda: browser.text("#said") == "toy is released.")
        assert "in no round now" in browser.text("#part-round")
        assert "1 of 5 members" not in browser.text("#part-plans")
        browser.wait(lambda: "∞" in browser.text("#part-data"))
        assert browser.complaints() == []
    finally:
        federation.stop_all()


@pytest.fixture
def trains(world: World) -> Iterator[int]:
    """A site with a budget, of which two jobs took something, in the middle of a training."""
    world.configure(BUDGET.format("8"))
    for name in ("quiet-1", "quiet-2"):
        prepare.prepare(world.site, world.job(name, PRIVACY), 1)
    site, curves = world.site, Curves()
    site.note("quiet-1", "released", "releases/quiet-1/stage-1/adapter")
    site.note("other", "failed", "expected a base model 'large' in participant.toml, found tiny")
    site.counts.live = Live("quiet-1", 1, 1, 2, "uploading", time.time(), time.time() + 5400, (38 << 20, 61 << 20))
    report = curves.watching(lambda *_: lambda *_: None)(world.job("quiet-2"), 1)
    for step in range(1, DONE + 1):
        report(step, STEPS, 0.4 + 1.9 * math.exp(-step / 40) + 0.08 * math.sin(step * 1.7))
    with serving(Web(listen="0"), make_page(site, curves), world.directory) as port:
        yield port


def test_the_page_on_screens_of_all_kinds(browser: Browser, trains: int) -> None:
    browser.resize(1000)
    browser.open(trains)
    browser.wait(lambda: browser.text("#link") == "live")
    assert browser.text("#said") == "Training for quiet-2."
    for width, dark, name in (
        (1000, False, "status-site.png"),
        (1000, True, "status-site-dark.png"),
        (360, False, "status-site-phone.png"),
    ):
        browser.resize(width, dark=dark)
        assert browser.overflow() == [], f"at {width} pixels"
        browser.picture(name)
    assert "quiet-1: round 2: uploading" in browser.text("#part-round")
    assert browser.find("#part-round [aria-current]").text == "uploading"
    assert "38.0 MiB of 61.0 MiB uploaded" in browser.text("#part-round")
    assert len(browser.all("svg")) == 1
    assert str(browser.find("svg").get_attribute("aria-label")).startswith("Loss: from ")
    assert browser.find("meter").get_attribute("aria-label") == "Epsilon left of toy"
    assert browser.complaints() == []
