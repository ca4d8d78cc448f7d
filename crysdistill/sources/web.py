"""Requests to a web service: waits, retries, and clear errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import orjson
import requests
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema
from tenacity import RetryCallState, Retrying, retry_if_exception_type
from tenacity.stop import stop_after_attempt
from tenacity.wait import wait_exponential
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from crysdistill import __version__
from crysdistill.errors import InputError

log = logging.getLogger(__name__)

TRIES = 8
FIRST_WAIT = 1.0
"""Seconds before the second try; they double from there."""

LONGEST_WAIT = 60.0
LONGEST_REQUESTED_WAIT = 900.0
"""The longest wait in seconds; if a service asks for more, we give up at once."""

WORTH_SAYING = 5.0
"""Seconds; the user is told of waits at least this long."""

TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and between two packets of an answer."""

SHOWN = 80
"""Characters of an unusable answer that an error shows."""


class _TryAgain(Exception):  # noqa: N818 - not an error yet
    """A failed try, and how long the service asks to wait."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class Web:
    """JSON from a web service.

    A request is retried, with growing waits, after a failed or broken connection, a
    timeout, 429 and 5xx (after the time in `Retry-After`), and an answer that is not
    JSON.
    """

    def __init__(self) -> None:
        self._session = requests.Session()
        self._session.headers["User-Agent"] = f"crysdistill/{__version__}"
        self._session.headers["Accept"] = "application/json"

    def get(
        self,
        url: str,
        params: Mapping[str, Any] | None = None,
        tries: int | None = None,
    ) -> dict[str, Any]:
        """Return the answer of the service.

        Args:
            url: the address of the resource.
            params: the parameters of the query.
            tries: the number of tries; `TRIES` if None.

        Raises:
            InputError: the service refuses, or no try gave a usable answer.
        """
        tries = TRIES if tries is None else tries
        with _told(url, tries):
            for attempt in Retrying(
                stop=stop_after_attempt(tries),
                wait=_wait,
                retry=retry_if_exception_type(_TryAgain),
                before_sleep=partial(_say, url),
                reraise=True,
            ):
                with attempt:
                    return self._get(url, params)
        raise RuntimeError("unreachable")

    def _get(self, url: str, params: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            answer = self._session.get(url, params=params, timeout=TIMEOUT)
        except requests.Timeout:
            raise _TryAgain("no answer in time") from None
        except (InvalidURL, InvalidSchema, MissingSchema):
            raise InputError(f"`{url}` is not the address of a web service") from None
        except requests.RequestException as error:
            raise _TryAgain(_cause(error)) from None
        if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
            problem = f"it answers {answer.status_code} {answer.reason}"
            wait = _requested_wait(answer)
            if wait > LONGEST_REQUESTED_WAIT:
                raise InputError(
                    f"{short(url)}: {problem} and asks to wait {wait:,.0f} s; come "
                    "back then"
                )
            raise _TryAgain(problem, wait)
        if answer.status_code >= 400:
            raise Refused(answer, f"{short(url)}: refused, {_refusal(answer)}")
        try:
            content = orjson.loads(answer.content)
        except ValueError:
            raise _TryAgain(f"its answer is not JSON: `{start(answer.text)}`") from None
        if not isinstance(content, dict):
            raise InputError(
                f"{short(url)}: unexpected answer `{start(answer.text)}`; is this the "
                "right address?"
            )
        return content


class Refused(InputError):  # noqa: N818 - says what happened
    """The service refuses the request, so a retry is no use.

    Args:
        answer: the answer of the service.
        text: the message for the user.
    """

    def __init__(self, answer: requests.Response, text: str) -> None:
        super().__init__(text)
        self.status = answer.status_code


@contextmanager
def _told(url: str, tries: int) -> Iterator[None]:
    """Report the problem of the last try to the user."""
    try:
        yield
    except _TryAgain as problem:
        times = f"{tries} tries" if tries > 1 else "1 try"
        raise InputError(
            f"{short(url)}: no usable answer after {times}, {problem}; look whether "
            "the service is up and this machine has a network"
        ) from None


def _wait(state: RetryCallState) -> float:
    """Return the seconds before the next try: ours, or longer if the service asks."""
    problem = state.outcome.exception() if state.outcome else None
    requested = problem.wait if isinstance(problem, _TryAgain) else 0.0
    return max(requested, wait_exponential(FIRST_WAIT, max=LONGEST_WAIT)(state))


def _say(url: str, state: RetryCallState) -> None:
    """Tell the user about a long wait and its reason."""
    if state.outcome is not None and state.upcoming_sleep >= WORTH_SAYING:
        problem = state.outcome.exception()
        log.warning("%s: %s; waiting %.0f s", short(url), problem, state.upcoming_sleep)


def _requested_wait(answer: requests.Response) -> float:
    """Return the seconds of `Retry-After`, which may also be a date."""
    header = answer.headers.get("Retry-After", "")
    try:
        return max(0.0, float(Retry().parse_retry_after(header))) if header else 0.0
    except InvalidHeader:
        return 0.0


def _cause(error: Exception) -> str:
    """Return the innermost reason of a failed connection, in a few words."""
    text = " ".join(str(error).split())
    for marker, meaning in (
        ("NameResolution", "its name could not be resolved"),
        ("refused", "it refuses connections"),
        ("IncompleteRead", "its answer ends early"),
        ("ConnectionReset", "it drops the connection"),
        ("RemoteDisconnected", "it drops the connection"),
        ("certificate", "its certificate is not trusted"),
    ):
        if marker in text:
            return meaning
    return f"{type(error).__name__}: {start(text)}"


def _refusal(answer: requests.Response) -> str:
    """Return the reason that the service gives for refusing a request."""
    said = f"{answer.status_code} {answer.reason}"
    try:
        errors = orjson.loads(answer.content)["errors"]
        details = [e.get("detail") or e.get("title") for e in errors]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{said}: `{start(answer.text)}`"
    return f"{said}: {start('; '.join(str(d) for d in details), 3 * SHOWN)}"


def start(text: str, length: int = SHOWN) -> str:
    """Return the first characters of a text, on one line."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else f"{line[:length]}..."


def short(url: str) -> str:
    """Return an address without its query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"
