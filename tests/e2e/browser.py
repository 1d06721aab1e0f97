"""A browser without a window, for MLflow's pages; Debian's packages chromium and chromium-driver have what it needs."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tests.e2e.waiting import wait_for

PROGRAMS = ("chromium", "chromedriver")
_OPTIONS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "no-proxy-server", "window-size=1500,1400"),
)


class Browser:
    """Opens pages, waits for what is to be on them, and takes pictures."""

    def __init__(self, driver: webdriver.Chrome, pictures: Path) -> None:
        self._driver, self._pictures = driver, pictures

    def show(self, address: str, *expected: str, press: str | None = None) -> str:
        """Open a page; its text once that has all that is ``expected``.

        Args:
            press: the label of what is then pressed, if it is there, such as a button that shows more of the text.
        """
        self._driver.get("about:blank")  # pages that differ behind the # would stay as they are
        self._driver.get(address)
        return self.read(*expected, press=press)

    def read(self, *expected: str, press: str | None = None) -> str:
        """The text of the page that is open once it has all that is ``expected``; see :meth:`show`."""
        text = ""

        def there() -> bool:
            nonlocal text
            try:
                for found in self._driver.find_elements(By.XPATH, f"//*[text()='{press}']") if press else ():
                    found.click()
                text = self._driver.find_element(By.TAG_NAME, "body").text
            except StaleElementReferenceException:
                return False
            return all(part in text for part in expected)

        assert wait_for(there, 60), f"{[part for part in expected if part not in text]} not on the page:\n{text}"
        return text

    def press(self, label: str) -> None:
        """Press what has this label, once it is there."""

        def pressed() -> bool:
            # Hidden ones may have the same label.
            for found in self._driver.find_elements(By.XPATH, f"//*[text()='{label}']"):
                with suppress(WebDriverException):
                    found.click()
                    return True
            return False

        assert wait_for(pressed, 60), f"nothing on the page is called {label}"

    def sees_picture(self) -> bool:
        """Whether the page comes to show a picture with more than an icon's pixels."""
        script = "return [...document.images].some(image => image.complete && image.naturalWidth > 300)"
        return wait_for(lambda: bool(self._driver.execute_script(script)), 60)

    def picture(self, name: str) -> None:
        """Keep what is on the screen."""
        self._driver.save_screenshot(str(self._pictures / f"{name}.png"))


@contextmanager
def browser(pictures: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, which goes with it."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for option in (*_OPTIONS, f"user-data-dir={profile}"):
            options.add_argument(f"--{option}")
        driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        try:
            yield Browser(driver, pictures)
        finally:
            driver.quit()
