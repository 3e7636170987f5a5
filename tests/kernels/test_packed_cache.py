"""Files of packed weights: damage of every kind, writers beside each other, full disks, the size of the folder."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pando.kernels import cpu, op_table, packed_cache, packed_file
from pando.kernels.packed_cache import Contents, PackedCache, default_folder
from pando.kernels.packed_file import BadFile, PackedFile

if cpu.LOAD_ERROR is not None:
    pytest.skip("no compiled kernels", allow_module_level=True)

OPS = op_table("cpu")
LEVEL = cpu.level_of(OPS)
KEY = {"checkpoint": ["a", 1], "layout": 1}
X = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))


def entries(seed: int = 0) -> list[Any]:
    noise = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(200, 96, generator=noise), torch.randn(200, generator=noise)
    experts = [torch.randn(128, 96, generator=noise) for _ in range(3)], [torch.randn(96, 64, generator=noise)] * 3
    return [OPS.pack_linear(weight, bias), OPS.pack_linear(weight.bfloat16()), OPS.pack_experts(*experts, "silu")]


def contents(name: str = "model", key: Any = KEY, seed: int = 0) -> Contents:
    return Contents(name, key, entries(seed), {"note": [1, None]}, [torch.arange(5).flip(0)])


def written(folder: Path, **options: Any) -> Path:
    cache = PackedCache(folder, min_bytes=0)
    cache.keep(contents(**options))
    cache.start_writing(delay=0.0)
    cache.close(wait=True)
    return cache.path(options.get("name", "model"), options.get("key", KEY))


def find(folder: Path) -> PackedFile | None:
    return PackedCache(folder, min_bytes=0).find("model", KEY)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "folder")
    found = PackedFile(path, KEY)
    assert found.num_entries == 3 and found.extra == {"note": [1, None]}
    assert found.order(0).tolist() == [4, 3, 2, 1, 0]
    for index, packed in enumerate(entries()):
        assert found.shape(index) == packed_file.shape_of(packed)
    linear, half, experts = entries()
    assert torch.equal(found.entry(0, LEVEL, None)(X), linear(X))
    assert torch.equal(found.entry(1, LEVEL, torch.float32)(X.bfloat16()), OPS.pack_linear(
        torch.randn(200, 96, generator=torch.Generator().manual_seed(0)).bfloat16(), out_dtype=torch.float32
    )(X.bfloat16()))  # fmt: skip
    ids, weights = torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.full((3, 2), 0.5)
    assert torch.equal(found.entry(2, LEVEL, None)(X, ids, weights), experts(X, ids, weights))
    assert found.entry(2, LEVEL, None).num_bytes == experts.num_bytes
    assert oct(path.stat().st_mode & 0o777) == "0o600" and half.num_bytes > 0


def test_the_memory_outlives_the_file_and_its_reader(tmp_path: Path) -> None:
    path = written(tmp_path)
    packed = PackedFile(path, KEY).entry(0, LEVEL, None)
    path.unlink()
    assert torch.equal(packed(X), entries()[0](X))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize("at", [0, 9, 17, 40, 70_000, 100_000, 200_000, -1, -3000])
def test_any_damage_is_noticed(at: int, tmp_path: Path) -> None:
    path = written(tmp_path)
    flip(path, at)
    with pytest.raises(BadFile):
        PackedFile(path, KEY)
    assert find(tmp_path) is None and not path.exists(), "it makes room for a good one"


@pytest.mark.parametrize("keep", [0, 5, 100, 65_536, 100_000, -1])
def test_a_cut_file_is_noticed(keep: int, tmp_path: Path) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    assert find(tmp_path) is None
    path.write_bytes(content + b"x")
    assert find(tmp_path) is None
    path.write_bytes(content)
    assert find(tmp_path) is not None


def test_swapped_pieces_are_noticed(tmp_path: Path) -> None:
    """Every byte is there, some in another place."""
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    begin = 1 << 16
    content[begin : begin + 8], content[begin + 128 : begin + 136] = (
        content[begin + 128 : begin + 136],
        content[begin : begin + 8],
    )
    path.write_bytes(content)
    with pytest.raises(BadFile, match="checksum"):
        PackedFile(path, KEY)


def test_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    with pytest.raises(BadFile, match="another checkpoint"):
        PackedFile(path, {**KEY, "layout": 2})
    with pytest.raises(BadFile, match="none"):
        PackedFile(tmp_path / "nothing", KEY)
    with pytest.raises(BadFile):
        PackedFile(tmp_path, KEY)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    if path.stat().st_uid != 0:
        with pytest.raises(BadFile, match="another user"):
            PackedFile(path, KEY)


def test_many_sections_have_a_longer_header(tmp_path: Path) -> None:
    cache, packed = PackedCache(tmp_path, min_bytes=0), OPS.pack_linear(torch.ones(1, 1))
    cache.keep(Contents("model", KEY, [packed] * 2000, {}, []))
    cache.start_writing(delay=0.0)
    cache.close(wait=True)
    found = find(tmp_path)
    assert found is not None and found.num_entries == 2000
    assert float(found.entry(1999, LEVEL, None)(torch.ones(1, 1))) == 1.0


def test_writers_beside_each_other(tmp_path: Path) -> None:
    caches = [PackedCache(tmp_path, min_bytes=0) for _ in range(4)]
    for cache in caches:
        cache.keep(contents())
        cache.start_writing(delay=0.0)
    readers_saw = []
    while any(cache._thread is not None and cache._thread.is_alive() for cache in caches):
        path = caches[0].path("model", KEY)
        if path.exists():
            readers_saw.append(PackedFile(path, KEY).num_entries)
    for cache in caches:
        cache.close(wait=True)
    assert set(readers_saw) <= {3} and find(tmp_path) is not None
    assert len(list(tmp_path.iterdir())) == 1


class FullDisk:
    """A file system that takes so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write_file(self, file: Any, *args: Any) -> int:
        inner = self

        class Limited:
            def write(self, content: Any) -> int:
                taken = min(len(content), inner.room)
                if taken == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                inner.room -= taken
                return int(file.write(content[:taken]))

        return packed_file.write_file(Limited(), *args)  # type: ignore[arg-type]


