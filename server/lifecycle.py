"""Loading and unloading reward models and policies while the server answers requests."""

import asyncio
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeVar

from steersman.guidance.checkpoints import ModelRefused, require_safetensors
from steersman.guidance.head_files import is_head
from steersman.guidance.head_models import HEAD_KINDS
from steersman.guidance.policies import ADAPTER_CONFIG, is_adapter
from steersman.guidance.request import BASE
from steersman.server.config import parse_named_paths
from steersman.server.engine import GuidedEngine
from steersman.server.presets import NAME
from steersman.server.registry import LoadedModel, Registry, read_description

MAX_MODELS = 32
"""Reward models and policies together, whenever they were loaded: a bound on what metrics tell apart."""

_FAILURES_KEPT = 32
_POLL_SECONDS = 0.05

Kind = Literal["reward_model", "policy"]
Result = TypeVar("Result")
State = Literal["loading", "ready", "unloading", "failed"]


class ChangeRefused(Exception):
    """A model that cannot be loaded or unloaded as asked."""

    def __init__(self, status: HTTPStatus, field: str | None, message: str) -> None:
        super().__init__(message if field is None else f"{field}: {message}")
        self.status = status
        self.field = field


@dataclass
class ModelEntry:
    """A model and how far it is."""

    name: str
    kind: Kind
    path: str
    state: State
    error: str | None = None


