"""Rollouts: answers of a policy with the reward that each came to. A row has `prompt`, `response` and `reward`.

Prompt and response are text or messages, as in preference rows; a reward of null says that an answer did not finish.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steersman.guidance.rewards import RewardModel
from steersman.training.answers import draw_texts
from steersman.training.data.fields import find_number_problems, find_value_problems, template_options
from steersman.training.data.preferences import check_length, prompt_ids, response_ids, response_text
from steersman.training.data.sources import DataError, Row, read_rows


@dataclass(frozen=True)
class Rollout:
    """One row."""

    prompt: Any
    response: Any
    reward: float | None
    where: str
    template_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizedRollout:
    """Token ids; the response ends with the end token."""

    prompt: list[int]
    response: list[int]
    reward: float


def load_rollouts(source: str | Path, tokenizer: PreTrainedTokenizerBase, window: int) -> list[TokenizedRollout]:
    """The finished answers of a source (`sources.read_rows`); raises DataError on the first bad row."""
    rows = [_rollout(row) for row in read_rows(source)]
    rollouts = []
    for row in rows:
        if row.reward is not None:
            prompt, response = tokenize_rollout(row, tokenizer)
            check_length(row.where, "response", len(prompt) + len(response), window)
            rollouts.append(TokenizedRollout(prompt, response, row.reward))
    if not rollouts:
        raise DataError(f"{source}: no answer finished" if rows else f"{source}: no rows")
    return rollouts


def tokenize_rollout(row: Rollout, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids of the prompt and of the response."""
    return prompt_ids(row, tokenizer), response_ids(response_text(row, "response", tokenizer), tokenizer)


def name_rollouts(folder: str | Path, *made_of: Any) -> Path:
    """A file that belongs to these settings and no others."""
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    return Path(folder) / f"rollouts-{digest}.jsonl"


def make_rollouts(
    path: Path,
    source: str | Path,
    policy: PreTrainedModel,
    teacher: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    batch: int,
    seed: int,
) -> None:
    """Writes a row for every prompt of `source`: the policy's answer at temperature 1, and the teacher's reward of it.

    What an earlier, interrupted call wrote is kept, and the file becomes the one that it would have become.
    """
    prompts = _read_prompts(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _keep_whole_batches(path, [row.prompt for row in prompts], batch)
    with open(path, "a", encoding="utf-8") as file:
        for start in track(range(done, len(prompts), batch), "rollouts"):
            part = prompts[start : start + batch]
            with torch.random.fork_rng():
                torch.manual_seed(seed + start)
                answers = sample_answers(policy, tokenizer, [prompt_ids(row, tokenizer) for row in part], window)
            for row, answer in zip(part, answers, strict=True):
                file.write(json.dumps(_rewarded(row, answer, teacher, tokenizer, window)) + "\n")
            file.flush()


def sample_answers(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], window: int
) -> list[str | None]:
    """The text of one answer to each prompt, at temperature 1; None where it does not end within the window."""
    room = max(1, window - max(map(len, prompts)))
    return draw_texts(policy, tokenizer, prompts, samples=1, max_new_tokens=room, temperature=1.0)


def _rewarded(
    row: Rollout, answer: str | None, teacher: RewardModel, tokenizer: PreTrainedTokenizerBase, window: int
) -> dict[str, Any]:
    unfinished = {"prompt": row.prompt, "response": answer, "reward": None}
    options = {"chat_template_kwargs": row.template_options} if any(row.template_options.values()) else {}
    if not answer or not answer.strip():
        return unfinished
    response = answer if isinstance(row.prompt, str) else [{"role": "assistant", "content": answer}]
    # Read again as text, as it will be for training, an answer may have more tokens than were drawn.
    prompt, ids = tokenize_rollout(replace(row, response=response), tokenizer)
    if len(prompt) + len(ids) > window:
        return unfinished
    (reward,), _ = teacher.score_answers(prompt, [ids])
    return {"prompt": row.prompt, "response": response, "reward": reward, **options}


def _read_prompts(source: str | Path) -> list[Rollout]:
    rows = []
    for row in read_rows(source):
        _raise_first(row, find_value_problems("prompt", row.values.get("prompt")))
        rows.append(_rollout_of(row))
    if not rows:
        raise DataError(f"{source}: no rows")
    return rows


def _keep_whole_batches(path: Path, prompts: Sequence[Any], batch: int) -> int:
    """Cuts the file after its last whole batch; the rows that are left. Raises DataError if they are of others."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    kept = whole if len(whole) == len(prompts) else whole[: len(whole) - len(whole) % batch]
    if [json.loads(line)["prompt"] for line in kept] != list(prompts[: len(kept)]):
        raise DataError(f"{path} answers other prompts: remove it, or choose another output_dir")
    if len(kept) < len(lines):
        path.write_text("".join(kept), encoding="utf-8")
    return len(kept)


def _rollout(row: Row) -> Rollout:
    _raise_first(row, _find_problems(row.values))
    return _rollout_of(row)


def _rollout_of(row: Row) -> Rollout:
    values = row.values
    try:
        options = template_options(values) if isinstance(values["prompt"], list) else {}
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from None
    return Rollout(values["prompt"], values.get("response"), values.get("reward"), row.where, options)


def _find_problems(values: dict[str, Any]) -> Iterator[str]:
    for name in ("prompt", "response", "reward"):
        if name not in values:
            yield f"field '{name}' is missing: a rollout has prompt, response and reward"
            return
    if values["reward"] is None:
        return
    yield from find_number_problems("reward", values["reward"])
    yield from find_value_problems("prompt", values["prompt"])
    yield from find_value_problems("response", values["response"])
    if type(values["prompt"]) is not type(values["response"]):
        yield "prompt and response are both text or both lists of messages"


def _raise_first(row: Row, problems: Iterator[str]) -> None:
    for problem in [row.problem] if row.problem else problems:
        raise DataError(f"{row.where}: {problem}")
