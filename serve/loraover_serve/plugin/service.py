"""Adapters by name in the plug-in: each is found and, when its files are complete, prepared; the outcome is kept."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from loraover.checkpoint.files import CONFIG_FILE, CORES_FILE, META_FILE, REFERENCE_FILE, TEMPLATE_FILE, TENSORS_FILE
from loraover.common.file_lock import NO_LOCKS
from loraover_serve.plugin.front import Front
from loraover_serve.plugin.settings import APPROXIMATE, RefusedError, Settings, folder_of

FILES = (CONFIG_FILE, TENSORS_FILE, META_FILE, CORES_FILE, TEMPLATE_FILE, REFERENCE_FILE)
"""Files on which a prepared adapter may depend; others, such as logs, may change at any time."""

POLL_S = 0.5
"""Seconds between two looks at a folder that is being written."""

PATIENCE_S = 60.0
"""Seconds that a request waits for a folder that is being written."""

HOLDS = "held"
"""Folder of the cache with a file for each prepared adapter that a server may read; the server locks this file."""

RECORD_FILE = "prepared.json"
"""File beside a prepared adapter without which it is prepared again."""

GRACE_S = 600.0
"""Seconds for which a version is held after vLLM last used it, since a request may wait before it starts."""

State = tuple[tuple[str, int, int, int, int, int], ...]
"""Facts that change when a file of an adapter is written or replaced: name, device, inode, bytes, times in ns."""

TRIES = 3
"""Largest number of attempts to prepare an adapter whose files change meanwhile, or that the cache loses."""

RETRY_S = 60.0
"""Seconds until a refused folder of a served adapter is tried again although its files have not changed."""


def state_of(folder: Path) -> State:
    """Return the state of an adapter's files; it is empty if the folder has none of them."""
    found = []
    for name in FILES:
        try:
            file = (folder / name).stat()
        except (OSError, ValueError):  # it is missing, is just replaced, or cannot have that name
            continue
        found.append((name, file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns))
    return tuple(found)


def is_whole(folder: Path) -> bool:
    """Whether a prepared adapter's files exist, and the file of tensors is as long as its header says."""
    try:
        json.loads((folder / CONFIG_FILE).read_bytes())
        with (folder / TENSORS_FILE).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), size)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return bool(file.tell() + max(ends, default=0) == size)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):  # of any JSON, too
        return False


class Folders:
    """Times since which the adapters' folders have not changed.

    A half overwritten folder may hold an adapter that is well formed, but that nobody trained. So a folder is read only
    if nothing was written there for some seconds.

    Args:
        settle_s: Seconds for which a folder has to be unchanged before it is read.
        patience_s: Seconds that a request waits for that.
    """

    def __init__(self, settle_s: float, patience_s: float = PATIENCE_S) -> None:
        self._settle_s, self._patience_s = settle_s, max(patience_s, 2 * settle_s)
        self._seen: dict[Path, tuple[State, float]] = {}

    def settled(self, folder: Path) -> State | None:
        """Return the state of a folder that has been unchanged for long enough; None for any other.

        If the folder is seen for the first time, its files' own times count. Later changes are timed by this process,
        since the clock of a file server may differ.
        """
        state, now = state_of(folder), time.monotonic()
        before, since = self._seen.get(folder, (None, now))
        if state != before:
            # A copy may keep the other time, of modification; and the files' clock may be ahead of ours.
            age_s = max(0.0, time.time() - max((changed for *_, changed in state), default=0) / 1e9)
            since = now if before is not None else now - age_s
            self._seen[folder] = state, since
        return state if now - since >= self._settle_s else None

    async def settle(self, folder: Path) -> State:
        """Wait until a folder has been unchanged for long enough, and return its state.

        Raises:
            RefusedError: Its files went on changing.
        """
        given_up = time.monotonic() + self._patience_s
        while (state := await asyncio.to_thread(self.settled, folder)) is None:
            if time.monotonic() > given_up:
                raise RefusedError(f"{folder}: its files are still being written; ask again when they are complete.")
            await asyncio.sleep(min(POLL_S, self._settle_s))
        return state


