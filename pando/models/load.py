"""From a name on the command line to a model in memory."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pando.core.config import BUILTIN_MODELS, ROUND_ON_LOAD, STORED_FORMATS
from pando.errors import ConfigError, ModelNotFound
from pando.gguf import read_gguf
from pando.kernels import cpu
from pando.kernels.ops import OpTable
from pando.kernels.packed_cache import Contents, PackedCache
from pando.kernels.packed_file import PackedFile
from pando.models.build import build_model
from pando.models.decoder import DecoderModel, ModelInfo
from pando.models.gguf import GGUFSource, gguf_config, is_gguf
from pando.models.hf_config import HFConfig
from pando.models.packed_weights import (
    Recording,
    RecordingLoader,
    Replay,
    ReplayLoader,
    StaleWeights,
    cache_key,
    checkpoint_files,
    phantoms_in,
)
from pando.models.quantized import QuantizedSource
from pando.models.registry import spec_of
from pando.models.spec import Spec
from pando.models.weights import DummySource, Loader, Progress, SafetensorsSource, WeightSource
from pando.quant.formats import stored_format
from pando.quant.on_load import AS_STORED, ON_LOAD, OnLoad

_log = logging.getLogger(__name__)

RELEASE_SECONDS = 0.01
"""Between two times that pages of a checkpoint are given back while it is read."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Names accepted for a model's dtype."""

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")
"""What a hub download fetches."""


def resolve_model_path(name_or_path: str, revision: str | None = None) -> Path:
    """Folder of a model: a built-in one by name, a local folder, or a hub id (downloaded into the shared cache).

    Of a GGUF model it is the file.

    Raises ModelNotFound, saying what was tried.
    """
    if name_or_path in BUILTIN_MODELS and not Path(name_or_path).is_dir():
        folder = Path(__file__).parent.parent / "models_builtin" / name_or_path
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"the built-in model {name_or_path} is not part of this installation ({folder} is missing)"
            )
        return folder
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _one_gguf(path) or path
    if path.is_file() and is_gguf(path):
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise ModelNotFound(
            f"{name_or_path!r} is no local folder, GGUF file or hub id (owner/name); the built-in models are "
            f"{' and '.join(map(repr, BUILTIN_MODELS))}",
            param="model_path",
        )
    return _download(name_or_path, revision)


