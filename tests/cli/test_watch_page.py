"""The page of a run that is followed: the same numbers, renewed, for this machine alone."""

import json
import re
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geffect import open_run
from geffect.analysis import g_effect
from geffect.cli.followed import Followed
from geffect.cli.watch_frame import number
from geffect.cli.watch_page import HERE, Told, numbers, path, rows, serving, totals
from geffect.store.writer import RunWriter
from tests.utils.browser import browser
from tests.utils.command_line import Ask
from tests.utils.pages import Page
from tests.utils.runs import PARAMETERS, append, plain_rows


@pytest.fixture
def address(recorded: Path) -> Iterator[str]:
    with serving(Followed(recorded), 0) as found:
        yield found


def answer(address: str, place: str = "/", method: str = "GET", **headers: str) -> HTTPResponse:
    connection = HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=30)
    connection.request(method, place, headers=headers)
    return connection.getresponse()


def test_the_page_has_the_numbers_of_the_scores(address: str, recorded: Path) -> None:
    found = answer(address)
    text = found.read().decode()
    page, table = Page(text), g_effect(open_run(recorded))
    assert found.status == 200 and page.words.count("complete: 4 steps") == 1
    by_layer = page.tables[0]
    assert by_layer[0][:2] == ["layer", "unlearning"]
    for row in by_layer[1:]:
        for effect, shown in (("unlearning", row[1]), ("retaining", row[4])):
            own = table[(table["effect"] == effect) & (table["layer"] == row[0].strip())]
            assert shown == number(own["value"].iloc[-1])
    assert {"violation rate", "conflict rate"} <= {
        row[0].partition(" (")[0] for row in page.tables[1]
    }


def test_the_part_that_is_renewed_is_that_of_the_page(address: str) -> None:
    part = answer(address, "/now").read().decode()
    assert part.strip() in answer(address).read().decode()


def test_the_numbers_are_there_as_json(address: str, recorded: Path) -> None:
    found = answer(address, "/numbers.json?x=1")
    told, run = json.loads(found.read()), open_run(recorded)
    assert found.headers["Content-Type"] == "application/json; charset=utf-8"
    assert told["steps"] == run.steps.tolist() and told["state"] == "complete"
    table = g_effect(run)
    for effect in told["effects"]:
        own = table[table["effect"] == effect["name"]]["value"].to_numpy()
        assert np.array(effect["values"]).reshape(-1).tolist() == own.tolist()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost:80", "127.0.0.1:9", None])
def test_a_page_of_this_machine_is_answered(address: str, host: str | None) -> None:
    """Also through a tunnel, whose end may have another port."""
    assert answer(address, **({} if host is None else {"Host": host})).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", "", "[::1]"],
)
def test_a_page_of_another_name_is_not(address: str, host: str) -> None:
    for place in ("/", "/now", "/numbers.json"):
        found = answer(address, place, Host=host)
        assert found.status == 403 and b"step" not in found.read()


