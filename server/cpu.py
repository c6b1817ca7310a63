"""What vLLM takes of a CPU machine, chosen where the user has not: its own choice suits a machine of its own."""

from collections.abc import MutableMapping

CACHE = "VLLM_CPU_KVCACHE_SPACE"
"""GiB of the base model's key-value cache, a whole number."""
BINDING = "VLLM_CPU_OMP_THREADS_BIND"
"""Cores that threads are bound to."""
ENGINE_FAILED = (
    "on a CPU the usual cause is memory or cores that other processes use: the engine's own lines above name it; set "
    f"{CACHE}=GIB to less than is free, and {BINDING}=nobind"
)

SMALL = {
    CACHE: "1",
    BINDING: "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
}
"""Environment for models so small that one thread is fastest; nothing is looked up elsewhere."""

_MOST_GIB = 4


def choose_cpu_settings(
    environment: MutableMapping[str, str], free_bytes: int, cache_given: bool = False
) -> str | None:
    """Sets what the user left open, and returns a line that says so; None where nothing was open.

    free_bytes: memory that is free, of which the cache gets a quarter, from 1 to 4 GiB: weights and the caches of
    reward models need room too. cache_given: whether a flag sets the cache's size.
    """
    chosen = {BINDING: "nobind"}
    if not cache_given:
        chosen[CACHE] = str(min(_MOST_GIB, max(1, free_bytes // 4 // 2**30)))
    chosen = {name: value for name, value in chosen.items() if not environment.get(name)}
    environment.update(chosen)
    if not chosen:
        return None
    settings = ", ".join(f"{name}={value}" for name, value in chosen.items())
    return f"on this CPU: {settings} (set these variables to choose otherwise)"
