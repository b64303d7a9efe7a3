"""Fixtures with a real browser. A test file imports the `browser` or the `page` that it uses."""

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


@pytest.fixture(scope="module")  # each file gets its own: two at a time do not work
def browser() -> Iterator[Browser]:
    """Start Debian's Chromium, headless, with its own profile."""
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("chromium is not on the PATH")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Open an empty page; the test fails if the page reports an error or sends another machine a request."""
    with browser.new_context() as context:
        opened = context.new_page()
        errors: list[str] = []
        opened.on("console", lambda message: errors.append(message.text) if is_error(message) else None)
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("request", lambda request: errors.append(request.url) if not is_local(request.url) else None)
        yield opened
    assert errors == []


def is_error(message: ConsoleMessage) -> bool:
    """Say whether a message is a page's error; a browser also reports an image that a service refuses."""
    return message.type == "error" and not re.search("the server responded with a status of 4(13|22)", message.text)


def is_local(url: str) -> bool:
    """Say whether an address leads to this machine."""
    return re.match(r"http://127\.0\.0\.1[:/]|file:|data:|blob:|about:", url) is not None
