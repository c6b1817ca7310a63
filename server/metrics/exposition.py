"""`GET /metrics`: what every process has counted, vLLM's own with it."""

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

router = APIRouter()


@router.get("/metrics", response_class=Response)
def show_metrics() -> Response:
    """In Prometheus's text format. `process_*` and `python_*` are the API process's own."""
    # A plain function: FastAPI runs it beside the event loop, so that no stream waits for files to be read. Never as
    # OpenMetrics, in which prometheus_client would turn the colons of vLLM's names into underscores.
    return Response(generate_latest(build_registry()), headers={"Content-Type": CONTENT_TYPE_LATEST})


def build_registry() -> CollectorRegistry:
    """Everything that is shown."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
