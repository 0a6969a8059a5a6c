"""Finding, reading and checking released weight files: local folders or hub ids, safetensors only.

Every error is one line that names what was looked for and the hub id to download. Used by
`model.encoders` and `model.weights.load`; nothing here knows which model a tensor belongs to.
"""

import hashlib
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.weights.names import differences, first_ten

WAN_HUB_ID = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
TANGOFLUX_HUB_ID = "declare-lab/TangoFlux"
FLAN_T5_HUB_ID = "google/flan-t5-large"

TOKENIZER_FILES = ["tokenizer*", "spiece.model", "special_tokens_map.json", "added_tokens.json"]

# What torch, diffusers and transformers raise on files that are damaged or of another model.
LOADING_ERRORS = (
    OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, EOFError,
    pickle.UnpicklingError,
)
SAMPLED = 4096  # bytes at each of three places of a tensor, for its fingerprint
LONGEST = 500  # characters of a library's message; torch lists every tensor


@contextmanager
def one_line_errors(
    kind: type[Exception], what: str, fix: str = "check or download it again"
) -> Iterator[None]:
    """Whatever the libraries raise on damaged or foreign files in `what`, as one line of `kind`.

    Plain FileNotFoundError, ValueError and ImportError are our own and keep their text.
    """
    try:
        yield
    except kind:
        raise
    except LOADING_ERRORS as error:
        text = " ".join(str(error).split())  # libraries like to write over many lines
        if type(error) in (FileNotFoundError, ValueError, ImportError):
            raise kind(text) from error
        text = f"{type(error).__name__}: {text}"
        text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
        raise kind(f"{what}: cannot be loaded ({text}); {fix}") from error


def resolve_folder(
    source: str | Path, key: str, hub_id: str, patterns: list[str], download: bool = True
) -> Path:
    """A local folder as it is, or the downloaded snapshot of a hub id `owner/name`.

    ``download`` False: only a snapshot that is on this machine.
    FileNotFoundError names `key`, the value and `hub_id` (what to download instead).
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not _looks_like_hub_id(str(source)):
        raise FileNotFoundError(
            f"{key}={source}: there is no such folder; give a local copy of {hub_id} "
            f"or the hub id itself"
        )
    try:
        return Path(snapshot_download(
            str(source), allow_patterns=patterns, local_files_only=not download))
    except (OSError, ValueError) as error:  # every hub error is one of the two
        raise FileNotFoundError(
            f"{key}={source}: neither a folder here nor a hub id that could be downloaded "
            f"({type(error).__name__}); download {hub_id} and give its folder"
        ) from error


def require_file(path: Path, key: str, hub_id: str) -> Path:
    """The path itself, or a FileNotFoundError naming it, its key and where to get it."""
    if not path.is_file():
        raise FileNotFoundError(f"{key}: no file {path}; download it from {hub_id}")
    return path


def weight_files(folder: Path) -> list[Path]:
    """All safetensors files of a diffusers/transformers folder; FileNotFoundError if none.

    ValueError if one is damaged: transformers would say so without naming the file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors file in {folder}; download it again")
    for path in files:
        with open_weights(path):
            pass
    return files


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """The open safetensors file; ValueError naming it if it is damaged or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}; download it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError names the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def check_json_files(folder: Path) -> Path:
    """The folder itself, or a ValueError naming its first damaged JSON file.

    The tokenizers library raises bare Exceptions without a file name, so this looks first.
    """
    for path in sorted(folder.glob("*.json")):
        if "model" not in read_json(path) and path.name == "tokenizer.json":
            raise ValueError(f"{path} has no key 'model', so no vocabulary; download it again")
    return folder


def require_tokenizer(folder: Path, key: str, hub_id: str) -> Path:
    """The folder itself, or a FileNotFoundError if no vocabulary is in it."""
    if not (folder / "spiece.model").is_file():
        require_file(folder / "tokenizer.json", key, hub_id)
    return folder


def iter_tensors(files: list[Path], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name without prefix, tensor) of every tensor whose name starts with `prefix`, by name."""
    owner = {}
    for path in files:
        with open_weights(path) as file:
            owner.update({name: path for name in file.keys() if name.startswith(prefix)})
    for name in sorted(owner):
        with open_weights(owner[name]) as file:
            yield name.removeprefix(prefix), file.get_tensor(name)


