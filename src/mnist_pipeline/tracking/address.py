"""Where the tracking store is, and what may be shown of that: no password, no token."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, unquote_plus

TRACKING_URI = "MLFLOW_TRACKING_URI"
DATABASE = Path("mlflow.db")
_SECRET_URIS = (TRACKING_URI, "MLFLOW_REGISTRY_URI")
_SECRETS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SQLITE = re.compile(r"(?s)(sqlite(?:\+\w+)?:///)([^?]*)(\?.*)?")
_URL = re.compile(r"(?s)([A-Za-z][\w+.-]*)://([^/?#]*)(.*)")
_HOST_AND_PORT = re.compile(r"([\w.-]+|\[[\dA-Fa-f:.]+\])?(:\d{1,5})?")
_PATH = re.compile(r"(file:)?[\w./~-]+")
_LETTERS = 3  # shorter parts of a secret occur in any text


def locate_store(root: Path) -> tuple[str, Path | None]:
    """Return the address of the store and, if it is an SQLite database, its file. A relative path begins at `root`."""
    uri = os.environ.get(TRACKING_URI) or f"sqlite:///{DATABASE}"
    if (found := _SQLITE.fullmatch(uri)) and not re.match(":memory:|file:|$", found[2]):
        return f"{found[1]}{root / found[2]}{found[3] or ''}", root / found[2]
    if _PATH.fullmatch(uri) and not uri.startswith(("databricks", "file:/")):
        return (root / uri.removeprefix("file:")).as_uri(), None
    return uri, None


def show_address(uri: str) -> str:
    """Return what may be shown of an address: scheme, host and port, or the path of a local file."""
    if found := _SQLITE.fullmatch(uri):
        return f"{found[1]}{found[2]}"
    if _PATH.fullmatch(uri):
        return uri
    if not (found := _URL.fullmatch(uri)):
        return "…"
    scheme, authority, rest = found.groups()
    _, at, place = authority.rpartition("@")
    if not at and not _HOST_AND_PORT.fullmatch(authority) and rest.count("@") == 1:  # the password has a / in it
        place, rest = re.split("[/?#]", rest.partition("@")[2])[0], ""
    is_clear = "@" not in rest and _HOST_AND_PORT.fullmatch(place)
    return f"{scheme}://{place if is_clear else '…'}"


def store_address() -> str:
    """Return what may be shown of the store's address."""
    return show_address(os.environ.get(TRACKING_URI, str(DATABASE)))


def hide_secrets(text: str) -> str:
    """Replace each address in a text by what may be shown of it, and each part of a secret of MLflow's by `…`."""
    text = re.sub(r"[A-Za-z][\w+.-]*://[^\s'\"<>|)]+", lambda found: show_address(found[0]), text)
    secret: set[str] = set()
    for name in (*_SECRET_URIS, *_SECRETS):
        value = os.environ.get(name, "")
        shown = show_address(value) if name in _SECRET_URIS else ""
        secret |= _words(value, unquote(value), unquote_plus(value)) - _words(shown)
    hidden = sorted((word for word in secret if len(word) >= _LETTERS), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, hidden)), "…", text) if hidden else text


def _words(*texts: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(texts)))
