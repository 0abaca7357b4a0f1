"""The server's metrics in Prometheus' text format. Each server has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counters, gauges and histograms. Their names begin with `arc_`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("arc_requests", "Requests by path and status", ["path", "status"], registry=registry)
        self.running = Gauge("arc_requests_running", "Requests that are being answered", registry=registry)
        self.waiting = Gauge("arc_answers_waiting", "Answers that wait for a batch", registry=registry)
        self.seconds = Histogram(
            "arc_request_seconds", "Time of a request", ["path"], buckets=_SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "arc_first_token_seconds", "Time to the first token", buckets=_SECONDS, registry=registry
        )
        self.lookups = Counter(
            "arc_cache_lookups", "Documents by the place of their vectors", ["found"], registry=registry
        )
        self.cache_bytes = Gauge("arc_cache_bytes", "Bytes of vectors in memory", registry=registry)
        self.encoder_tokens = Counter("arc_encoder_tokens", "Tokens that were compressed", registry=registry)
        self.compressed_rows = Counter("arc_compressed_rows", "Rows that compressions made", registry=registry)
        self.answer_tokens = Counter("arc_answer_tokens", "Tokens of answers", registry=registry)
        self.batches = Histogram(
            "arc_batch_size", "Sizes of batches", ["work"], buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.fallbacks = Counter("arc_fallbacks", "Answers from text, because vectors were refused", registry=registry)
        self.upstream_errors = Counter("arc_upstream_errors", "Faults of the upstream", ["fault"], registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