class Holds:
    """Locks on the prepared adapters that this server may read; each is held until its release or the server's end.

    vLLM reads an evicted adapter again from its path, also an earlier version for a request that still runs. It does so
    within a step of its engine, where a failure ends the server. Several threads may hold and release locks.

    Args:
        cache: Folder of prepared adapters.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._files: dict[str, int] = {}
        self._lock = Lock()

    def hold(self, digest: str) -> bool:
        """Lock a prepared adapter against removal, and return whether it is still there.

        Raises:
            OSError: The file of the lock cannot be made.
        """
        place = self._cache / HOLDS / digest
        if not self._is_held(digest, place):
            place.parent.mkdir(exist_ok=True)
            file = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_SH)  # waits for a removal that has begun
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(file)
                    raise
            with self._lock:
                before = self._files.get(digest)
                self._files[digest] = file
                if before is not None:
                    os.close(before)
        return (self._cache / digest).is_dir()

    def _is_held(self, digest: str, place: Path) -> bool:
        """Whether the locked file is still the one at its path; a lock on a removed file has no effect."""
        with self._lock:
            try:
                return digest in self._files and os.path.samestat(os.fstat(self._files[digest]), place.stat())
            except FileNotFoundError:
                return False

    def let_go(self, digest: str) -> None:
        """Unlock a prepared adapter that this server will not read again."""
        with self._lock:
            if digest in self._files:
                os.close(self._files.pop(digest))


@dataclass(frozen=True)
class Version:
    """An adapter as it was prepared at some time.

    Args:
        fields: Fields of the prepared adapter.
        folder: Folder that it was made from; None for one of the hub.
        state: State of that folder's files.
        made: State of the prepared files, as they were written.
    """

    fields: dict[str, Any]
    folder: Path | None
    state: State
    made: State = ()

    @property
    def digest(self) -> str:
        """The name of its folder in the cache."""
        return str(self.fields["digest"])

    def is_outdated(self) -> bool:
        """Whether the folder that it was made from has changed since."""
        return self.folder is not None and state_of(self.folder) != self.state

    def is_lost(self) -> bool:
        """Whether prepared files are missing or cut off; files that another server has made again are neither."""
        path = Path(self.fields["path"])
        return state_of(path) != self.made and not is_whole(path)


@dataclass(frozen=True)
class Status:
    """State of the preparation of an adapter.

    Args:
        status: "preparing", "ready" or "refused".
        prepared: Version that was prepared last; None if there is none.
        reason: Reason why the present contents of the folder are refused; None if they are not.
        state: State of the folder that is refused.
        since: Time of the refusal, in seconds of a clock that only runs forward.
    """

    status: Literal["preparing", "ready", "refused"]
    prepared: Version | None = None
    reason: str | None = None
    state: State = ()
    since: float = 0.0


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
        front: The worker, which prepares adapters.
    """

    def __init__(self, settings: Settings, front: Front) -> None:
        self.settings, self.front = settings, front
        self.served: PluginServer | None = None
        self.reloads = False
        self._folders = Folders(settings.settle_s)
        self._holds = Holds(settings.cache)
        self._statuses: dict[str, Status] = {}
        self._versions: dict[tuple[str, str], Version] = {}  # by name, and by the path that vLLM loads
        self._used: dict[str, float] = {}  # time of the last use, by that path

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
            source: Keyword of the worker's request: `source` with a folder, or `hub` with a hub name.

        Raises:
            RefusedError: The adapter is not served; the reason names no path.
        """
        self._statuses.setdefault(name, Status("preparing"))
        folder = Path(source["source"]) if "source" in source else None
        try:
            found = await self._prepare(folder, source)
        except RefusedError as error:
            self.refuse(name, str(error), folder)
            raise RefusedError(self._statuses[name].reason) from None
        self._versions[name, found.fields["path"]] = found
        self._used[found.fields["path"]] = time.monotonic()
        self._statuses[name] = Status("ready", found)
        return found.fields

    async def _prepare(self, folder: Path | None, source: Mapping[str, str]) -> Version:
        """Prepare an adapter from a folder that does not change meanwhile, and lock the result against removal."""
        assert self.served is not None
        for _ in range(TRIES):
            state = () if folder is None else await self._folders.settle(folder)
            fields, refused = {}, None
            try:
                fields = await self.front.prepare(
                    **source,
                    cache=str(self.settings.cache),
                    model=self.served.model,
                    dtype=self.served.dtype,
                    max_lora_rank=self.served.max_rank,
                    approximate_to_rank=self.settings.approximate,
                    engine_version=self.served.version,
                )
            except RefusedError as error:
                refused = error
            found = Version(fields, folder, state, state_of(Path(fields["path"])) if fields else ())
            if await asyncio.to_thread(found.is_outdated):
                continue
            if refused is not None:
                raise refused
            self._used[fields["path"]] = time.monotonic()  # before it is held, so that `let_go` spares it meanwhile
            try:
                if await asyncio.to_thread(self._is_kept, found):
                    return found
            except OSError as error:
                raise RefusedError(f"cache {self.settings.cache}: cannot be written: {error.strerror}.") from error
        raise RefusedError(
            f"{folder}: its files changed at every attempt to read them; ask again when they are complete."
        )

    def _is_kept(self, found: Version) -> bool:
        """Hold a version, and return whether it is complete; if not, remove its record, so that it is made again."""
        is_kept = self._holds.hold(found.digest) and is_whole(Path(found.fields["path"]))
        if not is_kept:
            (self.settings.cache / found.digest / RECORD_FILE).unlink(missing_ok=True)
        return is_kept

    def refuse(self, name: str, reason: str, folder: Path | None) -> None:
        """Remember why the present contents of an adapter's folder are not served."""
        before = self._statuses[name].prepared
        state = () if folder is None else state_of(folder)
        reason = self._without_paths(reason, name, None if folder is None else str(folder))
        self._statuses[name] = Status("refused", before, reason, state, time.monotonic())

    def changed(self, served: Mapping[str, str]) -> dict[str, Path]:
        """Return the folders of served adapters that have changed and are complete, or that are lost, by name.

        An adapter is lost if prepared files are missing or cut off. Changes count only if the settings ask for reloads.

        Args:
            served: Path that vLLM has loaded, by name.
        """
        found = {}
        for name, path in served.items():
            version = self._versions.get((name, path))
            if version is None or version.folder is None:
                continue
            state, status = self._folders.settled(version.folder), self._statuses[name]
            waits = status.reason is not None and status.state == state and time.monotonic() < status.since + RETRY_S
            is_due = self.settings.reload if state != version.state else version.is_lost()
            if state and not waits and is_due:
                found[name] = version.folder
        return found

    def let_go(self, used: Collection[str]) -> None:
        """Release the versions that vLLM has not used for `GRACE_S`, so that they may be removed from the cache.

        Args:
            used: Paths of the versions that vLLM serves, and of those that its requests run with.
        """
        now = time.monotonic()
        self._used |= dict.fromkeys(used, now)
        for key, version in [*self._versions.items()]:
            if self._used[key[1]] < now - GRACE_S:
                del self._versions[key]
                self._holds.let_go(version.digest)
        self._used = {path: self._used[path] for path in {path for _, path in self._versions} | {*used}}

    async def renew(self, name: str, folder: Path) -> dict[str, Any] | None:
        """Prepare the present contents of a served adapter's folder; None if the folder is gone.

        Raises:
            RefusedError: It is not served; the reason names no path.
        """
        inside = folder == self.settings.adapters / name
        return await (self.find(name) if inside else self.prepare(name, source=str(folder)))

    def shown(self, served: Mapping[str, str]) -> dict[str, Any]:
        """Return all adapters that exist or were requested, as clients may see them.

        Args:
            served: Path that vLLM has loaded, by name.
        """
        there = [path.name for path in sorted(self.settings.adapters.iterdir()) if path.is_dir()]
        names = dict.fromkeys([*there, *self._statuses.copy()])
        rank = None if self.served is None else self.served.max_rank
        runs = self.front.pid is not None
        shown = [self.status(name, served) for name in names]
        return {"adapters": shown, "max_lora_rank": rank, "reloads": self.reloads, "worker_runs": runs}

    def status(self, name: str, served: Mapping[str, str]) -> dict[str, Any]:
        """Return what clients may see of an adapter, which has no paths; `served` is as for `shown`."""
        status = self._statuses.get(name)
        if status is None:
            return {"name": name, "status": "not prepared"}
        loaded, last = self._loaded(name, served), status.prepared
        compared = loaded or last
        return {
            "name": name,
            "status": status.status,
            "served_digest": None if loaded is None else loaded.digest,
            "prepared_digest": None if last is None else last.digest,
            "changed_on_disk": compared is not None and compared.is_outdated(),
            **({} if last is None else {key: last.fields[key] for key in ("rank", "done", "notes", "cached")}),
            **({} if status.reason is None else {"reason": status.reason}),
        }

    def _loaded(self, name: str, served: Mapping[str, str]) -> Version | None:
        return self._versions.get((name, served.get(name, "")))

    def certificate(self, name: str, served: Mapping[str, str]) -> dict[str, Any] | None:
        """Return the record and the certificate of an adapter, without paths; None for one that was not prepared.

        They belong to the version that vLLM serves, else to the one that was prepared last; `served` is as for `shown`.
        """
        status = self._statuses.get(name)
        found = self._loaded(name, served) or (None if status is None else status.prepared)
        if found is None:
            return None
        files = {"prepared": found.fields["record"], "certificate": found.fields["certificate"]}
        return {
            kind: json.loads(self._without_paths(Path(file).read_text(), name, None)) for kind, file in files.items()
        }

    def _without_paths(self, text: str, name: str, source: str | None) -> str:
        """Return a text with the adapter's name in place of the server's paths, and of an argument of our function."""
        places = [source, str(self.settings.adapters / name)] if source else [str(self.settings.adapters / name)]
        for place in places:
            text = text.replace(place, name)
        text = text.replace(f"{self.settings.adapters}/", "").replace(str(self.settings.cache), "the cache")
        if self.served is not None and Path(self.served.model).is_absolute():
            text = text.replace(self.served.model, Path(self.served.model).name)
        return text.replace("approximate_to_rank", APPROXIMATE)
