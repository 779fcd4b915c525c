"""Models' tokenizers and templates by digest: fetched once, kept on disk, built once.

A digest names its bytes for ever, so what is here is never stale. Knows no region: whoever made it
says how to fetch.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
import msgspec
from anyio import to_thread

from edge.tokenizer import ModelText
from routing.errors import Code, Failure
from routing.logs import log
from routing.wire import TextAssets

logger = logging.getLogger(__name__)

_DIGEST = re.compile("[0-9a-f]{64}")  # what a region says becomes a file's name
_MOST_BUILT = 32  # in memory; a few MB each


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One model's text assets, ready for use."""

    text: ModelText
    stop_ids: tuple[int, ...]
    defaults: Mapping[str, float]  # of sampling, as the model's makers advise


class TextStore:
    def __init__(self, folder: Path, fetch: Callable[[str], Awaitable[TextAssets]]) -> None:
        """`fetch` returns the assets of a digest, or raises Failure."""
        self._folder = folder
        self._fetch = fetch
        self._built: OrderedDict[str, Loaded] = OrderedDict()  # last used last
        self._under_way: dict[str, anyio.Event] = {}

    async def get(self, digest: str) -> Loaded:
        """Ready for use; Failure(UNAVAILABLE) when it cannot be had now. Many may wait for one."""
        while (loaded := self._built.get(digest)) is None:
            if (loading := self._under_way.get(digest)) is not None:
                await loading.wait()  # then look again: whoever was loading may have been cancelled
                continue
            done = self._under_way[digest] = anyio.Event()
            try:
                self._keep(digest, await self._load(digest))
            finally:
                del self._under_way[digest]
                done.set()
        self._built.move_to_end(digest)
        return loaded

    async def warm(self, digests: Iterable[str]) -> bool:
        """Have these ready before a request wants them; whether all are."""
        failed = 0
        for digest in digests:
            if digest not in self._built:
                try:
                    await self.get(digest)
                except Failure as failure:
                    log(logger, "assets not ready", digest=digest, why=failure.detail)
                    failed += 1
        return not failed

    def _keep(self, digest: str, loaded: Loaded) -> None:
        self._built[digest] = loaded
        if len(self._built) > _MOST_BUILT:
            self._built.popitem(last=False)

    async def _load(self, digest: str) -> Loaded:
        if not _DIGEST.fullmatch(digest):
            raise Failure(Code.UNAVAILABLE, "the model's tokenizer has a malformed digest")
        path = self._folder / digest
        assets = await to_thread.run_sync(_read, path, digest)
        if assets is None:
            assets = await self._fetch(digest)
            await to_thread.run_sync(_write, path, assets)
        try:
            text = await to_thread.run_sync(ModelText, assets)
        except Exception as exc:  # `tokenizers` raises no narrower type on a file it cannot read
            logger.exception("tokenizer not understood", extra={"fields": {"digest": digest}})
            raise Failure(Code.UNAVAILABLE, "the model's tokenizer cannot be used here") from exc
        return Loaded(text=text, stop_ids=assets.stop_ids, defaults=assets.generation_defaults)


def _read(path: Path, digest: str) -> TextAssets | None:
    """What the disk holds, if it is whole and what it says it is."""
    try:
        assets = msgspec.msgpack.decode(path.read_bytes(), type=TextAssets)
    except (OSError, msgspec.DecodeError):
        return None
    return assets if assets.digest == digest else None


def _write(path: Path, assets: TextAssets) -> None:
    """At once or not at all. A disk that is full or read-only costs the next start a fetch."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.msgpack.encode(assets))
        os.replace(draft, path)
    except OSError as exc:
        log(logger, "assets not kept", path=str(path), why=str(exc))
        with suppress(OSError):
            draft.unlink()
