"""After a short run from the shipped towers, validation clips fit their own captions best."""

import json
import sys
from pathlib import Path

import pytest
import torch

from data.loading.loader import DataConfig, ValidationSet
from model import AVFullDiT, AVFullDiTConfig
from model.flow import FlowConfig
from model.objective import VALIDATION_EPOCH, VALIDATION_T, Objective
from tests.support.launch import run
from training.checkpoint.save_load import read_weights

TRAIN, CLIPS, STEPS = 16, 10, 6


@pytest.mark.slow
def test_shuffled_captions_raise_both_losses(tmp_path):
    python = [sys.executable, "-m"]
    run([*python, "playground.world", f"{tmp_path}/clips", "--clips", str(TRAIN),
         "--validation", str(CLIPS), "--seed", "77"])
    run([*python, "data.prepare", f"{tmp_path}/clips/manifest.jsonl", f"{tmp_path}/shards",
         "--wan", "weights/playground/wan", "--tangoflux", "weights/playground/tangoflux",
         "--height", "64", "--width", "96", "--frames", "25", "--video-text-length", "64"])
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 8}')
    run([sys.executable, "train.py", "configs/playground.yaml", f"run_dir={tmp_path}/run",
         f"data.root={tmp_path}/shards", f"deepspeed={tmp_path}/ds.json", f"max_steps={STEPS}",
         "validate_every=null", "save_every=1000"])
    values = json.loads(Path(tmp_path / "run" / "config" / "model.json").read_text())
    model = AVFullDiT(AVFullDiTConfig.from_dict(values))
    model.load_state_dict(read_weights(tmp_path / "run")[1])
    batch = ValidationSet(DataConfig(root=str(tmp_path / "shards"))).batch(list(range(CLIPS)))
    order = torch.arange(CLIPS).roll(CLIPS // 2)
    shuffled = batch._replace(
        video_text=batch.video_text[order], audio_text=batch.audio_text[order],
        audio_text_mask=batch.audio_text_mask[order],
    )
    objective = Objective("t2av", 0, FlowConfig())
    losses = []
    with torch.no_grad():
        for captions in (batch, shuffled):
            totals = torch.zeros(2)
            for value in VALIDATION_T:  # the same t and noise for both: only captions differ
                t = torch.full((CLIPS,), value)
                noised = objective.noise(captions, t, VALIDATION_EPOCH, torch.device("cpu"))
                totals += torch.stack([part.mean() for part in objective.losses(model, noised)])
            losses.append(totals / len(VALIDATION_T))
    right, wrong = losses
    print(f"right captions {right.tolist()}, shuffled {wrong.tolist()}")
    assert wrong[0] > 1.02 * right[0]
    assert wrong[1] > 1.02 * right[1]
