"""`sagec run --metrics` and `--spans`: who listens while it serves."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from sagec.cli.failure import InputError

if TYPE_CHECKING:
    from sagec.runtime.loop import Instance
    from sagec.runtime.recording import Recorder

HOST = "127.0.0.1"
"""Nobody outside this machine is meant; a proxy can serve it to others."""

Watcher = Callable[[Any], None]


def watchers(
    args: argparse.Namespace,
    instances: Sequence[Instance],
    recorder: Recorder | None,
    stack: ExitStack,
) -> list[Watcher]:
    """The recorder, if there is one, and those that the arguments ask for; `stack` ends these.

    Raises InputError where a port or a library is not to be had, OSError for a file.
    """
    found: list[Watcher] = [] if recorder is None else [recorder.hear]
    if args.metrics is not None:
        found.append(stack.enter_context(_metrics(args.metrics, instances, recorder)))
    if args.spans is not None:
        found.append(stack.enter_context(_spans(args.spans)))
    return found


@contextmanager
def _metrics(
    port: int, instances: Sequence[Instance], recorder: Recorder | None
) -> Iterator[Watcher]:
    """Serve a metrics page while this lasts, in a thread of its own."""
    try:
        from prometheus_client import start_http_server
    except ImportError:
        raise _missing("--metrics", "prometheus_client") from None
    from sagec.runtime.telemetry import Metrics

    metrics = Metrics(instances)
    if recorder is not None:
        metrics.follow(recorder)
    try:
        server, thread = start_http_server(port, HOST, metrics.registry)
    except OSError as error:
        raise InputError(
            f"--metrics {port}: {error.strerror}; another port, or 0 for any"
        ) from None
    print(f"metrics: http://{HOST}:{server.server_port}/metrics", file=sys.stderr)
    try:
        yield metrics.hear
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _spans(path: str) -> Iterator[Watcher]:
    """Write spans to a file as they end, one a line."""
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
    except ImportError:
        raise _missing("--spans", "opentelemetry-sdk") from None
    from sagec.runtime.telemetry import Spans

    file = SpanFile(path)
    exporter = ConsoleSpanExporter(
        out=file,  # type: ignore[arg-type]  # it writes and flushes, and no more is called
        formatter=lambda span: f"{span.to_json(indent=None)}\n",
    )
    provider = TracerProvider(resource=Resource({"service.name": "sagec"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    try:
        yield Spans(provider.get_tracer("sagec")).hear
    finally:
        provider.shutdown()
        file.close()


class SpanFile:
    """Lines that are written as they come. Where that fails it is said once, and the rest is
    dropped: serving goes on."""

    def __init__(self, path: str) -> None:
        """Raises OSError where there can be no such file."""
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._number: int | None = os.open(path, flags, 0o666)

    def write(self, text: str) -> None:
        """Write a line."""
        if self._number is None:
            return
        try:
            os.write(self._number, text.encode())
        except OSError as error:
            print(
                f"spans to {self._path} end here, serving goes on: {error.strerror}",
                file=sys.stderr,
            )
            self.close()

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Close the file."""
        if self._number is not None:
            os.close(self._number)
            self._number = None


def _missing(option: str, library: str) -> InputError:
    return InputError(f"{option} needs {library}: pip install 'sagec[telemetry]'")
