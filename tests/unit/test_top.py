"""`sagec top` and `sagec run --metrics`: a page of figures, and what is read from it."""

import re
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client import start_http_server

from sagec.cli import main
from sagec.cli.dashboard import Page
from sagec.runtime.strategies import create
from sagec.runtime.telemetry import Metrics
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import SPLIT, Served, echo_executor, requests


def metrics_of_a_run():
    executor = echo_executor(SPLIT, Served())
    metrics = Metrics(executor.instances)
    executor.watch(metrics.hear)
    assert list(executor.serve(requests(12), create("fifo"), DirectPlanner()))
    return metrics


@pytest.fixture
def page_url():
    """A metrics page of a run that is over."""
    server, thread = start_http_server(0, "127.0.0.1", metrics_of_a_run().registry)
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()
    thread.join()


def test_once_shows_requests_times_and_instances(page_url, capsys):
    assert main(["top", page_url, "--once"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"waiting +running +done", said)
    assert re.search(r"^ *0 +0 +12 +0", said, re.MULTILINE)
    assert re.search(r"^TTFT +[\d.]+ +[\d.]+ +12$", said, re.MULTILINE)
    assert re.search(r"^p0 +0 +0%", said, re.MULTILINE)
    assert re.search(r"^d0 +0 +0%", said, re.MULTILINE)


def test_it_follows_until_the_page_is_gone():
    registry = metrics_of_a_run().registry
    server, thread = start_http_server(0, "127.0.0.1", registry)
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    command = [sys.executable, "-m", "sagec.cli", "top", url, "--every", "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        lines = iter(following.stdout.readline, "")
        for _ in range(2):
            assert any(line.startswith("instances") for line in lines)
        server.shutdown()
        server.server_close()
        thread.join()
        assert list(lines)[-1] == f"{url}: nobody answers any more\n"
    assert following.returncode == 0


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "http://127.0.0.1:{closed}/metrics",
            "Connection refused; serve with `sagec run --metrics",
        ),
        ("nonsense", "'nonsense' is no address, as in http://"),
    ],
)
def test_a_page_that_is_not_there_is_named(url, said, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = url.format(closed=free.getsockname()[1])
    assert main(["top", url, "--once"]) == 1
    assert said in capsys.readouterr().err


def test_a_page_of_somebody_else_is_named(capsys):
    from prometheus_client import CollectorRegistry, Gauge

    registry = CollectorRegistry()
    Gauge("other", "something", registry=registry).set(1)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        assert main(["top", f"http://127.0.0.1:{server.server_port}", "--once"]) == 1
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert "these are not sagec's metrics" in capsys.readouterr().err


def test_quantiles_lie_between_the_bounds_of_their_buckets():
    lines = [
        "# TYPE t histogram",
        't_bucket{le="1.0"} 2',
        't_bucket{le="2.0"} 4',
        't_bucket{le="+Inf"} 4',
        "t_count 4",
        "t_sum 5",
    ]
    page = Page.of("\n".join(lines) + "\n", time.monotonic())
    assert page.quantile("t", 0.5) == pytest.approx(1.0)
    assert page.quantile("t", 0.75) == pytest.approx(1.5)
    assert page.quantile("nothing", 0.5) is None


def test_a_port_that_is_taken_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        file = "examples/tour.sage"
        flags = ["--engine", "echo", "--one-process", "--metrics", port]
        assert main(["run", file, *flags]) == 1
    assert f"--metrics {port}: Address already in use" in capsys.readouterr().err


def test_while_a_file_is_served_its_figures_can_be_read(tmp_path):
    command = [sys.executable, "-m", "sagec.cli", "run", "examples/tour.sage", "--engine", "echo"]
    command += ["--one-process", "--metrics", "0", "--spans", str(tmp_path / "spans.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"metrics: http://127.0.0.1:\d+/metrics", done.stderr)
    lines = (tmp_path / "spans.jsonl").read_text().splitlines()
    assert any('"name": "request"' in line for line in lines)
