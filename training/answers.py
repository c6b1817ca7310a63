"""Several answers of a policy to every prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sample_answers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int,
    description: str,
) -> list[list[str]]:
    """The different texts of those of each prompt's `samples` answers that ended, in the order drawn.

    prompts: token ids. An answer that is cut at `max_new_tokens` is left out: it has no end to learn.
    """
    policy.eval()
    answers: list[list[str]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # of like length together
    with torch.random.fork_rng(), tqdm(total=len(prompts), desc=description, unit="prompt") as progress:
        torch.manual_seed(seed)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            drawn = draw_texts(policy, tokenizer, [prompts[n] for n in rows], samples, max_new_tokens, temperature)
            for number, row in enumerate(rows):
                own = drawn[number * samples : (number + 1) * samples]
                answers[row] = list(dict.fromkeys(text for text in own if text is not None and text.strip()))
            progress.update(len(rows))
    return answers


@torch.inference_mode()
def draw_texts(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    samples: int,
    max_new_tokens: int,
    temperature: float,
) -> list[str | None]:
    """`samples` texts a prompt, token ids, one after the other; None for one that did not end."""
    pad, ends = tokenizer.pad_token_id, _end_tokens(policy, tokenizer)
    length = max(map(len, prompts))
    spaces = [length - len(prompt) for prompt in prompts]
    ids = [
        [pad if pad is not None else 0] * space + list(prompt) for space, prompt in zip(spaces, prompts, strict=True)
    ]
    mask = [[0] * space + [1] * (length - space) for space in spaces]
    drawn = policy.generate(
        torch.tensor(ids, device=policy.device),
        attention_mask=torch.tensor(mask, device=policy.device),
        do_sample=True,
        temperature=temperature,
        top_k=0,  # the policy's own distribution, whatever its generation_config says
        top_p=1.0,
        num_return_sequences=samples,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(ends),
    )[:, length:].tolist()
    stops = [next((n for n, token in enumerate(tokens) if token in ends), None) for tokens in drawn]
    return [
        None if stop is None else tokenizer.decode(tokens[:stop], skip_special_tokens=True)
        for tokens, stop in zip(drawn, stops, strict=True)
    ]


def _end_tokens(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    own = policy.generation_config.eos_token_id if policy.generation_config else None
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
