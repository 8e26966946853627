"""What the status pages are made of: nothing inline, nothing from elsewhere, and colours that can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from privacy.web.view import clock, counted, moment, size

ROOT = Path(__file__).resolve().parent.parent
#: Everything that is rendered or sent to a browser.
ASSETS = sorted(
    path
    for side in ("privacy", "coordinator", "participant")
    for folder in ("templates", "static")
    for path in (ROOT / side / "web" / folder).glob("*")
)


def test_there_are_assets() -> None:
    assert {"page.html", "status.css", "status.js", "plan.html", "data.html"} <= {path.name for path in ASSETS}


@pytest.mark.parametrize("path", ASSETS, ids=lambda path: f"{path.parts[-4]}/{path.name}")
def test_nothing_is_inline_and_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)
    if path.suffix == ".html":
        assert not re.search(r"\sstyle=|\son[a-z]+=|<style|javascript:", text)
        assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))
        safe = re.findall(r"\{\{[^}]*\|\s*safe[^}]*\}\}", text)
        assert all(s.startswith(("{{ ' ", "{{ part | safe")) for s in safe), "only our own words, and rendered parts"
    if path.suffix == ".js":
        assert not re.search(r"\beval\b|new Function|document\.write|\.style\b", text)


def test_css_covers_dark_mode_small_screens_and_still_pages() -> None:
    css = (ROOT / "privacy/web/static/status.css").read_text()
    for feature in ("prefers-color-scheme: dark", "prefers-reduced-motion", "max-width: 40rem", ":focus-visible"):
        assert feature in css


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_text_colour_has_contrast_on_every_background() -> None:
    css = (ROOT / "privacy/web/static/status.css").read_text()
    light, dark = (
        {name: c if len(c) == 7 else "#" + "".join(2 * x for x in c[1:]) for name, c in found}
        for found in (
            re.findall(r"--(\w+): (#[0-9a-f]{3,6})", css[: css.index("@media")]),
            re.findall(r"--(\w+): (#[0-9a-f]{3,6})", css[css.index("@media") : css.index("* {")]),
        )
    )
    assert set(light) == set(dark)
    for colours in (light, dark):
        for ink in ("ink", "soft", "blue", "green", "red", "amber"):
            for ground in ("paper", "tint", "track"):
                a, b = sorted((luminance(colours[ink]), luminance(colours[ground])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, f"{ink} {colours[ink]} on {ground} {colours[ground]}"


def test_numbers_and_times_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 20, 5 << 40)] == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5.0 TiB"]
    assert moment(0.9) == {"iso": "1970-01-01T00:00:00Z", "text": "1970-01-01 00:00:00 UTC"}
    assert clock(3661)["text"] == "01:01:01 UTC"
    assert (counted(1, "site"), counted(2, "site")) == ("1 site", "2 sites")