def _one_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds one and no config.json."""
    files = [] if (folder / "config.json").is_file() else sorted(p for p in folder.iterdir() if is_gguf(p))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelNotFound(f"{folder} holds several GGUF files ({names}); name one of them", param="model_path")
    return files[0] if files else None


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise ModelNotFound(f"{hub_id!r} is no valid hub id: {error}", param="model_path") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"can not fetch {hub_id!r} from the hub: {error}; check name and network, and HF_TOKEN for gated models",
            param="model_path",
        ) from error


def load_spec(path: Path) -> tuple[Spec, HFConfig]:
    """Spec and raw config of a model folder or GGUF file, without its weights."""
    config = gguf_config(read_gguf(path)) if is_gguf(path) else HFConfig.from_file(path / "config.json")
    return spec_of(config), config


def load_model(
    path: Path | str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    ops: OpTable,
    quantization: str = "auto",
    load_format: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
    context_length: int | None = None,
    seed: int = 0,
    packed: PackedCache | None = None,
) -> DecoderModel:
    """Load a model onto a device.

    dtype: float32, bfloat16, float16, or auto = the checkpoint's. quantization: as `Config.quantization`. load_format:
    auto (safetensors) or dummy (random weights of the config's shape). progress: called with (fraction, tensor name).
    context_length: the longest sequence that will be served (only longrope models care); None = the model's. packed:
    where weights packed by an earlier load may be, and where this one's are to be kept. Raises ModelNotFound,
    UnsupportedModel or ConfigError.
    """
    folder = path if isinstance(path, Path) else resolve_model_path(path, revision)
    spec, config = load_spec(folder)
    rounding = ON_LOAD.get(quantization, AS_STORED)
    check_quantization(quantization, config)
    if quantization == "fp8" and not ops.float8_weights:
        raise ConfigError(
            f"the kernels {ops.name} have no products with weights in float8 here; use --quantization int8",
            param="quantization",
        )
    resolved = resolve_dtype(dtype, config)
    plan = _Load(folder, spec, config, resolved, torch.device(device), ops, rounding, progress, context_length)
    if load_format == "dummy":
        return plan.build(_dummy(config, resolved, seed, plan.device))
    source = open_weights(folder, config)
    level = cpu.level_of(ops)
    size = sum(file.stat().st_size for file in checkpoint_files(folder))
    if packed is None or level is None or size < packed.min_bytes:
        return plan.build(source)
    key = cache_key(folder, resolved, quantization)
    found = packed.find(folder.name, key)
    model = None if found is None else plan.replayed(source, found, level)
    if model is not None:
        return model
    recording = Recording()
    model = plan.build(source, recording)
    packed.keep(Contents(folder.name, key, recording.entries, {"schemes": recording.schemes}, recording.orders))
    return model


@dataclass(frozen=True, slots=True)
class _Load:
    """One load of a model: all that is decided before the first weight is read."""

    folder: Path
    spec: Spec
    config: HFConfig
    dtype: torch.dtype
    device: torch.device
    ops: OpTable
    rounding: OnLoad
    progress: Progress | None
    context_length: int | None

    def build(self, source: WeightSource, recording: Recording | None = None) -> DecoderModel:
        """Read, round and pack."""
        rounding = self.rounding.lazily() if self.ops.rounds else self.rounding
        loader = self._loader(source)
        with _pages_given_back(source):
            if recording is None:
                return self._build(loader, self.ops, rounding)
            return self._build(RecordingLoader(loader, recording), recording.table(self.ops), rounding)

    def replayed(self, source: WeightSource, file: PackedFile, level: int) -> DecoderModel | None:
        """The model on the weights of a file; None, with a line in the log, if they are not the model's."""
        shapes = [file.shape(index) for index in range(file.num_entries)]
        replay = Replay(
            lambda index, out_dtype: file.entry(index, level, out_dtype), shapes, file.extra["schemes"], file.order
        )
        try:
            model = self._build(ReplayLoader(self._loader(source), replay), replay.table(self.ops), AS_STORED)
            replay.finish()
            if kept := phantoms_in(model):
                raise StaleWeights(f"{kept} weights of the model are not packed")
        except StaleWeights as problem:
            _log.warning("packed weights are not used: %s", problem)
            return None
        return model

    def _loader(self, source: WeightSource) -> Loader:
        return Loader(source, self.dtype, self.device, self.progress)

    def _build(self, loader: Loader, ops: OpTable, rounding: OnLoad) -> DecoderModel:
        loader.skip(NOT_LANGUAGE_MODEL)
        info = ModelInfo(read_eos_token_ids(self.folder, self.config), self.config.values)
        length = self.context_length or self.spec.max_position
        with torch.inference_mode():
            return build_model(self.spec, loader, ops, length, info, rounding)


@contextlib.contextmanager
def _pages_given_back(source: WeightSource) -> Iterator[None]:
    """Give the checkpoint's pages back all the time, so that of a large matrix, too, few are in memory at once."""
    done = threading.Event()

    def release() -> None:
        while not done.wait(RELEASE_SECONDS):
            source.release()

    thread = threading.Thread(target=release, name="pando-release", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def open_weights(path: Path, config: HFConfig) -> WeightSource:
    """The tensors of a GGUF file, or of a folder through the format its config names where they are quantised."""
    if is_gguf(path):
        return GGUFSource(read_gguf(path))
    files = SafetensorsSource(path)
    settings = quantization_settings(config)
    return files if settings is None else QuantizedSource(files, stored_format(settings, config.source))


def _dummy(config: HFConfig, dtype: torch.dtype, seed: int, device: torch.device) -> DummySource:
    if quantization_settings(config) is not None:
        raise ConfigError(
            f"{config.source}: load_format dummy makes plain weights up; take quantization_config out of the config "
            "and use --quantization int8, w8a8 or int4",
            param="load_format",
        )
    return DummySource(seed, dtype=dtype, device=device)


def quantization_settings(config: HFConfig) -> Mapping[str, object] | None:
    """`quantization_config`, of the whole model or of its text part; None for a plain checkpoint."""
    for part in (config, config.section("text_config")):
        if part is not None and (settings := part.section("quantization_config")) is not None:
            return settings.values
    return None


def check_quantization(quantization: str, config: HFConfig) -> None:
    """Raise ConfigError if the option asks for something this checkpoint is not."""
    settings = quantization_settings(config)
    stored = None if settings is None else str(settings.get("quant_method"))
    if quantization in ROUND_ON_LOAD and stored is not None:
        raise ConfigError(
            f"{config.source}: the weights are already quantised ({stored}), --quantization {quantization} would round "
            "them twice; leave it out",
            param="quantization",
        )
    if quantization in STORED_FORMATS and quantization != stored:
        raise ConfigError(
            f"{config.source}: --quantization {quantization} asks for a checkpoint of that kind, but the weights are "
            f"{stored or 'plain'}; leave it out" + ("" if stored else ", or use int8, w8a8 or int4"),
            param="quantization",
        )


NOT_LANGUAGE_MODEL = r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\.|^(model\.)?mtp\."
"""Tensors of a checkpoint that its language model does not need: other modalities, layers that draft."""


def resolve_dtype(dtype: str, config: HFConfig) -> torch.dtype:
    """torch dtype of a name; "auto" takes the checkpoint's, float32 when it names none."""
    if dtype == "auto":
        section = config.section("text_config") or config
        outer = config.text("dtype", "torch_dtype", default="float32")
        dtype = section.text("dtype", "torch_dtype", default=outer)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}", param="dtype")
    return DTYPES[dtype]


def read_eos_token_ids(folder: Path, config: HFConfig) -> tuple[int, ...]:
    """Tokens that end a sequence: generation_config.json's, else the config's."""
    generation = folder / "generation_config.json"
    sources = [HFConfig.from_file(generation)] if generation.is_file() else []
    sources.append(config)
    if (text := config.section("text_config")) is not None:
        sources.append(text)
    for source in sources:
        value = source.values.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            return tuple(int(str(token)) for token in ids)
    return ()
