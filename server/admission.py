"""Whether a guided request may run: lengths, room in the caches, and the ticket that it runs with."""

import random
from dataclasses import dataclass
from typing import Any

from steersman.guidance.plan import compile_plan
from steersman.guidance.request import BestOfN, Blockwise, GuidanceError, parse_guidance
from steersman.guidance.tokenizers import check_ids, name_model
from steersman.server.budget import CacheBudget
from steersman.server.registry import LoadedModel, PromptLength, Registry, check_length, reach
from steersman.server.search import Search, check_search
from steersman.server.vllm import SamplingParams


@dataclass(frozen=True)
class Ticket:
    """A guided request on its way through the engine. Choice i has the seed that vLLM gives it."""

    key: str
    method: str
    choices: int
    seed: int | None
    models: list[LoadedModel]
    blocks: dict[str, int]
    forced: bool = False
    """Whether a given text is scored, and no answer generated."""
    length_field: str = "max_tokens"
    """The request's field that bounds how long the text becomes."""

    def choice_seed(self, index: int) -> int | None:
        """None where vLLM draws without one."""
        return self.seed if self.choices == 1 or self.seed is None else self.seed + index


def admit(
    registry: Registry, budget: CacheBudget, entry: dict[str, Any], prompt: Any, params: SamplingParams
) -> Ticket:
    """Checks a request that is guided token by token against what is loaded and how much may be held at once.

    entry: what the API process has put beside the sampling parameters, whose `max_tokens` and `seed` are filled in.
    Raises GuidanceError.
    """
    plan = compile_plan(parse_guidance(entry["guidance"]))  # type: ignore[arg-type]
    prompt_tokens = _prompt_tokens(prompt)
    prompt_length = _prompt_length(entry, len(prompt_tokens))
    models, field = registry.models_of(plan), entry["max_tokens_field"]
    check_ids(models, prompt_tokens, prompt_length.field)
    first = plan.gate.first_tokens
    wanted = params.max_tokens or 1
    if models:
        # One position is the candidate's, one more its end token's.
        spare = int(plan.formula.end_token)
        params.max_tokens = wanted = check_length(models, prompt_length, wanted, field, spare, first or wanted)
    length = reach(plan, len(prompt_tokens), wanted)
    blocks = {m.name: params.n * m.blocks_for(length) for m in models if m.cache_blocks}
    if (name := budget.too_large(blocks)) is not None:
        model = registry.models[name]
        raise GuidanceError(
            field or "max_tokens",
            f"prompt and answer of n={params.n} choices need {blocks[name] * model.block_size} tokens in the cache "
            f"of {name_model(model)}, which holds {budget.capacity[name] * model.block_size}; ask for fewer "
            "or start the server with a larger --guidance-cache",
        )
    if params.n > 1 and params.seed is None:
        params.seed = random.getrandbits(31)
    return Ticket(
        *(entry["key"], plan.method, params.n, params.seed, models, blocks, "forced" in entry), field or "max_tokens"
    )


def admit_search(
    registry: Registry,
    budget: CacheBudget,
    guidance: BestOfN | Blockwise,
    entry: dict[str, Any],
    prompt: Any,
    params: SamplingParams,
    tokenizer: Any,
) -> Search:
    """The same for a request whose answer is picked among samples. Raises GuidanceError.

    tokenizer: the base model's.
    """
    check_search(guidance, params, tokenizer, entry["constraint_field"])
    tokens, model = _prompt_tokens(prompt), registry.reward_models[guidance.reward_model]
    length = _prompt_length(entry, len(tokens))
    check_ids([model], tokens, length.field)
    wanted = params.max_tokens or 1
    params.max_tokens = check_length([model], length, wanted, entry["max_tokens_field"], 0, wanted)
    needed = {model.name: model.blocks_for(len(tokens) + params.max_tokens)} if model.cache_blocks else {}
    if budget.too_large(needed) is not None:
        raise GuidanceError(
            entry["max_tokens_field"] or "max_tokens",
            f"one answer of {params.max_tokens} tokens does not fit into the cache of reward model {model.name!r}; "
            "ask for fewer or start the server with a larger --guidance-cache",
        )
    field = entry["max_tokens_field"] or "max_tokens"
    return Search(guidance, model, list(tokens), entry.get("source"), field)


def _prompt_length(entry: dict[str, Any], tokens: int) -> PromptLength:
    return PromptLength(tokens, entry.get("measured", {}), entry.get("prompt_field", "prompt"))


def _prompt_tokens(prompt: Any) -> list[int]:
    tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if not tokens:
        raise GuidanceError("prompt", "guidance needs at least one prompt token; send a prompt that is not empty")
    return list(tokens)
