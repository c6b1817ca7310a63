"""Cost: what guidance takes beside plain decoding."""

from steersman.server.dashboards.panels import (
    BY_INSTANCE,
    BY_MODEL,
    Dashboard,
    Panel,
    Query,
    Row,
    quantiles,
    ratio,
    sum_rate,
)

_TOTAL = f'{BY_INSTANCE},stage="total"'
_STAGES = f'{BY_INSTANCE},stage!="total"'
_STEPS = f'{BY_INSTANCE},phase="step"'
_GUIDANCE_STEP = ratio("steersman_step_seconds_sum", "steersman_step_seconds_count", _TOTAL)
_TOKEN_GAP = ratio("vllm:inter_token_latency_seconds_sum", "vllm:inter_token_latency_seconds_count", BY_INSTANCE)

_TIME = Row(
    "Time",
    (
        Panel(
            "Guidance in a decoding step",
            "How long is the host in the guidance of one step, for all of its rows?",
            quantiles("steersman_step_seconds", _TOTAL),
            "s",
        ),
        Panel(
            "Stages of a step",
            "Where does that time go: choosing candidates, reward models, policies, writing logits?",
            (
                Query(
                    f"{sum_rate('steersman_step_seconds_sum', _STAGES, 'stage')} / "
                    f"scalar({sum_rate('steersman_step_seconds_count', _TOTAL)})",
                    "{{stage}}",
                ),
            ),
            "s",
            stacked=True,
        ),
        Panel(
            "Guidance's share of the time between tokens",
            "What would plain decoding save? Steps without guided rows count as none.",
            (Query(f"({_GUIDANCE_STEP}) / ({_TOKEN_GAP})", "of a step that guides"),),
            "percentunit",
        ),
        Panel(
            "Share of time spent in guidance",
            "How much of a second is the worker in guidance?",
            (
                Query(
                    f"sum by (instance) (rate(steersman_step_seconds_sum{{{_TOTAL}}}[$__rate_interval]))",
                    "{{instance}}",
                ),
            ),
            "percentunit",
        ),
    ),
)
_TOKENS = Row(
    "Tokens of auxiliary models",
    (
        Panel(
            "Tokens read by model",
            "Which model reads how much?",
            (Query(sum_rate("steersman_auxiliary_tokens_total", BY_MODEL, "model"), "{{model}}"),),
            "ops",
            stacked=True,
        ),
        Panel(
            "Tokens read by phase",
            "Prompts (read once), decoding steps, or finished texts?",
            (Query(sum_rate("steersman_auxiliary_tokens_total", BY_MODEL, "phase"), "{{phase}}"),),
            "ops",
            stacked=True,
        ),
        Panel(
            "Tokens read for a guided one",
            "1 + k for a reward model that reads candidates, 1 for a policy or a vocabulary head.",
            (
                Query(
                    f"{sum_rate('steersman_auxiliary_tokens_total', _STEPS)} / "
                    f"{sum_rate('steersman_guided_tokens_total', BY_INSTANCE)}",
                    "read / guided",
                ),
            ),
            "none",
        ),
        Panel(
            "Guided rows in a step",
            "How large are the batches that auxiliary models see?",
            quantiles("steersman_step_rows", BY_INSTANCE),
            "none",
        ),
    ),
)
_CACHE = Row(
    "Auxiliary caches",
    (
        Panel(
            "Cache in use",
            "How full are the models' key-value caches?",
            (
                Query(
                    f"sum by (model) (steersman_cache_blocks_in_use{{{BY_MODEL}}}) / "
                    f"sum by (model) (steersman_cache_blocks{{{BY_MODEL}}} > 0)",
                    "{{model}}",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Cache reserved",
            "How much may admitted requests come to need? Requests wait where it is full.",
            (
                Query(
                    f"sum by (model) (steersman_cache_blocks_reserved{{{BY_MODEL}}}) / "
                    f"sum by (model) (steersman_cache_blocks{{{BY_MODEL}}} > 0)",
                    "{{model}}",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "vLLM's own cache",
            "How full is the base model's?",
            (Query(f"avg by (instance) (vllm:kv_cache_usage_perc{{{BY_INSTANCE}}})", "{{instance}}"),),
            "percentunit",
        ),
        Panel(
            "Requests spoiled by a model",
            "Which model raises or returns what is not a number?",
            (Query(sum_rate("steersman_model_failures_total", BY_MODEL, "model, reason"), "{{model}}: {{reason}}"),),
            "ops",
        ),
    ),
)

COST = Dashboard(
    "steersman-cost",
    "Steersman: cost",
    "Time, tokens and memory that guidance takes beside plain decoding.",
    (_TIME, _TOKENS, _CACHE),
)