class ModelLifecycle:
    """Every model of a server, those configured at start included."""

    def __init__(
        self,
        engine: GuidedEngine,
        reward_models: Mapping[str, str],
        policies: Mapping[str, str],
        root: Path | None,
    ) -> None:
        """reward_models, policies: name → path of those configured at start. root: where checkpoints may lie."""
        self._engine = engine
        self._root = None if root is None else root.resolve()
        self._entries = {
            **{name: ModelEntry(name, "reward_model", path, "ready") for name, path in reward_models.items()},
            **{name: ModelEntry(name, "policy", path, "ready") for name, path in policies.items()},
        }
        self._failures: OrderedDict[str, ModelEntry] = OrderedDict()
        self._workers_busy = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()

    def describe(self) -> dict[str, Any]:
        """The body of `GET /v1/admin/models`."""
        entries = [*self._entries.values(), *self._failures.values()]
        return {
            "object": "list",
            "data": [self.describe_entry(entry) for entry in entries],
            "root": None if self._root is None else str(self._root),
            "max_models": MAX_MODELS,
        }

    def describe_entry(self, entry: ModelEntry) -> dict[str, Any]:
        """One of them."""
        model = self._registry.models.get(entry.name) if entry.state == "ready" else None
        return {
            **asdict(entry),
            "requests": self._engine.users.count(entry.name) if entry.name in self._entries else 0,
            "presets": self._registry.presets_of(entry.name) if entry.name in self._entries else [],
            "model": None if model is None else asdict(model),
        }

    def begin_load(self, kind: Kind, name: str, path: str, cache_gib: float | None) -> asyncio.Task[ModelEntry]:
        """Checks at once what can be checked, and loads in the background. The task gives the entry, `ready` or
        `failed`. Raises ChangeRefused."""
        self._check_one_engine()
        self._check_name(name)
        folder = self._find_folder(kind, name, path)
        loading = next((entry.name for entry in self._entries.values() if entry.state == "loading"), None)
        if loading is not None:
            raise _conflict(None, f"{loading!r} is being loaded; wait until GET /v1/admin/models shows it as ready")
        if len(self._entries) >= MAX_MODELS:
            raise _conflict(None, f"{MAX_MODELS} models are loaded, which is the most; unload one first")
        self._failures.pop(name, None)
        entry = self._entries[name] = ModelEntry(name, kind, str(folder), "loading")
        cache_bytes = None if cache_gib is None else int(cache_gib * 2**30)
        return self._begin(self._load(entry, cache_bytes))

    def begin_unload(self, name: str) -> asyncio.Task[None]:
        """Refuses new requests that name the model from now on; the task ends when those that use it have, and its
        memory is given back. Raises ChangeRefused."""
        self._check_one_engine()
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(sorted(self._entries)) or "none"
            raise ChangeRefused(HTTPStatus.NOT_FOUND, "name", f"no model {name!r:.80} is loaded; loaded are: {known}")
        if entry.state != "ready":
            raise _conflict("name", f"{name!r} is {entry.state}; see GET /v1/admin/models")
        if presets := self._registry.presets_of(name):
            named = ", ".join(map(repr, presets))
            raise _conflict(
                "name", f"{name!r} is asked by the preset {named}; start the server with presets that do not name it"
            )
        entry.state = "unloading"
        return self._begin(self._unload(entry))

    def _begin(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.create_task(work)
        # The event loop alone would let go of it.
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return task

    async def _load(self, entry: ModelEntry, cache_bytes: int | None) -> ModelEntry:
        try:
            async with self._workers_busy:
                model = await self._load_in_workers(entry, cache_bytes)
            self._engine.add_model(model)
            entry.state = "ready"
        except Exception as error:
            entry.state, entry.error = "failed", str(error) or type(error).__name__
            del self._entries[entry.name]
            self._failures[entry.name] = entry
            while len(self._failures) > _FAILURES_KEPT:
                self._failures.popitem(last=False)
            if not isinstance(error, ModelRefused):
                raise
        return entry

    async def _load_in_workers(self, entry: ModelEntry, cache_bytes: int | None) -> LoadedModel:
        """Every worker loads; where one refuses, all forget."""
        await self._ask("steersman_begin_load", entry.kind, entry.name, entry.path, cache_bytes)
        while False in (replies := await self._ask("steersman_advance_load")):
            await asyncio.sleep(_POLL_SECONDS)
        refusal = next((reply for reply in replies if isinstance(reply, str)), None)
        described = await self._ask("steersman_end_load", refusal is None)
        if refusal is not None:
            await self._wait_until_free()
            raise ModelRefused(refusal)
        return read_description(await self._prove(entry.name) if described[0]["kind"] in HEAD_KINDS else described[0])

    async def _prove(self, name: str) -> dict[str, Any]:
        try:
            return await self._engine.prove_head(name)
        except Exception:
            await self._ask("steersman_unload", name)
            await self._wait_until_free()
            raise

    async def _unload(self, entry: ModelEntry) -> None:
        await self._engine.retire_model(entry.name)
        async with self._workers_busy:
            await self._ask("steersman_unload", entry.name)
            await self._wait_until_free()
        del self._entries[entry.name]

    async def _wait_until_free(self) -> None:
        while not all(await self._ask("steersman_is_free")):
            await asyncio.sleep(_POLL_SECONDS)

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        replies = await self._engine.collective_rpc(method, args=arguments)
        return [reply for reply in replies if reply is not None]

    @property
    def _registry(self) -> Registry:
        return self._engine.registry

    def _check_one_engine(self) -> None:
        # vLLM passes on what the first engine says; what the others refuse would not be seen.
        if self._engine.vllm_config.parallel_config.data_parallel_size > 1:
            raise _conflict(None, "models cannot be changed at run time with --data-parallel-size above 1")

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise _bad("name", f"{name!r:.80} is not a name: use letters, digits, '.', '_' and '-', at most 64 of them")
        if name == BASE:
            raise _bad("name", f"{BASE!r} is the base model's own name among policies; choose another one")
        if name in self._entries:
            entry = self._entries[name]
            kind = entry.kind.replace("_", " ")
            raise _conflict("name", f"{name!r} names a {kind} that is {entry.state}; unload it or choose another")

    def _find_folder(self, kind: Kind, name: str, path: str) -> Path:
        if self._root is None:
            raise _bad(
                "path",
                "this server loads no models at run time; start it with --admin-model-root DIR, the folder whose "
                "checkpoints may be loaded",
            )
        try:
            folder = (self._root / path).resolve()
            if not folder.is_relative_to(self._root):
                raise _bad(
                    "path",
                    f"{path!r:.200} lies outside of {self._root}; put the checkpoint there",
                )
            if not folder.exists():
                raise _bad("path", f"{folder} does not exist; a model of the Hub has to be downloaded first")
            if not is_head(folder):
                config = ADAPTER_CONFIG if kind == "policy" and is_adapter(str(folder)) else "config.json"
                require_safetensors(folder, f"{kind.replace('_', ' ')} {name!r}", config)
        except ModelRefused as refusal:
            raise _bad("path", str(refusal)) from refusal
        except (OSError, ValueError, RuntimeError) as error:  # the last is pathlib's for a link to itself
            raise _bad("path", f"{path!r:.200} cannot be read: {error}") from error
        return folder


def build_lifecycle(engine: GuidedEngine, args: Namespace) -> ModelLifecycle:
    """For a server with these arguments, which have been checked."""
    root = None if args.admin_model_root is None else Path(args.admin_model_root)
    rewards = parse_named_paths("--reward-model", args.reward_model)
    return ModelLifecycle(engine, rewards, parse_named_paths("--policy", args.policy), root)


def _bad(field: str, message: str) -> ChangeRefused:
    return ChangeRefused(HTTPStatus.BAD_REQUEST, field, message)


def _conflict(field: str | None, message: str) -> ChangeRefused:
    return ChangeRefused(HTTPStatus.CONFLICT, field, message)
