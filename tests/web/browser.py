"""A real browser: Debian's Chromium, driven by Selenium, which is asked for nothing that the page could notice."""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from privacy.errors import UserError

IMAGES = Path(__file__).resolve().parent.parent.parent / "docs" / "images"
INSTALL = "on Debian: apt install chromium chromium-driver"
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1")


class Browser:
    """One window with one page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.resize(1000, 900)

    def resize(self, width: int, height: int = 800, *, dark: bool = False) -> None:
        """Another screen; the page is as wide as it says."""
        about = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", about)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, port: int) -> None:
        """A page; what the console said about the one before is forgotten."""
        self.driver.get("about:blank")
        self.complaints()
        self.driver.get(f"http://127.0.0.1:{port}/")

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return self.find(css).text

    def wait(self, what: Callable[[], object], seconds: float = 60.0) -> None:
        """Until it is so; sections are replaced while one looks at them."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if what():
                    return
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < deadline, f"waited too long; the page says: {self.text('body')[:2000]}"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """What somebody without a mouse does."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        """The id, or the class, of what has the keyboard."""
        element = self.driver.switch_to.active_element
        return str(element.get_attribute("id") or element.get_attribute("class"))

    def tab_to(self, name: str, most: int = 40) -> None:
        """Press the tab key until the element with this id has the keyboard."""
        for _ in range(most):
            self.press(Keys.TAB)
            if self.focused() == name:
                return
        raise AssertionError(f"the keyboard does not reach {name}")

    def overflow(self) -> list[str]:
        """Elements that stick out of the window on the right."""
        script = """
        const wide = document.documentElement.clientWidth;
        const out = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > wide + 0.5
            && !e.closest("svg"));
        if (document.documentElement.scrollWidth > wide) out.push(document.documentElement);
        return out.map(e => e.outerHTML.slice(0, 80));
        """
        found: list[str] = self.driver.execute_script(script)
        return found

    def complaints(self) -> list[str]:
        """What the browser's console has: breaches of the content-security policy, files that are missing."""
        found: list[dict[str, Any]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in found]

    def picture(self, name: str) -> None:
        """The whole page as an image of the documentation."""
        about = {"captureBeyondViewport": True, "format": "png"}
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", about | {"clip": self._whole()})
        with Image.open(io.BytesIO(base64.b64decode(found["data"]))) as whole:  # few colours: a third of the bytes
            whole.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(IMAGES / name, optimize=True)

    def _whole(self) -> dict[str, float]:
        script = (
            "const r = document.documentElement; return [r.clientWidth, document.body.getBoundingClientRect().bottom]"
        )
        width, height = self.driver.execute_script(script)
        return {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a new profile; its absence is an error and no reason to skip."""
    binary, service = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or service is None:
        raise UserError("expected chromium and chromedriver on this machine, found none", hint=INSTALL)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(service))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