def tensor_shapes(files: list[Path], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Name without prefix -> shape of every tensor whose name starts with `prefix`."""
    shapes = {}
    for path in files:
        with open_weights(path) as file:
            shapes.update({name.removeprefix(prefix): tuple(file.get_slice(name).get_shape())
                           for name in file.keys() if name.startswith(prefix)})
    return shapes


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into the module; ValueError on a missing, unknown or mis-shaped one."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_loaded(path, differences(wanted, found))
    module.load_state_dict(tensors)


def check_loaded(path: Path, faults: list[str]) -> None:
    """ValueError that lists the first ten tensors that do not fit; from_pretrained only warns."""
    if faults:
        raise ValueError(f"{path}: weights and config do not belong together, {len(faults)} "
                         f"tensors do not fit; download both again: {first_ten(faults)}")


def fingerprint(
    files: list[Path],
    config: dict[str, Any],
    tokenizer_folder: Path | None = None,
    prefix: str = "",
) -> str:
    """sha256 over config, tensors (name, dtype, shape, sampled bytes) and tokenizer files.

    Of each tensor the first, middle and last SAMPLED bytes are read: training moves every tensor
    everywhere, so other weights are seen, in seconds where 30 GB would take minutes. (A flipped
    bit is not: that is what a download's checksum is for.) Tensors are hashed by name, so a single
    file and its shards have the same fingerprint.
    """
    digest = hashlib.sha256()
    settings = {k: v for k, v in config.items() if not k.startswith("_") and "version" not in k}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    places = sorted(place for path in files for place in _tensor_places(path, prefix))
    for name, form, path, begin, end in places:
        digest.update(f"{name} {form}".encode())
        with path.open("rb") as file:
            for start in sorted({begin, (begin + end - SAMPLED) // 2, end - SAMPLED}):
                file.seek(max(start, begin))
                digest.update(file.read(min(SAMPLED, end - max(start, begin))))
    if tokenizer_folder is not None:
        for path in sorted(tokenizer_folder.glob("tokenizer*")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _tensor_places(path: Path, prefix: str) -> Iterator[tuple[str, str, Path, int, int]]:
    """(name, dtype and shape, file, first byte, last byte + 1) of the tensors under `prefix`."""
    with open_weights(path):  # refuses a header that does not fit the file
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if name.startswith(prefix):
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name.removeprefix(prefix), f"{entry['dtype']} {entry['shape']}", path, begin, end


def wan_subfolder(wan: str | Path, name: str, needed: str) -> Path:
    """`<wan>/<name>`, which must hold the file `needed`."""
    folder = resolve_folder(wan, "wan", WAN_HUB_ID, [f"{name}/*"]) / name
    if name == "tokenizer":
        require_tokenizer(folder, "wan", WAN_HUB_ID)
    return check_json_files(require_file(folder / needed, "wan", WAN_HUB_ID).parent)


def tangoflux_file(tangoflux: str | Path, name: str) -> tuple[Path, dict[str, Any]]:
    """(path of the file, config.json of its folder)."""
    folder = resolve_folder(tangoflux, "tangoflux", TANGOFLUX_HUB_ID, ["*.safetensors", "*.json"])
    path = require_file(folder / name, "tangoflux", TANGOFLUX_HUB_ID)
    config = require_file(folder / "config.json", "tangoflux", TANGOFLUX_HUB_ID)
    return path, read_json(config)


def t5_folder(tangoflux_folder: Path, name: str, download: bool = True) -> Path:
    """Flan-T5's config and tokenizer: inside the TangoFlux folder, elsewhere, or on the hub."""
    folder = tangoflux_folder / name
    if not folder.is_dir():
        patterns = ["config.json", *TOKENIZER_FILES]
        folder = resolve_folder(name, "text_encoder_name", FLAN_T5_HUB_ID, patterns, download)
    require_file(folder / "config.json", "text_encoder_name", FLAN_T5_HUB_ID)
    return check_json_files(require_tokenizer(folder, "text_encoder_name", FLAN_T5_HUB_ID))


def _looks_like_hub_id(source: str) -> bool:
    """owner/name, not an absolute or dotted path."""
    return source.count("/") == 1 and not source.startswith(("/", ".", "~"))
