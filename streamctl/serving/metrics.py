"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_TIMES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.35, 0.6, 1.0, 2.0, 5.0)

LATENCY = Histogram(
    "streamctl_recommend_seconds",
    "Time from a recommendation request's arrival to its answer, by method and think length.",
    ["method", "think"],
    buckets=_TIMES,
)
BATCH = Histogram(
    "streamctl_batch_size", "Requests computed together.", buckets=(1, 2, 4, 8, 16, 32, 64)
)
WAIT = Histogram("streamctl_queue_seconds", "Time in the queue.", buckets=(0.001, *_TIMES))
QUEUE = Gauge("streamctl_queue_length", "Requests waiting.")
REJECTED = Counter("streamctl_rejected", "Requests refused because of a full queue (429).")
EXPIRED = Counter("streamctl_expired", "Requests whose deadline passed (504).")
REQUESTS = Counter("streamctl_requests", "Answers by route and status.", ["route", "status"])
ITEMS = Gauge("streamctl_items", "Items that can be recommended.")
MODELS = Gauge("streamctl_models", "Model processes that answer.")
DEATHS = Counter("streamctl_model_deaths", "Model processes that ended by themselves.")
RELOADS = Counter("streamctl_reloads", "Models loaded after the first, by outcome.", ["outcome"])
