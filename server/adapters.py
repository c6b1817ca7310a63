"""Which of the two logits processors fits the model runner that vLLM will use."""

from typing import Any

_V1 = "steersman.server.logits_v1:GuidanceLogitsProcessor"
_V2 = "steersman.server.logits_v2:GuidanceLogitsProcessor"


def attach_adapter(vllm_config: Any) -> None:
    """Adds the guidance processor to a VllmConfig's logits processors, behind those that are there.

    The runner is looked up with a processor in place: releases of vLLM differ in whether custom processors are a reason
    against Model Runner V2.
    """
    model_config = vllm_config.model_config
    others = list(model_config.logits_processors or [])
    model_config.logits_processors = [*others, _V1]
    if getattr(vllm_config, "use_v2_model_runner", False):
        model_config.logits_processors = [*others, _V2]
