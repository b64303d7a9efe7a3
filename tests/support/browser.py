"""A real browser: fixtures for the tests of pages. Import `browser` and `page` where they are used."""

import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")  # a file that imports it gets its own: two at a time would not work
def browser() -> Iterator[Browser]:
    """Start Debian's Chromium without a window, with a profile of its own."""
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("chromium is not on the PATH")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Open an empty page; the test fails if anything on it reports an error, or asks another machine for anything."""
    with browser.new_context() as context:
        opened = context.new_page()
        errors: list[str] = []
        opened.on("console", lambda message: errors.append(message.text) if is_error(message) else None)
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("request", lambda request: errors.append(request.url) if not is_local(request.url) else None)
        yield opened
    assert errors == []


def is_error(message: ConsoleMessage) -> bool:
    """Tell a page's errors from what a browser itself notes of an image that a service refused with good reason."""
    return message.type == "error" and not re.search("the server responded with a status of 4(13|22)", message.text)


def is_local(url: str) -> bool:
    """Say whether an address leads to this machine."""
    return re.match(r"http://127\.0\.0\.1[:/]|file:|data:|blob:|about:", url) is not None
