"""The limits' flags, and what they say."""

import argparse
import os
from dataclasses import dataclass, field
from typing import Any

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.request import MAX_SAMPLES, MAX_TOP_K
from steersman.server.limits.caps import MAX_CHOICES, MAX_RESPONSES, Caps

MAX_HEADER_BYTES = 64 * 1024
"""Of a request's header that has not come to its end."""
DRAIN_S = 25
"""Of the 30 s that Kubernetes, by default, leaves between SIGTERM and SIGKILL."""
_USER_KEY, _ADMIN_KEY = "VLLM_API_KEY", "STEERSMAN_ADMIN_API_KEY"
_MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What the server allows. Sizes in bytes, times in seconds, None where there is no limit."""

    caps: Caps = field(default_factory=Caps)
    body_bytes: int = 4 * _MIB
    guided_requests: int | None = None
    """None: as many as vLLM decodes at once."""
    waiting_requests: int = 256
    request_timeout: float | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)

    def describe(self, at_once: int) -> dict[str, Any]:
        """For `GET /v1/guidance`."""
        return {
            **self.caps.describe(),
            "body_bytes": self.body_bytes,
            "guided_requests": at_once,
            "waiting_requests": self.waiting_requests,
            "request_timeout": self.request_timeout,
        }


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a group of flags. vLLM's own `--api-key` and `--shutdown-timeout` belong to them."""
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--admin-api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="Key of the paths under /v1/admin/, which do not exist without one; may be repeated. Also "
        f"{_ADMIN_KEY} in the environment, where other users of the machine do not see it.",
    )
    for flag, default, text in (
        ("--max-top-k", MAX_TOP_K, "Candidates a step that guidance may ask for."),
        ("--max-samples", MAX_SAMPLES, "Samples of a Monte Carlo KL that guidance may ask for."),
        ("--max-n", Caps.n, "Choices of a request, and samples of best_of_n and of a block."),
        ("--max-responses", MAX_RESPONSES, "Responses of one /v1/rewards."),
        ("--max-body-bytes", Limits.body_bytes, "Size of a request's body."),
        ("--max-waiting-requests", Limits.waiting_requests, "Guided requests that may wait for their turn."),
    ):
        group.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} Default: {default}.")
    group.add_argument(
        "--max-guided-requests",
        type=int,
        metavar="N",
        help="Guided requests at once; more wait, and are refused with HTTP 429 where too many wait. Default: as many "
        "as vLLM decodes at once (--max-num-seqs).",
    )
    group.add_argument(
        "--request-timeout",
        type=float,
        metavar="SECONDS",
        help="The longest that any request may take, waiting included. Default: none.",
    )
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="json: one object a line, from every process. Default: text.",
    )
    parser.set_defaults(shutdown_timeout=DRAIN_S, h11_max_incomplete_event_size=MAX_HEADER_BYTES)


def read_limits(args: argparse.Namespace) -> Limits:
    """Checks the flags and takes the keys out of the arguments and the environment, so that nothing else sees them.

    Raises ModelRefused.
    """
    for name, most in (
        ("max_top_k", MAX_TOP_K),
        ("max_samples", MAX_SAMPLES),
        ("max_n", MAX_CHOICES),
        ("max_responses", MAX_RESPONSES),
        ("max_body_bytes", None),
        ("max_guided_requests", None),
    ):
        _check_range(args, name, 1, most)
    _check_range(args, "max_waiting_requests", 0, None)
    if args.request_timeout is not None and not 0 < args.request_timeout < float("inf"):
        raise ModelRefused(f"--request-timeout {args.request_timeout}: give a positive number of seconds")
    users, admins = _take_keys(args, "api_key", _USER_KEY), _take_keys(args, "admin_api_key", _ADMIN_KEY)
    if set(users) & set(admins):
        raise ModelRefused("--admin-api-key: this key is among those of --api-key; an admin key must be one of its own")
    return Limits(
        Caps(args.max_top_k, args.max_samples, args.max_n, args.max_responses),
        args.max_body_bytes,
        args.max_guided_requests,
        args.max_waiting_requests,
        args.request_timeout,
        users,
        admins,
    )


def _check_range(args: argparse.Namespace, name: str, least: int, most: int | None) -> None:
    value = getattr(args, name)
    if value is not None and (value < least or (most is not None and value > most)):
        allowed = f"from {least} on" if most is None else f"from {least} to {most}"
        raise ModelRefused(f"--{name.replace('_', '-')} {value}: give a number {allowed}")


def _take_keys(args: argparse.Namespace, name: str, variable: str) -> tuple[str, ...]:
    given, of_environment = getattr(args, name), os.environ.pop(variable, "")
    setattr(args, name, None)
    return tuple(key for key in (given or [of_environment]) if key)
