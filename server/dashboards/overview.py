"""Overview: traffic, latency, errors, and how much of it is guided."""

from steersman.server.dashboards.panels import (
    BY_INSTANCE,
    BY_METHOD,
    Dashboard,
    Panel,
    Query,
    Row,
    quantiles,
    ratio,
    sum_rate,
)

_TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "Requests by method",
            "Which guidance is asked for?",
            (Query(sum_rate("steersman_requests_total", BY_METHOD, "method"), "{{method}}"),),
            "reqps",
            stacked=True,
        ),
        Panel(
            "All requests",
            "How busy is the server, guided or not?",
            (Query(sum_rate("vllm:request_success_total", BY_INSTANCE, "finished_reason"), "{{finished_reason}}"),),
            "reqps",
            stacked=True,
        ),
        Panel(
            "Guided share of tokens",
            "How much of what is generated is an answer with guidance?",
            (
                Query(
                    ratio("steersman_generated_tokens_total", "vllm:generation_tokens_total", BY_INSTANCE),
                    "guided",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Running and waiting",
            "Is there a queue, and is it vLLM's or that of the auxiliary caches?",
            (
                Query(f"sum(vllm:num_requests_running{{{BY_INSTANCE}}})", "running"),
                Query(f"sum(vllm:num_requests_waiting{{{BY_INSTANCE}}})", "waiting in vLLM"),
                Query(f"sum(steersman_running_requests{{{BY_INSTANCE}}})", "guided, running"),
                Query(f"sum(steersman_waiting_requests{{{BY_INSTANCE}}})", "guided, waiting for room"),
            ),
        ),
    ),
)
_LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time to first token",
            "How long does a client look at nothing?",
            quantiles("vllm:time_to_first_token_seconds", BY_INSTANCE),
            "s",
        ),
        Panel(
            "Time between tokens",
            "How fluent are streams, guided and plain together?",
            quantiles("vllm:inter_token_latency_seconds", BY_INSTANCE),
            "s",
        ),
        Panel(
            "Time of a request",
            "How long until the last token?",
            quantiles("vllm:e2e_request_latency_seconds", BY_INSTANCE),
            "s",
        ),
        Panel(
            "Wait for a turn",
            "How long do guided requests wait because --max-guided-requests run already?",
            quantiles("steersman_turn_seconds", BY_INSTANCE),
            "s",
        ),
        Panel(
            "Wait for room",
            "How long do guided requests wait for room in the auxiliary caches?",
            quantiles("steersman_admission_seconds", BY_INSTANCE),
            "s",
        ),
    ),
)
_ERRORS = Row(
    "Errors",
    (
        Panel(
            "Failed share of guided requests",
            "Do admitted requests fail?",
            (
                Query(
                    ratio(
                        *("steersman_requests_total", "steersman_requests_total", BY_METHOD, "method"),
                        only='outcome="failed"',
                    ),
                    "{{method}}",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Errors by reason",
            "What fails: guidance, time, or the engine?",
            (Query(sum_rate("steersman_errors_total", BY_INSTANCE, "reason"), "{{reason}}"),),
            "ops",
        ),
        Panel(
            "Refusals by reason",
            "What do clients get wrong, and is the server full?",
            (Query(sum_rate("steersman_refusals_total", BY_INSTANCE, "reason"), "{{reason}}"),),
            "ops",
            stacked=True,
        ),
        Panel(
            "Outcome of guided requests",
            "How many clients hang up?",
            (Query(sum_rate("steersman_requests_total", BY_METHOD, "outcome"), "{{outcome}}"),),
            "reqps",
            stacked=True,
        ),
    ),
)
_PROCESS = Row(
    "API process",
    (
        Panel(
            "Memory",
            "Does it grow?",
            (Query(f'process_resident_memory_bytes{{{BY_INSTANCE},job="steersman"}}', "{{instance}}"),),
            "bytes",
        ),
        Panel(
            "Processor",
            "Is its one event loop the bottleneck (1 is a whole core)?",
            (
                Query(
                    f'rate(process_cpu_seconds_total{{{BY_INSTANCE},job="steersman"}}[$__rate_interval])',
                    "{{instance}}",
                ),
            ),
        ),
        Panel(
            "Prompt tokens found in vLLM's cache",
            "Does prefix caching help the base model?",
            (Query(ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", BY_INSTANCE), "found"),),
            "percentunit",
        ),
    ),
)

OVERVIEW = Dashboard(
    "steersman-overview",
    "Steersman: overview",
    "Traffic, latency, errors and the guided share of a server or a fleet.",
    (_TRAFFIC, _LATENCY, _ERRORS, _PROCESS),
)
