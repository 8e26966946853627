"""The coordinator's page in a browser, while real processes live through a round; and its picture in the docs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

import participant.patience
from demo.federation import Federation, free_port
from tests.test_end_to_end import NAMES, PATIENT, POLICY, SITE, put_trained
from tests.web.browser import Browser
from tests.web.scenes import busy_coordinator, page_of

pytestmark = pytest.mark.browser


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Federation, int]]:
    """A coordinator with a page, and sites whose training is done."""
    port = free_port()
    toml = f'[web]\nlisten = "{port}"\n'
    found = Federation(tmp_path, NAMES, POLICY, dict.fromkeys(NAMES, SITE), coordinator_toml=toml)
    found.create()
    raw = PATIENT.replace(b"upload_s = 2", b"upload_s = 15")
    for name in NAMES:
        put_trained(found, name, raw)
    (tmp_path / "plan.toml").write_bytes(raw)
    found.start_coordinator()
    yield found, port
    found.stop_all()


def test_a_live_round_without_a_reload(browser: Browser, live: tuple[Federation, int]) -> None:
    federation, port = live
    browser.resize(1000)
    browser.open(port)
    browser.wait(lambda: browser.text("#link") == "live")
    assert browser.text("#said") == "No plan has been offered yet."
    browser.driver.execute_script("window.marked = true")
    federation.operator("plan", "submit", str(federation.directory / "plan.toml"))
    browser.wait(lambda: browser.all("#part-plan-toy"))
    assert not browser.all("#part-none")
    for name in NAMES:
        federation.environment = {"VEILSUM_FAULT": "before-M5"} if name == "site-5" else {}
        federation.start_site(name)
    federation.environment = {}
    browser.wait(lambda: browser.text("#said") == "toy: round 1 is uploading.")
    assert browser.text("#part-plan-toy li[aria-current]") == "uploading"
    assert " UTC, in " in browser.text("time[data-until]")
    browser.wait(lambda: len(browser.all(".badge.uploaded")) == 4)
    assert len(browser.all("tbody progress")) == 4
    browser.wait(lambda: "site-5 silent" in " ".join(browser.text("#part-plan-toy table").split()))
    browser.wait(lambda: browser.text("#said") == "No round is running. toy is released.")
    assert len(browser.all(".badge.in-the-release")) == 4
    assert browser.driver.execute_script("return window.marked"), "the page was never loaded again"
    assert str(browser.find("#manifest-toy-1").get_attribute("href")).endswith("/releases/toy/1/manifest.json")
    federation.stop("coordinator")
    browser.wait(lambda: browser.text("#link") == "connection lost, trying again")
    lost = [line for line in browser.complaints() if "ERR_" not in line]  # that it stopped is no complaint
    assert lost == []


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A released plan with an evaluation, and one whose round takes uploads."""
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))
    with ExitStack() as stack:
        yield stack.enter_context(page_of(busy_coordinator(tmp_path, monkeypatch)))


def test_the_page_on_screens_of_all_kinds(browser: Browser, busy: int) -> None:
    browser.open(busy)
    browser.wait(lambda: browser.text("#link") == "live")
    for width, dark, name in (
        (1000, False, "status-coordinator.png"),
        (1000, True, "status-coordinator-dark.png"),
        (360, False, "status-coordinator-phone.png"),
    ):
        browser.resize(width, dark=dark)
        assert browser.overflow() == [], f"at {width} pixels"
        browser.picture(name)
    browser.resize(1000)
    assert browser.complaints() == []


def test_the_keyboard_reaches_everything_and_stays_where_it_is(browser: Browser, busy: int) -> None:
    browser.resize(1000)
    browser.open(busy)
    browser.wait(lambda: browser.text("#link") == "live")
    browser.press(Keys.TAB)
    assert browser.focused() == "skip"
    assert browser.find(".skip").rect["x"] >= 0
    browser.press(Keys.ENTER)
    assert browser.focused() == "parts"
    browser.tab_to("numbers-toy-2-open")
    outline = "return getComputedStyle(document.activeElement).outlineWidth"
    assert browser.driver.execute_script(outline) == "3px"
    browser.press(Keys.ENTER)
    assert browser.find("#numbers-toy-2").get_attribute("open")
    script = 'const s = document.getElementById("part-plan-toy"); put(s, s.innerHTML.replace(/ open=""/, ""));'
    browser.driver.execute_script(script)
    assert browser.find("#numbers-toy-2").get_attribute("open"), "what was open stays open when a section changes"
    assert browser.focused() == "numbers-toy-2-open"


def test_the_page_says_what_it_shows_to_a_screen_reader(browser: Browser, busy: int) -> None:
    browser.open(busy)
    assert browser.find("#said").get_attribute("aria-live") == "polite"
    assert browser.find("html").get_attribute("lang") == "en"
    assert len(browser.all("h1")) == 1
    assert all(svg.get_attribute("aria-label") for svg in browser.all("svg"))
    assert all(bar.get_attribute("aria-label") for bar in browser.all("progress, meter"))
    assert len(browser.all("table > caption")) == len(browser.all("table")) > 0
    assert not browser.all("[style]")


def test_without_scripts_the_page_is_whole_and_loads_itself_again(browser: Browser, busy: int) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(busy)
        assert browser.text("#link") == "as of the last load"
        assert browser.find("noscript meta[http-equiv=refresh]").get_attribute("content") == "10"
        assert len(browser.all("main section")) == 2
        assert browser.all("tbody progress")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
