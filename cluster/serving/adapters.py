"""Adapters that come and go while a server runs, by vLLM's requests; operators alone may send them."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from headrace.cluster.adapters import MAX_NAME
from headrace.cluster.serving.async_engine import AsyncEngine
from headrace.cluster.serving.errors import ApiError
from headrace.runtime.adapters.directory import open_adapter
from headrace.scheduler.errors import HeadraceError, RequestError

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class LoadAdapterRequest(BaseModel):
    """`lora_path` is a directory that the server and every stage's node have."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapterRequest(BaseModel):
    """`lora_int_id` has no effect, as with vLLM."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Name
    lora_int_id: int | None = None


class AdapterDoor:
    """Changes which adapters an engine's requests may name. `model` is its own name for clients, which no
    adapter may have."""

    def __init__(self, engine: AsyncEngine, model: str) -> None:
        self._engine, self._model = engine, model

    async def load(self, asked: LoadAdapterRequest) -> str:
        """What to say. ApiError when the adapter cannot be applied, or its name is taken."""
        name, path = asked.lora_name, Path(asked.lora_path)
        try:
            check_not_model([name], self._model)
            files = await asyncio.to_thread(open_adapter, path)
            await self._engine.call(lambda engine: engine.add_adapter(name, files.adapter))
        except HeadraceError as error:
            raise ApiError(400, str(error), code="adapter_not_loaded") from error
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, asked: UnloadAdapterRequest) -> str:
        """What to say. Requests that run with it go on. ApiError when there is none of that name."""
        try:
            await self._engine.call(lambda engine: engine.remove_adapter(asked.lora_name))
        except RequestError as error:
            raise ApiError(404, str(error), param="lora_name", code="adapter_not_found") from error
        return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."


def listed_adapter(name: str, base: dict[str, Any]) -> dict[str, Any]:
    """As a model whose parent is the `base` one."""
    return {**base, "id": name, "parent": base["id"]}


def check_not_model(names: Collection[str], model: str) -> None:
    """HeadraceError for an adapter that is called like the model."""
    if model in names:
        raise HeadraceError(f"the model itself is called {model!r}: give the adapter another name")