def test_a_request_without_a_host_is_refused(address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with socket.create_connection((HERE, port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 403 " in connection.recv(200)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_written(address: str, method: str) -> None:
    assert answer(address, method=method).status == 405


def test_other_places_are_not_there(address: str) -> None:
    for place in ("/x", "/../etc", "/now/", "/%2e%2e/run.h5"):
        assert answer(address, place).status == 404
    assert answer(address, "/favicon.ico").status == 204
    head = answer(address, method="HEAD")
    assert head.status == 200 and not head.read()


def test_headers_let_nothing_out_and_nothing_in(address: str) -> None:
    headers = answer(address).headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Cache-Control"] == "no-store"


def test_a_run_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    place = tmp_path / "run.h5"
    with serving(Followed(place), 0) as address:
        assert b"waiting for its first step" in answer(address, "/now").read()
        place.write_text("no run")
        found = answer(address, "/now")
        assert found.status == 503 and b"should be a run file" in found.read()


def test_a_port_that_is_taken_is_refused(ask: Ask, recorded: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HERE, 0))
        taken.listen()
        said = ask("watch", recorded, "--serve", "--port", taken.getsockname()[1])
    assert said.code == 1 and "`--port` should be one that is free" in said.err


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    from dataclasses import replace

    odd = tuple(
        replace(p, name=f"<b>{p.name}", layer=f"<img src=x onerror=alert({i})>")
        for i, p in enumerate(PARAMETERS)
    )
    place = tmp_path / "<i>.h5"
    writer = RunWriter(place, odd)
    append(writer, plain_rows(1)[0])
    with serving(Followed(place), 0) as address:
        page = Page(answer(address).read().decode())
    assert not {"img", "b", "i"} & page.tags
    assert "<img src=x onerror=alert(0)>" in page.words and "<i>.h5" in page.words


def test_a_browser_renews_the_page_and_asks_nobody_else(tmp_path: Path) -> None:
    place = tmp_path / "run.h5"
    writer, (first, *further) = RunWriter(place, PARAMETERS), plain_rows(4)
    append(writer, first)
    with serving(Followed(place), 0) as address, browser() as seen:
        seen.driver.get(address)
        assert "1 captured" in seen.run("return document.body.textContent")
        for row in further:
            append(writer, row)
        writer.close(complete=True)
        said = seen.run(
            "for (let i = 0; i < 200; i++) {"
            "  if (document.body.textContent.includes('complete: 4')) break;"
            "  await new Promise((done) => setTimeout(done, 100));"
            "} return document.body.textContent;"
        )
        assert said.count("complete") == 1 and "captured" not in said.partition("Whole model")[0]
        assert seen.console() == []
        assert all(url.startswith(address) for url in seen.requests())


@pytest.mark.parametrize(("width", "curves"), [(390, 0), (1400, 2)])
def test_on_a_phone_both_effects_are_in_view(address: str, width: int, curves: int) -> None:
    with browser() as seen:
        seen.screen(width)
        seen.driver.get(address)
        right, shown = seen.run(
            """
            const row = document.querySelector(".blocks tbody tr");
            const seen = [...row.cells].filter((cell) => cell.getBoundingClientRect().width);
            return [Math.max(...seen.map((cell) => cell.getBoundingClientRect().right)),
                    seen.filter((cell) => cell.querySelector("path")).length];
            """
        )
    assert right <= width and shown == curves


def test_a_browser_keeps_what_was_there_when_the_watch_ends(tmp_path: Path) -> None:
    place = tmp_path / "run.h5"
    writer = RunWriter(place, PARAMETERS)
    append(writer, plain_rows(1)[0])
    with browser() as seen:
        with serving(Followed(place), 0) as address:
            seen.driver.get(address)
        said = seen.run(
            "for (let i = 0; i < 200; i++) {"
            "  if (document.body.textContent.includes('has ended')) break;"
            "  await new Promise((done) => setTimeout(done, 100));"
            "} return document.body.textContent;"
        )
    assert "the watch has ended" in said and "1 captured" in said


# What is drawn.


def test_bars_lie_on_their_side_and_the_longest_is_half_as_wide(recorded: Path) -> None:
    view = Followed(recorded).look()
    for place, (_, told) in enumerate(rows(view)):
        for effect, one in zip(view.effects, told, strict=False):
            value, most = effect.last[place], np.abs(effect.last).max()
            assert one.length == pytest.approx(50 * abs(value) / most)
            assert one.start == pytest.approx(50.0 - (one.length if value < 0 else 0.0))
    longest = max(one.length for _, told in rows(view) for one in told)
    assert longest == 50.0 and len(totals(view)) == 6 + 2 + 3


@pytest.mark.parametrize(
    ("values", "bounds", "drawn"),
    [
        ([], (), ""),
        ([np.nan], (), ""),
        ([2.0], (), "M50 10h0"),
        ([0.0, 1.0], (), "M0 19h0L100 1"),
        ([1.0, 1.0], (0.0, 1.0), "M0 1h0L100 1"),
        ([0.0, np.inf, 4.0], (), "M0 19h0M100 1h0"),
        ([-1.7e308, 1.7e308], (), "M0 19h0L100 1"),
    ],
)
def test_curves(values: list[float], bounds: tuple[float, ...], drawn: str) -> None:
    assert path(np.array(values), *bounds) == drawn


def test_a_curve_of_many_steps_has_few_points() -> None:
    drawn = path(np.random.default_rng(0).normal(size=5000))
    assert len(re.findall("[ML]", drawn)) == 240


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    place = tmp_path / "run.h5"
    writer = RunWriter(place, PARAMETERS)
    (row,) = plain_rows(1)
    row.losses[1] = np.inf
    append(writer, row)

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    told = json.loads(json.dumps(numbers(Followed(place).look())), parse_constant=refuse)
    assert [loss["values"] for loss in told["losses"]] == [[[0.0]], [[None]], [[0.0]]]


def test_a_number_that_is_not_known_has_no_bar() -> None:
    assert Told("", "unknown", "", "", "").length == 0.0
