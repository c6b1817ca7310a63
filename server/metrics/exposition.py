"""`GET /metrics`: what every process has counted, vLLM's own with it."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

router = APIRouter()


@router.get("/metrics", response_class=Response)
def show_metrics(request: Request) -> Response:
    """In Prometheus's text format or OpenMetrics, as the Accept header asks. `process_*` and `python_*` are the API
    process's own."""
    # A plain function: FastAPI runs it beside the event loop, so that no stream waits for files to be read.
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(build_registry()), headers={"Content-Type": content_type})


def build_registry() -> CollectorRegistry:
    """Everything that is shown."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
