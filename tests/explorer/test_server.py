"""The server answers its own host name and reading only, nothing outside of it, and work only for its own page."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import quote
from urllib.request import urlopen

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from tests.explorer.ledgers import answered, recorded
from trainer_attrib.cli import main
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.explorer.jobs import Jobs
from trainer_attrib.explorer.live import Work
from trainer_attrib.explorer.server import TOKEN, Explorer
from trainer_attrib.explorer.serving import Served, explorer_of
from trainer_attrib.explorer.shell import SCRIPTS
from trainer_attrib.progress import progress


class Slow:
    """A desk whose work takes as long as nobody cancels it."""

    kind = "influence"

    def told(self):
        return {}

    def work(self, fields):
        if not fields.get("completion"):
            raise ConfigurationError("There is no completion.", fix="fill it in.")

        def run():
            for _ in progress(range(10_000), "waiting"):
                time.sleep(0.01)
            return "key"

        return Work("slow", {"asked": fields["completion"]}, run)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    ledger, _, keys = answered(tmp_path_factory.mktemp("served"))
    explorer = explorer_of([ledger])
    explorer.desks.update(influence=Slow())
    with Served(explorer) as served:
        yield served, explorer, keys


def ask(served: Served, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def test_pages_and_their_twins(served):
    at, _, keys = served
    assert ask(at, "/")[0] == 200
    for path in (
        "session",
        "0/ledger",
        "0/facets",
        "0/answers",
        "0/examples",
        "0/curves/first",
        f"0/answers/{keys['effects']}",
    ):
        status, headers, body = ask(at, f"/{path}.json")
        assert (status, headers["content-type"]) == (200, "application/json")
        json.loads(body)
    status, headers, _ = ask(at, "/0/examples")
    assert (status, headers["location"]) == (307, "/#/0/examples")
    for name in SCRIPTS:
        assert ask(at, f"/assets/{name}")[1]["content-type"].startswith("text/javascript")


def test_what_a_browser_may_do_is_said_with_everything(served):
    for path in ("/", "/session.json", "/nothing", "/assets/dom.js"):
        headers = ask(served[0], path)[1]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe-eval" not in headers["content-security-policy"]
        assert "script-src 'self';" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "127.0.0.1:1", "localhost.example.org:80", ""])
def test_other_host_names_are_not_answered(served, host):
    assert ask(served[0], "/session.json", Host=host)[0] == 421


def test_the_computers_own_names_are_answered(served):
    for name in ("localhost", "LOCALHOST", "127.0.0.1"):
        assert ask(served[0], "/session.json", Host=f"{name}:{served[0].port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_writing_is_refused(served, method):
    status, headers, _ = ask(served[0], "/0/ledger.json", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    ["/assets/../server.py", "/assets/%2e%2e/server.py", "/assets//etc/passwd", "/assets/vendor/vendored.json",
     "/0/answers/..%2f..%2fledger.json", "/0/answers/%2e%2e.json", "/0/map/..%2f..%2fsecret.json", "/1/ledger.json",
     "/0/curves/" + quote("../../x", safe="") + ".json", "/0/nothing.json", "/jobs/none.json", "/" + "x" * 3000],
)  # fmt: skip
def test_nothing_outside_is_given(served, path):
    status, _, body = ask(served[0], path, **{TOKEN: served[1].token})
    assert status in (400, 404)
    assert b"root:" not in body


def test_work_needs_the_pages_token_and_can_be_cancelled(served):
    at, explorer, _ = served
    assert ask(at, "/ask/influence.json?completion=x")[0] == 403
    assert ask(at, "/0/map/first.json")[0] == 403
    assert explorer.token.encode() in ask(at, "/")[2]
    token = {TOKEN: explorer.token}
    assert ask(at, "/ask/other.json", **token)[0] == 404
    status, _, body = ask(at, "/ask/influence.json", **token)
    assert status == 400
    assert "no completion" in json.loads(body)["error"]
    status, _, body = ask(at, "/ask/influence.json?completion=x", **token)
    job = json.loads(body)["job"]
    assert status == 202
    told = until(lambda: json.loads(ask(at, f"/jobs/{job}.json")[2]), lambda told: told["done"] > 2)
    assert (told["state"], told["doing"], told["total"]) == ("running", "waiting", 10_000)
    assert ask(at, f"/jobs/{job}/cancel.json")[0] == 403
    ask(at, f"/jobs/{job}/cancel.json", **token)
    told = until(lambda: json.loads(ask(at, f"/jobs/{job}.json")[2]), lambda told: told["state"] != "running")
    assert told["state"] == "cancelled"


def until(look, enough, seconds=20):
    end = time.monotonic() + seconds
    while not enough(found := look()) and time.monotonic() < end:
        time.sleep(0.05)
    assert enough(found), found
    return found


def test_a_map_is_computed_once(served):
    at, explorer, _ = served
    token = {TOKEN: explorer.token}
    status, _, body = ask(at, "/0/map/second.json", **token)
    assert status == 202
    until(lambda: json.loads(ask(at, f"/jobs/{json.loads(body)['job']}.json")[2]), lambda told: told["state"] == "done")
    status, _, body = ask(at, "/0/map/second.json")  # there already: no work, no token
    assert status == 200
    assert len(json.loads(body)["points"]) == 16


def test_jobs_run_one_after_another_and_tell_what_went_wrong():
    jobs, running = Jobs(), threading.Event()
    active: list[int] = []

    def work():
        active.append(1)
        assert len(active) == 1
        running.wait(0.2)
        active.pop()
        return "answer"

    both = [jobs.start("work", work) for _ in range(3)]
    until(lambda: [job.state for job in both], lambda states: states == ["done"] * 3)
    assert [job.answer for job in both] == ["answer"] * 3

    def wrong():
        raise ConfigurationError("It is wrong.", fix="do it right.")

    failed = jobs.start("wrong", wrong)
    until(lambda: failed.state, lambda state: state == "failed")
    assert "do it right" in failed.error


def test_taken_ports_and_half_a_model_are_refused(served, tmp_path):
    with pytest.raises(ConfigurationError, match="Port"):
        Served(Explorer([]), served[0].port)
    with pytest.raises(ConfigurationError, match="belong together"):
        explorer_of([], tokenizer=object())


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    """As a user starts it: the address on standard output, Ctrl-C ends it."""
    ledger = recorded(tmp_path)[0]
    command = [sys.executable, "-m", "trainer_attrib", "explore", str(ledger), "--no-browser", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        url = json.loads("".join(lines))["url"]
        with urlopen(url + "session.json") as answer:
            assert json.load(answer)["ledgers"] == ["ledger"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_the_report_command(tmp_path, capsys):
    ledger = recorded(tmp_path)[0]
    assert main(["report", str(ledger), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == (tmp_path / "page.html").stat().st_size
    assert main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "no.html")]) == 2
    assert not (tmp_path / "no.html").exists()
