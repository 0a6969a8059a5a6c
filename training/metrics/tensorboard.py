"""TensorBoard event files that never hold a step twice and never stop a run.

DeepSpeed's own monitor has lost the loss and doubles steps after a resume; `purge_step` hides the
doubles from some readers only. So a resumed run takes the records it will write again out of the
files themselves; `purge_step` is for a TensorBoard that has read them already. torch's add_video
needs an old moviepy and add_audio is mono: pictures, moving pictures (GIF) and stereo sound are
written here from finished bytes. Called by training.metrics.
"""

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from common.files import whole_file
from common.settings import flatten

FLUSH_SECONDS = 30
# The first screen: what one looks at, in this order. Regular expressions of tags.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "At a glance": {
        "video loss": ["Multiline", [r"train/loss_video$", r"validation/loss_video(_ema)?$"]],
        "audio loss": ["Multiline", [r"train/loss_audio$", r"validation/loss_audio(_ema)?$"]],
        "gradient norm": ["Multiline", [r"train/grad_norm"]],
        "seconds of a step": ["Multiline", [r"time/(step|data|compute)_seconds$"]],
        "share of the peak": ["Multiline", [r"throughput/mfu$"]],
    },
    "Validation loss by t": {
        "video": ["Multiline", [r"validation_t/video"]],
        "audio": ["Multiline", [r"validation_t/audio"]],
    },
    "Do they hear each other": {
        "audio looks at video": ["Multiline", [r"health/attention_audio_to_video/"]],
        "video listens to audio": ["Multiline", [r"health/attention_video_to_audio/"]],
    },
    "Do all parts learn": {
        "update / weight": ["Multiline", [r"health/update_ratio"]],
        "activation": ["Multiline", [r"health/activation"]],
    },
}


class Events:
    """The event files of one run; the first error is a warning, counted, and the last write.

    Args:
        first_step: records from here on are dropped from what earlier starts wrote; None: none is.
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        self.errors = 0
        self.writer: SummaryWriter | None = None
        if first_step is not None:
            self._try(lambda: drop_from(folder, first_step))
        self._try(lambda: self._open(folder, first_step))

    def _open(self, folder: Path, first_step: int | None) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=FLUSH_SECONDS)

    def _try(self, action: Callable[[], Any]) -> None:
        """Logging must not stop training: what a full or broken disk raises ends the logging."""
        if self.errors:
            self.errors += 1
            return
        try:
            action()
        except (OSError, RuntimeError, ValueError) as error:
            self.errors += 1
            print(f"warning: TensorBoard is off from here on ({type(error).__name__}: {error}); "
                  "metrics.jsonl and training go on", file=sys.stderr, flush=True)

    def _write(self, step: int, *values: Summary.Value) -> None:
        def write() -> None:
            assert self.writer is not None
            self.writer._get_file_writer().add_summary(Summary(value=values), step)
        self._try(write)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, *(Summary.Value(tag=tag, simple_value=value)
                            for tag, value in values.items()))

    def text(self, step: int, tag: str, values: Any) -> None:
        """A JSON-like value, as a block of text."""
        body = json.dumps(values, indent=1, ensure_ascii=False, default=str)

        def write() -> None:
            assert self.writer is not None
            self.writer.add_text(tag, f"```\n{body}\n```", step)
        self._try(write)

    def picture(self, step: int, tag: str, encoded: bytes) -> None:
        """A PNG, or a GIF, which TensorBoard plays."""
        width, height = Image.open(io.BytesIO(encoded)).size
        image = Summary.Image(height=height, width=width, colorspace=3,
                              encoded_image_string=encoded)
        self._write(step, Summary.Value(tag=tag, image=image))

    def sound(self, step: int, tag: str, wav: bytes, sample_rate: int, samples: int) -> None:
        """A stereo WAV file's bytes."""
        audio = Summary.Audio(sample_rate=sample_rate, num_channels=2, length_frames=samples,
                              encoded_audio_string=wav, content_type="audio/wav")
        self._write(step, Summary.Value(tag=tag, audio=audio))

    def begin(
        self, config: Mapping[str, Any], metrics: list[str], absent: Sequence[str],
    ) -> None:
        """Once in a run's life: the layout, and the settings that the HParams tab compares by.

        Args:
            absent: parts of tags that this run never writes; a chart of such a tag is left out.
        """
        experiment, started, _ = hparams(_plain(config), dict.fromkeys(metrics, 0.0))
        layout = {}
        for title, charts in LAYOUT.items():
            drawn = {name: chart for name, chart in charts.items()
                     if not any(part in chart[1][0] for part in absent)}
            if drawn:
                layout[title] = drawn
        for summary in (custom_scalars(layout), experiment, started):
            self._write(0, *summary.value)

    def end(self, step: int, config: Mapping[str, Any], metrics: list[str]) -> None:
        """The run is done: its row in the HParams tab is final."""
        self._write(step, *hparams(_plain(config), dict.fromkeys(metrics, 0.0))[2].value)

    def close(self) -> None:
        if self.writer is not None:
            self._try(self.writer.close)


def _plain(config: Mapping[str, Any]) -> dict[str, bool | str | float]:
    """{"optimizer.lr": 1e-05, ...}; what is not a number becomes text."""
    return {key: value if isinstance(value, bool | str | int | float) else str(value)
            for key, value in flatten(config).items()}


def drop_from(folder: Path, first_step: int) -> None:
    """Take the records from `first_step` on out of every event file, and a cut last record."""
    for leftover in folder.glob("kept.*"):  # of a kill between writing and replacing
        leftover.unlink()
    for path in sorted(folder.glob("events.out.tfevents.*")):
        kept, dropped = [], 0
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            if event.step < first_step and not event.HasField("session_log"):
                kept.append(raw)
            else:
                dropped += 1
        if len(kept) <= 1:  # the version of the format alone
            path.unlink()
        elif dropped:
            # TensorBoard reads every file with "tfevents" in its name.
            with whole_file(path, "wb", aside=folder / "kept.tmp") as file:
                writer = RecordWriter(file)
                for raw in kept:
                    writer.write(raw)
