"""Every scalar that a run writes, and what it means: stable names, the table of docs/monitoring.md.

A tag stays what it is from one version to the next. `{...}` stands for a part of the model, a t or
a layer. Values come from StepAccumulator (`record`, `health_record`), Straggler, evaluation.run_log
and evaluation.evaluator. docs/tables.py writes the page; test_evaluator compares this with
what a run writes.
"""

import re

SCALARS = {
    "train/loss": "weighted sum of the two losses: what is minimised",
    "train/loss_video": "mean over the log period and all ranks, unweighted",
    "train/loss_audio": "the same over samples with sound; absent where none has",
    "train/loss_video_weighted": "its share of train/loss",
    "train/loss_audio_weighted": "its share of train/loss",
    "train/grad_norm": "L2 norm of this update's gradient, before clipping",
    "train/grad_norm_{part}": "of the video tower, the audio tower, the joint blocks' new weights",
    "train/clipped": "1 if this update's gradient was clipped",
    "train/skipped": "updates skipped since the last record (events.jsonl says why)",
    "train/lr": "learning rate; the highest of the parameter groups",
    "train/samples_seen": "since step 0",
    "train/epoch": "pass over the training split, from 0",
    "time/step_seconds": "per step, without checkpoint, validation, samples",
    "time/data_seconds": "of it, waiting for the loader; median over ranks",
    "time/compute_seconds": "of it, the rest: rank 0's, less its own wait for the loader",
    "time/data_seconds_slowest": "on the rank that waited longest",
    "time/forward_seconds": "a rank's own forward passes; median over ranks",
    "time/forward_seconds_slowest": "on the slowest rank",
    "time/data_slowest_rank": "which rank that was",
    "time/forward_slowest_rank": "which rank that was",
    "time/checkpoint_seconds": "since the last record, in total",
    "time/validation_seconds": "the same; validation losses and everything under health/",
    "time/sampling_seconds": "since the last record, in total",
    "throughput/samples_per_second": "over all ranks",
    "throughput/video_tokens_per_second": "over all ranks",
    "throughput/audio_tokens_per_second": "over all ranks; 0 in t2v",
    "throughput/text_tokens_per_second": "caption rows computed, over all ranks",
    "throughput/tflops": "per device: model FLOPs, exact, recomputation not counted",
    "throughput/mfu": "of the device's dense bf16 peak (named at the start; `peak_tflops`)",
    "memory/peak_gib": "device memory in use at most, rank 0's since its start; 0 on a CPU",
    "memory/reserved_gib": "the same, held by torch",
    "memory/host_rss_gib": "resident memory of rank 0",
    "health/update_ratio_{part}": "size of the last update against that of the weights",
    "health/activation_{part}": "RMS of a part's last tokens on validation samples at t = 0.5",
    "health/attention_audio_to_video/{layer}":
        "share of audio's attention that lies on video; not in `fusion: cross`",
    "health/attention_video_to_audio/{layer}": "share of video's attention that lies on audio",
    "health/loss_video_t/{t}": "training loss of draws of t in this eighth since the last record",
    "health/loss_audio_t/{t}": "the same; by the video's t",
    "validation/loss_{modality}": "validation loss: mean over samples and 8 fixed t",
    "validation/stderr_{modality}": "its standard error over samples",
    "validation_t/{modality}/{t}": "validation loss at one t",
}


def described(tag: str) -> str | None:
    """The name under which a tag is documented; None if it is not."""
    for name in SCALARS:
        pattern = re.sub(r"\\\{\w+\\\}", r"[\\w.]+", re.escape(name))
        if re.fullmatch(pattern, tag):
            return name
    return None
