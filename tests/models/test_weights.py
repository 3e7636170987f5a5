"""The loader: sources, shapes, dtypes, fused and sliced reads, and errors that name the tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pando.errors import ConfigError
from pando.models.weights import INDEX_FILE, SINGLE_FILE, DummySource, Loader, SafetensorsSource

CPU = torch.device("cpu")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "b.weight": torch.randn(2, 4, generator=generator).bfloat16(),
        "norm.weight": torch.randn(4, generator=generator),
    }


@pytest.fixture
def single(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        file = f"model-{number:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, tmp_path / file)
        weight_map[name] = file
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def loader(folder: Path, dtype: torch.dtype = torch.float32) -> Loader:
    return Loader(SafetensorsSource(folder), dtype, CPU)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_names_shapes_and_values(
    layout: str, tensors: dict[str, torch.Tensor], request: pytest.FixtureRequest
) -> None:
    source = SafetensorsSource(request.getfixturevalue(layout))
    assert source.names() == set(tensors)
    for name, tensor in tensors.items():
        assert source.read(name).dtype == tensor.dtype
        assert torch.equal(source.read(name), tensor)


def test_a_tensor_is_a_view_of_the_file(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    source = SafetensorsSource(single)
    view = source.read("a.weight")
    assert view.data_ptr() == source.read("a.weight").data_ptr()
    pulled = loader(single, torch.bfloat16)
    assert pulled.tensor("a.weight", 6, 4).data_ptr() == pulled.tensor("a.weight", 6, 4).data_ptr()
    pulled.release()
    assert torch.equal(pulled.tensor("a.weight", 6, 4), tensors["a.weight"]), "released pages are read again"
    view.zero_()
    assert torch.equal(SafetensorsSource(single).read("a.weight"), tensors["a.weight"]), "nothing writes to the file"


def test_elements_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(4.0)}, tmp_path / SINGLE_FILE)
    raw = (tmp_path / SINGLE_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip() + b" "
    while (8 + len(header)) % 4 == 0:
        header += b" "
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert SafetensorsSource(tmp_path).read("b").tolist() == [0.0, 1.0, 2.0, 3.0]


def test_files_without_an_index_are_all_read(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "part-1.safetensors")
    save_file({"b.weight": tensors["b.weight"]}, tmp_path / "part-2.safetensors")
    assert SafetensorsSource(tmp_path).names() == {"a.weight", "b.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_converts_to_the_target_dtype(single: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    tensor = loader(single, dtype).tensor("a.weight", 6, 4)
    assert tensor.dtype == dtype
    assert torch.equal(tensor, tensors["a.weight"].to(dtype))


def test_some_tensors_stay_float32(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    vector = loader(single, torch.bfloat16).float32("norm.weight", 4)
    assert vector.dtype == torch.float32
    assert torch.equal(vector, tensors["norm.weight"])


def test_vectors_come_one_after_another(tmp_path: Path) -> None:
    save_file({"a.bias": torch.arange(3.0), "b.bias": torch.arange(2.0)}, tmp_path / SINGLE_FILE)
    assert loader(tmp_path).vectors([("b.bias", 2), ("a.bias", 3)]).tolist() == [0.0, 1.0, 0.0, 1.0, 2.0]


def test_a_change_rearranges_what_is_stored(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = loader(single).tensor("a.weight", 4, 6, change=lambda stored: stored.T)
    assert found.is_contiguous() and torch.equal(found, tensors["a.weight"].float().T)


def test_whole_numbers_are_no_plain_weight(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 2, dtype=torch.int32)}, tmp_path / SINGLE_FILE)
    pulled = loader(tmp_path)
    pulled.weight("a.weight", 2, 2)
    with pytest.raises(ConfigError, match="a.weight holds int32, which is no plain weight"):
        pulled.finish()


def test_progress_goes_from_nothing_to_all(single: Path) -> None:
    seen: list[float] = []
    pulled = Loader(SafetensorsSource(single), torch.float32, CPU, lambda fraction, detail: seen.append(fraction))
    pulled.tensor("a.weight", 6, 4)
    pulled.tensor("b.weight", 2, 4)
    pulled.float32("norm.weight", 4)
    pulled.finish()
    assert seen == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_one_error_names_everything_that_does_not_fit(single: Path) -> None:
    pulled = loader(single)
    pulled.tensor("a.weight", 6, 5)
    pulled.tensor("missing.weight", 2, 2)
    with pytest.raises(ConfigError) as caught:
        pulled.finish()
    message = str(caught.value)
    assert "a.weight has shape [6, 4], [6, 5] expected" in message
    assert "missing.weight is missing" in message
    assert "b.weight is not part of this architecture" in message


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.zeros(1) for i in range(20)}, tmp_path / SINGLE_FILE)
    with pytest.raises(ConfigError, match="and 12 more"):
        loader(tmp_path).finish()


def test_skipped_and_derived_tensors_may_be_left_over(tmp_path: Path) -> None:
    save_file({"vision.w": torch.zeros(1), "layers.0.rotary_emb.inv_freq": torch.zeros(2)}, tmp_path / SINGLE_FILE)
    pulled = loader(tmp_path)
    pulled.skip(r"^vision\.")
    pulled.finish()


def test_a_shard_that_is_not_there_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-00002-of-00003"):
        SafetensorsSource(sharded)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no .safetensors weights"):
        SafetensorsSource(tmp_path)


def test_a_truncated_file_is_an_error(single: Path) -> None:
    file = single / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=SINGLE_FILE):
        SafetensorsSource(single)


def test_a_file_that_is_no_safetensors_is_an_error(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(ConfigError, match=SINGLE_FILE):
        SafetensorsSource(tmp_path)


def test_dummy_weights_depend_on_seed_and_name_only() -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        return Loader(DummySource(seed), torch.float32, CPU).tensor(name, 50, 30)

    assert torch.equal(draw(1, "x.weight"), draw(1, "x.weight"))
    assert not torch.equal(draw(1, "x.weight"), draw(2, "x.weight"))
    assert not torch.equal(draw(1, "x.weight"), draw(1, "y.weight"))
    assert draw(1, "x.weight").std() == pytest.approx(0.02, rel=0.1)


def test_dummy_norms_are_near_one_and_large_tensors_work() -> None:
    pulled = Loader(DummySource(), torch.float32, CPU)
    assert pulled.float32("layers.0.input_layernorm.weight", 64).mean() == pytest.approx(1.0, abs=0.02)
    assert pulled.tensor("big.weight", 1100, 1024).std() == pytest.approx(0.02, rel=0.01)
    pulled.finish()
