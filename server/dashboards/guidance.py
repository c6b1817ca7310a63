"""Guidance: what it does to answers."""

from steersman.server.dashboards.panels import (
    BY_METHOD,
    BY_MODEL,
    Dashboard,
    Panel,
    Query,
    Row,
    quantiles,
    ratio,
    sum_rate,
)


def mean_reward(labels: str, by: str, window: str = "$__rate_interval") -> str:
    """A counter cannot fall, so rewards above and below 0 are counted apart."""

    def grown(sign: str) -> str:
        held = ",".join(filter(None, (labels, f'sign="{sign}"')))
        return f"sum by ({by}) (rate(steersman_final_reward_magnitude_total{{{held}}}[{window}]))"

    count = f"sum by ({by}) (rate(steersman_final_reward_count{{{labels}}}[{window}]))"
    return f"({grown('positive')} - {grown('negative')}) / {count}"


_REWARD = Row(
    "Reward",
    (
        Panel(
            "Mean reward at the end of answers",
            "Do answers get what they are steered towards?",
            (Query(mean_reward(BY_MODEL, "model"), "{{model}}"),),
            "none",
        ),
        Panel(
            "Spread of rewards",
            "Are there answers that guidance could not save?",
            quantiles("steersman_final_reward", BY_MODEL, "model", (0.1, 0.5, 0.9)),
            "none",
        ),
    ),
)
_DISTANCE = Row(
    "Distance from the base model",
    (
        Panel(
            "KL of an answer",
            "How far is an answer steered from the base, in nats, not counting what the top k leave out? Far is where "
            "rewards are over-optimised.",
            quantiles("steersman_request_kl_steering_nats", BY_METHOD, "method"),
            "none",
        ),
        Panel(
            "Mean KL of an answer",
            "The same as a mean; answers below 0 count as 0.",
            (
                Query(
                    ratio(
                        "steersman_request_kl_steering_nats_sum",
                        "steersman_request_kl_steering_nats_count",
                        BY_METHOD,
                        "method",
                    ),
                    "{{method}}",
                ),
            ),
            "none",
        ),
        Panel(
            "Interventions",
            "At which share of tokens did guidance change the most likely one?",
            (
                Query(
                    ratio("steersman_interventions_total", "steersman_generated_tokens_total", BY_METHOD, "method"),
                    "{{method}}",
                ),
            ),
            "percentunit",
        ),
    ),
)
_GATES = Row(
    "Gates",
    (
        Panel(
            "Guided share of an answer's tokens",
            "How often are gates open?",
            (
                Query(
                    ratio("steersman_guided_tokens_total", "steersman_generated_tokens_total", BY_METHOD, "method"),
                    "{{method}}",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Where tokens come from",
            "Which distribution is sampled: the base, a policy, a mixture, or one guided by rewards?",
            (
                Query(
                    f"{sum_rate('steersman_source_tokens_total', BY_METHOD, 'source')} / "
                    f"scalar({sum_rate('steersman_source_tokens_total', BY_METHOD)})",
                    "{{source}}",
                ),
            ),
            "percentunit",
            stacked=True,
        ),
        Panel(
            "Switches",
            "How often in a hundred tokens does the distribution change?",
            (
                Query(
                    "100 * "
                    + ratio("steersman_switches_total", "steersman_generated_tokens_total", BY_METHOD, "method"),
                    "{{method}}",
                ),
            ),
            "none",
        ),
        Panel(
            "Tokens that closed gates spared",
            "What do gates save the auxiliary models?",
            (Query(sum_rate("steersman_saved_tokens_total", BY_METHOD, "method, kind"), "{{method}}: {{kind}}"),),
            "ops",
        ),
    ),
)

GUIDANCE = Dashboard(
    "steersman-guidance",
    "Steersman: guidance",
    "Rewards, KL, interventions, switches and gates by method and model.",
    (_REWARD, _DISTANCE, _GATES),
)
