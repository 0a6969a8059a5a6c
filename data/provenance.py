"""Where latents come from: fingerprints of the four frozen encoders, and the refusal of a mix-up.

A model trained on latents of other encoders than the ones it is sampled with trains well and is
worthless. `data.prepare` stores the fingerprints and every setting in dataset.json; the trainer
calls `check_provenance` before it reads weights, on the folders that the run names.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from data.schema import DataError, Metadata
from model.weights.hub import (
    FLAN_T5_HUB_ID,
    fingerprint,
    one_line_errors,
    read_json,
    t5_folder,
    tangoflux_file,
    wan_subfolder,
    weight_files,
)

# Roots that feed one model must agree on these; shapes may differ between buckets.
FED = (
    "format", "fps", "sample_rate", "audio_hop", "video_temporal_stride", "video_spatial_stride",
    "latents_mean", "latents_std", "video_text_length", "video_text_width", "audio_text_length",
    "audio_text_width",
)
FED_SETTINGS = ("audio_pad_seconds",)


def check_provenance(
    roots: Mapping[str, Metadata], wan: str, tangoflux: str | None
) -> list[str]:
    """Refuse roots that do not belong together or to the encoders of the run's folders.

    Args:
        roots: data.root -> its dataset.json.
        wan, tangoflux: folders or hub ids, as the run names them; None where the task has none.

    Returns: what could not be or differs without harm, one line each, for the log.
    Reads a few KB per tensor and nothing from the network. DataError, in one line, names the
    field, both values and the fix.
    """
    notes = _check_roots(roots)
    for name, (compute, key) in _ENCODERS.items():
        source = {"wan": wan, "tangoflux": tangoflux}[key]
        stored = {root: m.fingerprints.get(name) for root, m in roots.items()}
        for root in (root for root, value in stored.items() if value is None):
            notes.append(f"data.root={root}: has no fingerprint of {name}; not checked")
        if source is None or not any(stored.values()):
            continue
        try:
            with one_line_errors(DataError, f"{key}={source}"):
                found = compute(_local(source, key))
        except _Absent as absent:
            notes.append(f"{key}={source}: {absent}; that {name} encoded the data is not checked")
            continue
        for root, value in stored.items():
            if value not in (None, found):
                raise DataError(
                    f"data.root={root}: fingerprints.{name}={value:.12}, but {key}={source} has "
                    f"{found:.12}; set {key} to the folder the clips were encoded with, or run "
                    f"data.prepare again with this one"
                )
    return notes


def _check_roots(roots: Mapping[str, Metadata]) -> list[str]:
    """Notes; DataError where two roots differ in what the model is fed."""
    first, *others = roots.items()
    notes = []
    for root, metadata in others:
        for field, (ours, theirs) in _differences(first[1], metadata):
            where = f"{field}={_short(ours)} in {first[0]}, {_short(theirs)} in {root}"
            if field in FED + FED_SETTINGS or field.startswith("fingerprints."):
                raise DataError(
                    f"data.root: {where}; all data of one run must agree: prepare one of the two "
                    f"again with the other's value, or train on one"
                )
            notes.append(f"data.root: {where}")
    return notes


def _differences(first: Metadata, other: Metadata) -> list[tuple[str, tuple[Any, Any]]]:
    """(field, both values) of everything stated in both and unequal."""
    pairs = {field: (getattr(first, field), getattr(other, field)) for field in FED}
    for name in first.fingerprints.keys() & other.fingerprints.keys():
        pairs[f"fingerprints.{name}"] = (first.fingerprints[name], other.fingerprints[name])
    by_nature = {"manifest", "captions", "clips_per_shard", "split", "commit", "wan", "tangoflux"}
    for name in (first.settings.keys() & other.settings.keys()) - by_nature:
        pairs[name] = (first.settings[name], other.settings[name])
    return [(field, pair) for field, pair in sorted(pairs.items()) if pair[0] != pair[1]]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def encoder_fingerprints(wan: str, tangoflux: str) -> dict[str, str]:
    """Encoder -> fingerprint of its config, weights and tokenizer; the folders must be here."""
    sources = {"wan": wan, "tangoflux": tangoflux}
    return {name: make(_local(sources[key], key)) for name, (make, key) in _ENCODERS.items()}


class _Absent(Exception):
    """The encoder's files are not on this machine."""


def _local(source: str, key: str) -> Path:
    """A folder as it is, or the part of a hub id that has been downloaded before."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise _Absent("not on this machine") from error


def _require(path: Path) -> None:
    if not path.exists():
        raise _Absent(f"no {path.name} on this machine")


def _video_vae(wan: Path) -> str:
    _require(wan / "vae")
    folder = wan_subfolder(wan, "vae", "config.json")
    return fingerprint(weight_files(folder), read_json(folder / "config.json"))


def _audio_vae(tangoflux: Path) -> str:
    _require(tangoflux / "vae.safetensors")
    path, config = tangoflux_file(tangoflux, "vae.safetensors")
    return fingerprint([path], config.get("vae", {}))


def _video_text(wan: Path) -> str:
    _require(wan / "text_encoder")
    folder = wan_subfolder(wan, "text_encoder", "config.json")
    tokenizer = wan_subfolder(wan, "tokenizer", "tokenizer_config.json")
    return fingerprint(weight_files(folder), read_json(folder / "config.json"), tokenizer)


def _audio_text(tangoflux: Path) -> str:
    _require(tangoflux / "tangoflux.safetensors")
    path, config = tangoflux_file(tangoflux, "tangoflux.safetensors")
    name = config.get("text_encoder_name", FLAN_T5_HUB_ID)
    inside = (tangoflux / name).is_dir()
    source = t5_folder(tangoflux, name if inside else str(_local(name, "text_encoder_name")))
    return fingerprint([path], read_json(source / "config.json"), source, "text_encoder.")


_ENCODERS: dict[str, tuple[Callable[[Path], str], str]] = {  # name -> (fingerprint, run's key)
    "video_vae": (_video_vae, "wan"),
    "audio_vae": (_audio_vae, "tangoflux"),
    "video_text": (_video_text, "wan"),
    "audio_text": (_audio_text, "tangoflux"),
}
