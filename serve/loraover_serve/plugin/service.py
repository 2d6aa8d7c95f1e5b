"""What the plug-in does with names: find the adapter, have it prepared, and remember how that went."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraover_serve.plugin.front import Front
from loraover_serve.plugin.settings import APPROXIMATE, RefusedError, Settings, folder_of


@dataclass(frozen=True)
class Status:
    """How preparing an adapter went.

    Args:
        status: "preparing", "ready" or "refused".
        prepared: Fields of the prepared adapter; empty unless it is ready.
        reason: Why it is refused; None unless it is.
    """

    status: Literal["preparing", "ready", "refused"]
    prepared: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def shown(self, name: str) -> dict[str, Any]:
        """Return what clients may see, which has no paths."""
        kept = {key: self.prepared[key] for key in ("digest", "rank", "done", "notes", "cached") if self.prepared}
        return {"name": name, "status": self.status, **kept, **({"reason": self.reason} if self.reason else {})}


@dataclass(frozen=True)
class PluginServer:
    """The server that adapters are prepared for.

    Args:
        model: Folder or hub name of its base model.
        dtype: Data type of adapters: fp32, bf16 or fp16.
        max_rank: Its `--max-lora-rank`; None if it is not known.
        version: Its release of vLLM.
    """

    model: str
    dtype: str
    max_rank: int | None
    version: str


class Service:
    """Adapters by name, for one server process.

    Args:
        settings: Settings of the plug-in.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.served: PluginServer | None = None
        self.front = Front(settings)
        self._statuses: dict[str, Status] = {}

    def serve(self, served: PluginServer) -> None:
        """Prepare adapters for a server.

        Raises:
            ValueError: The settings ask for a larger rank than the server takes.
        """
        rank, most = self.settings.approximate, served.max_rank
        if rank is not None and most is not None and rank > most:
            raise ValueError(
                f"{APPROXIMATE} is {rank}, more than --max-lora-rank, which is {most}; lower one or raise the other."
            )
        self.served = served

    async def find(self, name: str) -> dict[str, Any] | None:
        """Prepare the adapter of a name; None if there is none.

        Raises:
            RefusedError: The adapter is not served; the reason names no path.
        """
        folder = folder_of(self.settings.adapters, name)
        if folder is not None:
            return await self.prepare(name, source=str(folder))
        return await self.prepare(name, hub=name) if self.settings.is_on_hub(name) else None

    async def prepare(self, name: str, **source: str) -> dict[str, Any]:
        """Prepare an adapter, and return its fields.

        Args:
            name: Name by which clients know it.
            source: `source`, a folder; or `hub`, a name of the hub.

        Raises:
            RefusedError: The adapter is not served; the reason names no path.
        """
        assert self.served is not None
        if name not in self._statuses:
            self._statuses[name] = Status("preparing")
        try:
            found = await self.front.prepare(
                **source,
                cache=str(self.settings.cache),
                model=self.served.model,
                dtype=self.served.dtype,
                max_rank=self.served.max_rank,
                approximate_to_rank=self.settings.approximate,
                engine_version=self.served.version,
            )
        except RefusedError as error:
            reason = self._without_paths(str(error), name, source.get("source"))
            self._statuses[name] = Status("refused", reason=reason)
            raise RefusedError(reason) from None
        self._statuses[name] = Status("ready", found)
        return found

    def shown(self) -> dict[str, Any]:
        """Return all adapters that are there or were asked for, as clients may see them."""
        there = [path.name for path in sorted(self.settings.adapters.iterdir()) if path.is_dir()]
        names = dict.fromkeys([*there, *self._statuses])
        found = [
            self._statuses[name].shown(name) if name in self._statuses else {"name": name, "status": "not prepared"}
            for name in names
        ]
        rank = None if self.served is None else self.served.max_rank
        return {"adapters": found, "max_lora_rank": rank, "worker_runs": self.front.pid is not None}

    def status(self, name: str) -> dict[str, Any]:
        """Return what clients may see of one adapter that was asked for."""
        return self._statuses[name].shown(name)

    def certificate(self, name: str) -> dict[str, Any] | None:
        """Return the record and the certificate of an adapter that is ready, without paths; None of any other."""
        found = self._statuses.get(name)
        if found is None or found.status != "ready":
            return None
        files = {"prepared": found.prepared["record"], "certificate": found.prepared["certificate"]}
        return {
            kind: json.loads(self._without_paths(Path(file).read_text(), name, None)) for kind, file in files.items()
        }

    def _without_paths(self, text: str, name: str, source: str | None) -> str:
        """Return a text with names in place of the server's paths, and of our function's argument."""
        places = [source, str(self.settings.adapters / name)] if source else [str(self.settings.adapters / name)]
        for place in places:
            text = text.replace(place, name)
        text = text.replace(f"{self.settings.adapters}/", "").replace(str(self.settings.cache), "the cache")
        if self.served is not None and Path(self.served.model).is_absolute():
            text = text.replace(self.served.model, Path(self.served.model).name)
        return text.replace("approximate_to_rank", APPROXIMATE)
