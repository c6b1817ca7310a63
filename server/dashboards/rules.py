"""What Prometheus watches: alert rules, each a value and the limit that it must not pass."""

from dataclasses import dataclass
from typing import Any

from steersman.server.dashboards.guidance import mean_reward

_BY = "instance, model"


@dataclass(frozen=True)
class Alert:
    """Fires when `value` has been beyond `limit` for a while."""

    name: str
    value: str
    """A query that has a result whether or not there is anything to report."""
    limit: str
    """The comparison that makes it an alert, as in `> 0.05`."""
    held_for: str
    severity: str
    summary: str
    """What is wrong, with Prometheus's templates of labels and the value."""
    action: str
    """What to do first."""


def _share(part: str, whole: str, window: str) -> str:
    return f"sum by (instance) (rate({part}[{window}])) / sum by (instance) (rate({whole}[{window}]))"


def _spread(window: str) -> str:
    def bound(q: float) -> str:
        return f"histogram_quantile({q}, sum by ({_BY}, le) (rate(steersman_final_reward_bucket[{window}])))"

    return f"({bound(0.9)} - {bound(0.1)})"


ALERTS = (
    Alert(
        "SteersmanDown",
        'up{job="steersman"}',
        "== 0",
        "1m",
        "page",
        "{{ $labels.instance }} does not answer.",
        "Look at the supervisor's log: the server ends with a code other than 0 when its worker has died.",
    ),
    Alert(
        "SteersmanErrorRate",
        _share('steersman_requests_total{outcome="failed"}', "steersman_requests_total", "5m"),
        "> 0.05",
        "5m",
        "page",
        "{{ $value | humanizePercentage }} of the guided requests of {{ $labels.instance }} fail.",
        "See which reason grows in steersman_errors_total and which model in steersman_model_failures_total.",
    ),
    Alert(
        "SteersmanModelFails",
        f"sum by ({_BY}, reason) (increase(steersman_model_failures_total[10m]))",
        "> 0",
        "5m",
        "ticket",
        "{{ $labels.model }} of {{ $labels.instance }} spoils requests ({{ $labels.reason }}).",
        "Score one of its prompts by /v1/rewards; unload the model if it keeps failing.",
    ),
    Alert(
        "SteersmanAuxiliaryCacheFull",
        f"sum by ({_BY}) (steersman_cache_blocks_reserved) / sum by ({_BY}) (steersman_cache_blocks > 0)",
        "> 0.95",
        "10m",
        "ticket",
        "The cache of {{ $labels.model }} on {{ $labels.instance }} is {{ $value | humanizePercentage }} reserved.",
        "Start with a larger --guidance-cache, ask for smaller max_tokens, or add a server.",
    ),
    Alert(
        "SteersmanWaiting",
        "histogram_quantile(0.95, sum by (instance, le) (rate(steersman_admission_seconds_bucket[5m])))",
        "> 5",
        "5m",
        "ticket",
        "Guided requests of {{ $labels.instance }} wait {{ $value | humanizeDuration }} for room.",
        "The auxiliary caches are the bottleneck where vLLM's own queue is short: see SteersmanAuxiliaryCacheFull.",
    ),
    Alert(
        "SteersmanRefusing",
        'sum by (instance) (rate(steersman_refusals_total{reason="too_many_requests"}[5m]))',
        "> 0",
        "10m",
        "ticket",
        "{{ $labels.instance }} turns {{ $value | humanize }} guided requests a second away.",
        "Add a server, or raise --max-waiting-requests if clients can wait.",
    ),
    Alert(
        "SteersmanRewardDrift",
        f"abs(({mean_reward('', _BY, '1h')}) - ({mean_reward('', _BY, '1d')})) / {_spread('1d')}",
        "> 0.25",
        "30m",
        "ticket",
        "The mean reward of {{ $labels.model }} on {{ $labels.instance }} has moved by "
        "{{ $value | humanizePercentage }} of its spread (10 % to 90 %) in the last hour, compared with a day.",
        "Prompts, base model, presets or the reward model have changed; compare answers of today and yesterday.",
    ),
    Alert(
        "SteersmanKLAboveBudget",
        "histogram_quantile(0.95, "
        "sum by (instance, method, le) (rate(steersman_request_kl_steering_nats_bucket[30m])))",
        "> 20",
        "30m",
        "ticket",
        "One in twenty {{ $labels.method }} answers of {{ $labels.instance }} is steered {{ $value | humanize }} "
        "nats from the base.",
        "Lower beta or mix, or set kl_budget; set this rule's limit to what you allow.",
    ),
)


def build_rules(alerts: tuple[Alert, ...] = ALERTS) -> dict[str, Any]:
    """The content of Prometheus's rule file."""
    rules = [
        {
            "alert": alert.name,
            "expr": f"{alert.value} {alert.limit}",
            "for": alert.held_for,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "action": alert.action},
        }
        for alert in alerts
    ]
    return {"groups": [{"name": "steersman", "rules": rules}]}
