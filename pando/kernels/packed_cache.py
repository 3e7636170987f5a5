"""A folder of packed weights (`packed_file`), bounded, shared by processes, safe to delete at any time.

A file is written behind a server that is already up, at the lowest priority, under a temporary name, and renamed when
it is complete: readers see all of it or nothing, and of several writers the last one wins. Whatever goes wrong costs
one line in the log and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch import Tensor

from pando.kernels.packed_file import BadFile, Packed, PackedFile, Stopped, is_storable, write_file

_log = logging.getLogger(__name__)

SUFFIX, UNFINISHED = ".panels", ".part"
MIN_BYTES = 64 << 20
"""Less is packed faster than a person notices."""
SPARE_BYTES = 1 << 30
"""Left free on the disk."""
FORGOTTEN_SECONDS = 3600.0
"""Unfinished files that nobody has written to for so long are removed."""
DELAY_SECONDS = 1.0
"""From `start_writing` to the first byte: the first request comes first."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file gets. `write_file` says what the fields are."""

    name: str
    key: Mapping[str, Any]
    entries: Sequence[Packed]
    extra: Mapping[str, Any]
    orders: Sequence[Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(entry.num_bytes for entry in self.entries)


class PackedCache:
    """Finds packed weights by name and key, and keeps new ones.

    limit_bytes: of all files; the least recently used ones go first. min_bytes: smaller models are not kept.
    """

    def __init__(self, folder: Path, limit_bytes: int = 20_000_000_000, min_bytes: int = MIN_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.min_bytes = min_bytes
        self._waiting: Contents | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def path(self, name: str, key: Mapping[str, Any]) -> Path:
        """Where the packed weights of a model are, if they are."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:80]}-{digest}{SUFFIX}"

    def find(self, name: str, key: Mapping[str, Any]) -> PackedFile | None:
        """The mapped file, or None; one that is damaged is removed."""
        path = self.path(name, key)
        try:
            found = PackedFile(path, key)
        except BadFile as problem:
            if path.exists():
                _log.info("packed weights in %s are not used: %s", path, problem)
                _remove(path)
            return None
        try:
            os.utime(path)  # the time of its last use
        except OSError:
            pass  # a folder that may only be read
        return found

    def keep(self, contents: Contents) -> None:
        """Remember what `start_writing` is to write."""
        if contents.num_bytes >= self.min_bytes and all(is_storable(entry) for entry in contents.entries):
            self._waiting = contents

    def start_writing(self, delay: float = DELAY_SECONDS) -> None:
        """Write what there is to keep, in a thread. To be called when the model is served."""
        contents, self._waiting = self._waiting, None
        if contents is None:
            return
        self._thread = threading.Thread(target=self._write, args=(contents, delay), name="pando-packed", daemon=True)
        self._thread.start()

    def close(self, wait: bool = False) -> None:
        """Give up what is being written; with `wait`, let it be finished instead."""
        if not wait:
            self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _write(self, contents: Contents, delay: float) -> None:
        _lowest_priority()
        if self._stop.wait(delay):
            return
        path = self.path(contents.name, contents.key)
        began = time.monotonic()
        try:
            if path.exists() or not self._make_room(contents.num_bytes):
                return
            size = self._write_to(path, contents)
        except Stopped:
            return
        except OSError as error:
            _log.warning("packed weights can not be kept in %s: %s", self.folder, error)
        else:
            _log.info("kept packed weights: %s, %.2f GB, %.1f s", path, size / 1e9, time.monotonic() - began)

    def _make_room(self, num_bytes: int) -> bool:
        """Remove what is forgotten and, from the oldest, what is too much. False if the file can not fit."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in self.folder.glob("*" + UNFINISHED):
            if time.time() - part.stat().st_mtime > FORGOTTEN_SECONDS:
                _remove(part)
        files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob("*" + SUFFIX))
        total = sum(size for _, size, _ in files) + num_bytes
        if num_bytes > self.limit_bytes:
            _log.info("packed weights take %.1f GB, more than may be kept", num_bytes / 1e9)
            return False
        for _, size, path in files:
            if total > self.limit_bytes:
                _remove(path)
                total -= size
        if shutil.disk_usage(self.folder).free < num_bytes + SPARE_BYTES:
            _log.warning("packed weights of %.1f GB are not kept: the disk is full", num_bytes / 1e9)
            return False
        return True

    def _write_to(self, path: Path, contents: Contents) -> int:
        handle, name = tempfile.mkstemp(suffix=UNFINISHED, dir=self.folder)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                size = write_file(
                    cast(BinaryIO, file), contents.key, contents.entries, contents.extra, contents.orders, self._go_on
                )
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            _remove(Path(name))
            raise
        return size

    def _go_on(self) -> bool:
        return not self._stop.is_set()


def default_folder() -> Path | None:
    """`pando/packed` in the user's cache folder (XDG); None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "pando" / "packed"
    except RuntimeError:
        return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.debug("can not remove %s: %s", path, error)


def _lowest_priority() -> None:
    """Of this thread alone, where the system has that."""
    if hasattr(os, "sched_getaffinity"):  # Linux: a thread has a priority of its own
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        except OSError:
            pass  # not allowed: it only takes part of the cores for some seconds
