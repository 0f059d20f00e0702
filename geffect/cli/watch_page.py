"""What a browser on this machine shows of a run that is followed. Nothing can be written there."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geffect.numbers import finite

from .followed import Followed
from .watch_courses import Course, bucketed
from .watch_frame import known_rate, number
from .watch_view import View

Floats = NDArray[np.float64]

HERE = "127.0.0.1"
NAMES_OF_HERE = (HERE, "localhost")
"""What this machine is called in the address of a page of its own. Another name is one of a page
elsewhere, which points to this machine to read along."""

POINTS = 240
"""The points of a curve, at most."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors "
    "'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

Answer = tuple[HTTPStatus, str, str]
"""The status, the kind of what is answered, and that."""


@contextmanager
def serving(followed: Followed, port: int) -> Iterator[str]:
    """The address of the page, which is there as long as the block runs."""
    source = _Source(followed)
    try:
        server = _Server((HERE, port), partial(_Handler, source.answer))
    except OSError as error:
        raise ValueError(
            f"`--port` should be one that is free. Found {port}: {error.strerror}. Choose another, "
            "or leave it out for any that is free."
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://{HERE}:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def numbers(view: View) -> dict[str, Any]:
    """The view as JSON holds it: what is not a finite number is null."""
    kinds = ("effects", "totals", "rates", "losses")
    return {
        "state": str(view.state),
        "comes": view.comes,
        "steps": list(view.steps),
        "planned": view.planned,
        "notes": list(view.notes),
        **{
            kind: [
                {
                    "name": course.name,
                    "unit": course.unit,
                    "blocks": list(course.blocks),
                    "values": finite(course.values.tolist()),
                }
                for course in getattr(view, kind)
            ]
            for kind in kinds
        },
    }


@dataclass(frozen=True)
class Told:
    """A number as the page has it, with a bar from 0 to 100 and a curve."""

    says: str
    value: str
    colour: str  # the effect that it is of, which has a colour
    curve: str
    ends: str  # the lowest and the highest value
    start: float = 50.0
    length: float = 0.0


def rows(view: View) -> list[tuple[str, list[Told]]]:
    """A row for each block: of two effects the last value, its bar and its curve."""
    effects = view.effects[:2]
    most = [float(np.abs(e.last[np.isfinite(e.last)]).max(initial=0.0)) for e in effects]
    return [
        (block, [_barred(e, i, m) for e, m in zip(effects, most, strict=True)])
        for i, block in enumerate(effects[0].blocks if effects else ())
    ]


def totals(view: View) -> list[Told]:
    """A number of the whole model in each row."""
    own = view.effects[0].unit if view.effects else ""
    return [
        *(
            _told(c.name if c.unit == own else f"{c.name} ({c.unit})", c.name, c.values[:, 0])
            for c in view.totals
        ),
        *(
            Told(
                f"{c.name} rate (last step {known_rate(c.rates[-1])})",
                known_rate(c.rate),
                "",
                path(c.rates, 0.0, 1.0),
                "0 % to 100 %",
            )
            for c in view.rates
        ),
        *(_told(f"loss {c.name}", "", c.values[:, 0]) for c in view.losses),
    ]


def path(values: Floats, *bounds: float) -> str:
    """A curve over the steps in a box of 100 x 20, as SVG writes it; broken where nothing is known.

    >>> path(np.array([0.0, 1.0, float("nan"), 2.0]))
    'M0 19h0L33.33 10M100 1h0'
    """
    shown = bucketed(values, POINTS)
    known = np.isfinite(shown)
    if not known.any():
        return ""
    low, high = bounds or (shown[known].min(), shown[known].max())
    share = (shown / 2 - low / 2) / (high / 2 - low / 2) if high > low else np.full_like(shown, 0.5)
    x = np.linspace(0.0, 100.0, len(shown)) if len(shown) > 1 else np.array([50.0])
    parts, drawing = [], False
    for i, there in enumerate(known):
        if there:
            place = f"{x[i]:.4g} {19 - 18 * share[i]:.3g}"
            parts.append(f"L{place}" if drawing else f"M{place}h0")  # a point alone is a dot
        drawing = bool(there)
    return "".join(parts)


def _told(says: str, effect: str, values: Floats) -> Told:
    known = values[np.isfinite(values)]
    ends = f"{number(known.min())} to {number(known.max())}" if known.size else "unknown"
    return Told(says, number(values[-1]), _colour(effect), path(values), ends)


def _barred(effect: Course, block: int, most: float) -> Told:
    told, value = _told("", effect.name, effect.values[:, block]), effect.last[block]
    long = 50.0 * min(1.0, abs(value) / most) if most > 0 and value == value else 0.0
    start = 50.0 - long if value < 0 else 50.0
    return Told(told.says, told.value, told.colour, told.curve, told.ends, start, long)


def _colour(effect: str) -> str:
    name = effect.partition(",")[0]
    return name if name in ("unlearning", "retaining") else ""


class _Source:
    """What is answered; one look at a time."""

    def __init__(self, followed: Followed) -> None:
        self._followed, self._one_at_a_time = followed, threading.Lock()
        self._answers: dict[str, Callable[[View], tuple[str, str]]] = {
            "/": lambda view: ("text/html", _page("watch.html.jinja", view)),
            "/now": lambda view: ("text/html", _page("watch_now.html.jinja", view)),
            "/numbers.json": lambda view: ("application/json", json.dumps(numbers(view))),
        }

    def answer(self, place: str) -> Answer:
        """What is at a place of the server."""
        if place == "/favicon.ico":  # which browsers ask for
            return HTTPStatus.NO_CONTENT, "text/plain", ""
        if place not in self._answers:
            return HTTPStatus.NOT_FOUND, "text/plain", "Found nothing here. See the page at /."
        try:
            with self._one_at_a_time:
                view = self._followed.look()
        except (OSError, ValueError) as error:
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", str(error)
        return HTTPStatus.OK, *self._answers[place](view)


def _page(template: str, view: View) -> str:
    from geffect.pages import page

    return page(template, "geffect.cli", view=view, rows=rows(view), totals=totals(view))


class _Server(ThreadingHTTPServer):
    def handle_error(self, *whom: Any) -> None:
        """Say nothing of a browser that has gone before it was answered."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*whom)


class _Handler(BaseHTTPRequestHandler):
    """Answers who asks from a page of this machine, and only to be read."""

    server_version, sys_version = "geffect", ""

    def __init__(self, answer: Callable[[str], Answer], *how: Any) -> None:
        self._answer = answer
        super().__init__(*how)

    def do_GET(self) -> None:
        """Answer."""
        self._send(self._found())

    def do_HEAD(self) -> None:
        """Answer without what there is."""
        self._send(self._found(), whole=False)

    def do_POST(self) -> None:
        """Refuse what would change something."""
        status = HTTPStatus.METHOD_NOT_ALLOWED
        self._send((status, "text/plain", "A run that is watched is only read."))

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_POST

    def _found(self) -> Answer:
        host = self.headers.get_all("Host", [])
        name = host[0].rpartition(":")[0] if len(host) == 1 and ":" in host[0] else "".join(host)
        if name.lower() not in NAMES_OF_HERE:
            said = f"The address should be that of this machine: {' or '.join(NAMES_OF_HERE)}."
            return HTTPStatus.FORBIDDEN, "text/plain", said
        return self._answer(self.path.partition("?")[0])

    def _send(self, answer: Answer, *, whole: bool = True) -> None:
        status, kind, text = answer
        data = text.encode()
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if whole:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing of it in the terminal."""
