"""What serving came to while it serves: figures for Prometheus, spans for OpenTelemetry.

    metrics = Metrics(instances)
    executor = ExecutorAPI(engines, instances, watch=[metrics.hear, Spans(tracer).hear])

Both only listen. Their libraries are the extra `telemetry`, imported where these are made.
"""

from sagec.runtime.telemetry.metrics import Metrics
from sagec.runtime.telemetry.requests import Ledger
from sagec.runtime.telemetry.spans import Spans

__all__ = ["Ledger", "Metrics", "Spans"]