@pytest.mark.parametrize("room", [0, 70_000, 150_000])
def test_a_disk_that_fills_up(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_cache, "write_file", FullDisk(room).write_file)
    with caplog.at_level(logging.INFO):
        written(tmp_path)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_cache, "SPARE_BYTES", 1 << 60)
    written(tmp_path)
    assert list(tmp_path.iterdir()) == [] and "the disk is full" in caplog.text


def test_a_folder_that_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where the folder should be; and reading needs no permission to write."""
    (tmp_path / "file").write_text("")
    written(tmp_path / "file" / "below")
    assert len(caplog.records) == 1 and "can not be kept" in caplog.text
    written(tmp_path / "good")
    monkeypatch.setattr(os, "utime", lambda path: (_ for _ in ()).throw(PermissionError("read-only")))
    assert find(tmp_path / "good") is not None


def test_the_oldest_files_make_room(tmp_path: Path) -> None:
    paths = [written(tmp_path, name=name) for name in ("a", "b", "c")]
    for age, path in zip((300, 100, 200), paths, strict=True):
        os.utime(path, (time.time() - age,) * 2)
    size = paths[0].stat().st_size
    cache = PackedCache(tmp_path, limit_bytes=3 * size + size // 2, min_bytes=0)
    cache.keep(contents("d"))
    cache.start_writing(delay=0.0)
    cache.close(wait=True)
    assert [path.exists() for path in paths] == [False, True, True]
    assert cache.path("d", KEY).exists()
    used = PackedCache(tmp_path, min_bytes=0)
    assert used.find("c", KEY) is not None and paths[2].stat().st_mtime > paths[1].stat().st_mtime


def test_more_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    old = written(tmp_path, name="old")
    cache = PackedCache(tmp_path, limit_bytes=1000, min_bytes=0)
    cache.keep(contents("new"))
    cache.start_writing(delay=0.0)
    cache.close(wait=True)
    assert list(tmp_path.iterdir()) == [old]


def test_writing_ends_with_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, begun, stopping = PackedCache(tmp_path, min_bytes=0), threading.Event(), threading.Event()
    monkeypatch.setattr(packed_file, "PIECE_BYTES", 4096)
    write = packed_cache.write_file

    def slowly(file: Any, *args: Any) -> int:
        begun.set()
        stopping.wait(20)
        return write(file, *args)

    monkeypatch.setattr(packed_cache, "write_file", slowly)
    cache.keep(contents())
    cache.start_writing(delay=0.0)
    assert begun.wait(20)
    cache._stop.set()
    stopping.set()
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_forgotten_unfinished_files_go(tmp_path: Path) -> None:
    old, young = tmp_path / "tmp1.part", tmp_path / "tmp2.part"
    for part in (old, young):
        part.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    written(tmp_path)
    assert not old.exists() and young.exists()


def test_what_stays_unpacked_is_not_kept(tmp_path: Path) -> None:
    reference = op_table("cpu", "reference")
    cache = PackedCache(tmp_path, min_bytes=0)
    cache.keep(Contents("model", KEY, [*entries(), reference.pack_linear(torch.ones(2, 2))], {}, []))
    assert cache._waiting is None


def test_checksums_are_additive_and_see_every_byte() -> None:
    data = torch.randint(0, 256, (3_000_001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    native, piece = packed_file._native, packed_file._native.checksum_chunk
    whole = native.checksum(data.data_ptr(), len(data), 0)
    parts = [
        native.checksum(data.data_ptr() + at, min(piece, len(data) - at), at // piece)
        for at in range(0, len(data), piece)
    ]
    assert sum(parts) % (1 << 64) == whole and len(parts) == 3
    for at in (0, 127, 128, piece - 1, piece, len(data) - 1):
        data[at] ^= 128
        assert native.checksum(data.data_ptr(), len(data), 0) != whole
        data[at] ^= 128
    assert native.checksum(data.data_ptr(), len(data) - 1, 0) != whole
    assert native.checksum(data.data_ptr(), len(data), 0) == whole
    assert native.checksum(data.data_ptr(), 0, 0) == 0


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "pando" / "packed"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_folder() == Path("/home/somebody/.cache/pando/packed")
