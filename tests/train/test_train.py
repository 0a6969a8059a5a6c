"""train.py as its users start it: equal losses on any engine and world size, resume, bad input.

The shards are random latents in the real schema and the backbones are tiny and random, in the
released layouts; everything else is the real thing, in real processes.
"""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import pytest

import train
from common.ranks import World
from data.schema import load_metadata, save_metadata
from tests.support.inputs.prepared import write_shards
from tests.support.launch import ROOT, records, run, run_ranks, start_ranks
from tests.support.models.tiny import write_tangoflux, write_wan
from training.checkpoint.run_dir import CheckpointError, SaveError
from training.checkpoint.run_lock import lock_run

STEPS, SOME_STEPS, GLOBAL_BATCH = 10, 6, 8
TAGS = ("train/loss_video", "train/loss_audio")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with both backbones, shards, and a config that names them."""
    root = tmp_path_factory.mktemp("train")
    write_wan(root / "wan")
    write_tangoflux(root / "tangoflux")
    write_shards(root / "shards", train=20, validation=3)
    (root / "run.yaml").write_text(f"""
run_dir: {root}/runs/default
wan: {root}/wan
tangoflux: {root}/tangoflux
model: {{num_joint_blocks: 2}}
data: {{root: {root}/shards, num_workers: 0}}
optimizer: {{lr: 1.0e-3}}
warmup_steps: 3
global_batch_size: {GLOBAL_BATCH}
max_steps: {STEPS}
validate_every: null
self_check: false
save_every: 1000
deepspeed: {root}/zero0.json
""")
    for stage in range(4):
        for micro in (2, 4):
            name = f"zero{stage}.json" if micro == 4 else f"zero{stage}_micro2.json"
            (root / name).write_text(json.dumps({
                "train_micro_batch_size_per_gpu": micro,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            }))
    return root


def start(world: Path, processes: int, runs: dict[str, list[str]]) -> None:
    """Several runs of train.run, one after the other in the same processes."""
    spec = [{"config": f"{world}/run.yaml",
             "overrides": [f"run_dir={world}/runs/{name.split(':')[0]}", *overrides]}
            for name, overrides in runs.items()]
    path = world / f"spec{processes}.json"
    path.write_text(json.dumps(spec))
    run_ranks(processes, "tests/support/workers/train_worker.py", str(path))


def use(world: Path, json_name: str, *more: str) -> list[str]:
    return [f"deepspeed={world}/{json_name}", *more]


@pytest.fixture(scope="module")
def runs(world) -> Path:
    """Every engine on two ranks, and one rank with accumulation, at equal global batch."""
    judged, some = "validate_every=3", f"max_steps={SOME_STEPS}"
    start(world, 2, {
        "zero0": use(world, "zero0.json", judged),
        "zero1": use(world, "zero1.json", some),
        "zero2": use(world, "zero2.json", some),
        "zero3": use(world, "zero3.json", some, judged),
        "recompute": use(world, "zero3_micro2.json", "recompute=full", some),
        "t2v": use(world, "zero2.json", "task=t2v", some),
        "resumed:first": use(world, "zero3.json", "max_steps=3"),
        "resumed:second": use(world, "zero3.json", some),
    })
    start(world, 1, {"alone": use(world, "zero2_micro2.json", some, judged),
                     "alone3": use(world, "zero3.json", some)})
    return world / "runs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "recompute", "alone", "alone3"])
def test_same_losses_on_every_engine_and_world_size(runs, name):
    for tag in TAGS:
        expected, got = records(runs / "zero0", tag), records(runs / name, tag)
        assert sorted(got) == list(range(1, SOME_STEPS + 1))
        assert got == pytest.approx({step: expected[step] for step in got}, rel=2e-5)
    assert len(set(expected.values())) == STEPS  # it does train


# Ten steps of these backbones and shards at seed 0: what only moves code leaves them as they are.
GOLDEN = {
    "train/loss_video": [2.344236, 2.351862, 2.278197, 2.230541, 2.137360, 2.141539,
                         2.117451, 2.058642, 1.994265, 2.029031],
    "train/loss_audio": [2.896370, 2.938051, 3.056415, 2.840263, 2.880164, 2.554764,
                         2.861859, 2.484811, 2.526471, 2.527978],
}


@pytest.mark.slow
@pytest.mark.parametrize("tag", TAGS)
def test_losses_are_the_golden_ones(runs, tag):
    """Not to the last bit: another CPU rounds otherwise."""
    got = [loss for _, loss in sorted(records(runs / "zero0", tag).items())]
    assert got == pytest.approx(GOLDEN[tag], rel=2e-5)


def drawn(run_dir: Path) -> list[dict[str, dict]]:
    """Per step: sample id -> what was drawn for it, over all ranks."""
    steps: list[dict[str, dict]] = []
    files = sorted(run_dir.glob("drawn_rank*.jsonl"))
    share = GLOBAL_BATCH // len(files)
    for file in files:
        for index, line in enumerate(file.read_text().splitlines()):
            entry = json.loads(line)
            if index // share == len(steps):
                steps.append({})
            steps[index // share][entry.pop("id")] = entry
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "recompute", "alone", "resumed"])
def test_same_samples_t_and_noise_at_every_step(runs, name):
    expected = drawn(runs / "zero0")
    assert [len(step) for step in expected] == [GLOBAL_BATCH] * STEPS
    assert drawn(runs / name) == expected[:SOME_STEPS]


@pytest.mark.slow
def test_noise_differs_between_samples_and_epochs(runs):
    entries = [entry for step in drawn(runs / "zero0") for entry in step.values()]
    assert len({entry["noisy_video"] for entry in entries}) == len(entries)
    assert len({entry["t"] for entry in entries}) == len(entries)
    assert len({entry["epoch"] for entry in entries}) > 1


@pytest.mark.slow
def test_twin_meets_the_same_video_noise_t_and_captions(runs):
    t2av, t2v = drawn(runs / "zero0")[:SOME_STEPS], drawn(runs / "t2v")
    for left, right in zip(t2av, t2v, strict=True):
        assert left.keys() == right.keys()
        for key in ("t", "noisy_video", "video_text"):
            assert [left[i][key] for i in left] == [right[i][key] for i in left]
        assert all("noisy_audio" not in entry for entry in right.values())
    assert "train/loss_audio" not in (runs / "t2v" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_resume_is_bit_exact_and_records_no_step_twice(runs):
    for tag in TAGS:
        assert records(runs / "resumed", tag) == records(runs / "zero3", tag)
    steps = [json.loads(line)["step"]
             for line in (runs / "resumed" / "metrics.jsonl").read_text().splitlines()
             if "train/loss" in json.loads(line)]
    assert steps == list(range(1, SOME_STEPS + 1))


@pytest.mark.slow
def test_validation_loss_is_the_same_on_any_world_size(runs):
    for tag in ("validation/loss_video", "validation/loss_audio"):
        expected = records(runs / "zero0", tag)
        assert sorted(expected) == [0, 3, 6, 9, STEPS]
        expected = {step: expected[step] for step in (0, 3, 6)}
        assert records(runs / "alone", tag) == pytest.approx(expected, rel=2e-5)
        assert records(runs / "zero3", tag) == pytest.approx(expected, rel=2e-5)


@pytest.mark.slow
def test_run_directory(runs):
    for name in ("run", "data", "model", "deepspeed"):
        assert json.loads((runs / "zero3" / "config" / f"{name}.json").read_text())
    assert list((runs / "zero3" / "tb").glob("events*"))
    tags = [path.name for path in sorted((runs / "resumed" / "checkpoints").glob("step*"))]
    assert tags == ["step00000003", "step00000006"]


@pytest.mark.slow
def test_alone_and_under_the_deepspeed_launcher(world):
    """The bare command, and DeepSpeed's launcher, which sets no LOCAL_WORLD_SIZE."""
    short = [f"{world}/run.yaml", "max_steps=1", f"deepspeed={world}/zero3_micro2.json"]
    done = run([sys.executable, "train.py", *short, f"run_dir={world}/runs/bare",
                "self_check=true"])
    assert "(alone), ZeRO-3" in done.stdout and "attention sdpa" in done.stdout
    assert "\nstitch self-check: deviation from the backbones video " in done.stdout
    done = run([str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "train.py",
                *short, f"run_dir={world}/runs/launcher"], DS_ACCELERATOR="cpu")
    assert "2 ranks (deepspeed launcher)" in done.stdout
    expected = records(world / "runs" / "bare", "train/loss_video")
    assert records(world / "runs" / "launcher", "train/loss_video") == pytest.approx(expected)


SWAPPED = """
import sys, train

def load_swapped(model, *folders, **more):
    load(model, *folders, **more)
    one, other = (model.joint_blocks[index].video.norm2.weight for index in (0, 1))
    one.data, other.data = other.data, one.data

load, train.load_pretrained = train.load_pretrained, load_swapped
train.distributed.leave(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_weights_in_each_others_place_end_the_start(world):
    run_dir = world / "runs" / "swapped"
    command = [sys.executable, "-c", SWAPPED, f"{world}/run.yaml", f"run_dir={run_dir}",
               "self_check=true"]
    done = run(command, check=False)
    assert done.returncode == 78
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert error.startswith("error: stitch self-check failed") and "set self_check=false" in error
    assert not list(run_dir.glob("checkpoints/step*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["flow.shft=1"], "unknown key 'flow.shft'; did you mean 'flow.shift'?"),
        (["flow.shift=-1"], "flow.shift=-1"),
        (["task=tv2a"], "task='tv2a'"),
        (["global_batch_size=7"], "global_batch_size=7 is not divisible by micro batch 4"),
        (["wan=/nowhere"], "wan=/nowhere"),
        (["tangoflux=/nowhere"], "/nowhere"),
        (["data.root=/nowhere"], "/nowhere"),
        (["deepspeed=/nowhere.json"], "no such file"),
        (["model.num_joint_blocks=9"], "num_joint_blocks=9 must be 1 to 3"),
        (["max_steps=-1"], "max_steps=-1 must be at least 1"),
        (["validation_samples=0"], "validation_samples=0 must be at least 1"),
        (["gradient_clipping=-1"], "gradient_clipping=-1 must be at least 0"),
        (["optimizer.lr=-1"], "optimizer.lr=-1 must be above 0"),
        (["global_batch_size=24"], "split 'train' of"),
        (["data.validation_split=test"], "no split 'test'"),
        (["log_every=0"], "log_every=0 must be at least 1"),
        (["keep_checkpoints=1"], "keep_checkpoints=1 must be at least 2"),
        (["wan=weights/playground/wan"], "holds video latents of width 48"),
        (["attention=flash"], "attention='flash' is unknown"),
        (["recompute=some"], "recompute='some'"),
        (["max_steps"], "must be key=value"),
    ],
)
def test_bad_input_is_one_line_and_78(world, capsys, overrides, message):
    status = train.main([f"{world}/run.yaml", *overrides])
    error = capsys.readouterr().err.strip()
    assert status == 78
    assert error.startswith("error: ") and "\n" not in error
    assert message in error


def test_data_of_other_text_encoders_are_refused(world, tmp_path, capsys):
    shutil.copytree(world / "wan", tmp_path / "wan")
    config = tmp_path / "wan" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"text_dim": 40}))
    assert train.main([f"{world}/run.yaml", f"wan={tmp_path}/wan"]) == 78
    assert "holds video text states of width 32" in capsys.readouterr().err


LATE = """
import os, sys, time, train
if os.environ["LOCAL_RANK"] == "0":
    time.sleep(5)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_rank_that_speaks_does_so_when_another_fails_first(world, tmp_path):
    """A launcher, as torchrun, may end all ranks with the first that fails."""
    with open(tmp_path / "said", "w+") as said:
        ranks = start_ranks(2, ["-c", LATE, f"{world}/run.yaml", "log_every=0"], [said] * 4)
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.01)
        for rank in ranks:
            rank.kill()
        assert any([rank.wait() for rank in ranks])
        lines = [line for line in Path(said.name).read_text().splitlines()
                 if line.startswith("error: ")]
    assert len(lines) == 1 and "log_every=0 must be at least 1" in lines[0]


def test_what_only_one_silent_rank_finds_is_said_all_the_same(world, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(train, "SPEAKER_SECONDS", 0.1)
    assert train.main([f"{world}/none.yaml"]) == 78
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "folder"), [("video_vae", "wan"), ("audio_vae", "tangoflux")])
def test_data_of_other_encoders_are_refused(world, tmp_path, capsys, name, folder):
    root = write_shards(tmp_path / "shards", train=8, validation=1)
    metadata = dataclasses.replace(load_metadata(root), fingerprints={name: "0" * 64})
    save_metadata(root, metadata)
    assert train.main([f"{world}/run.yaml", f"data.root={root}"]) == 78
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert f"error: data.root={root}: fingerprints.{name}=000000000000, but {folder}=" in error


def test_a_disk_that_failed_a_save_is_worth_another_start(world, capsys, monkeypatch):
    monkeypatch.setattr(train.distributed, "start", lambda world, minutes: None)
    monkeypatch.setattr(train.faulthandler, "dump_traceback_later", lambda *seconds, exit: None)

    def run(*unused):
        raise SaveError("checkpoint step00000005 was not written")

    monkeypatch.setattr(train, "run", run)
    assert train.main([f"{world}/run.yaml"]) == 1
    assert capsys.readouterr().err.strip().endswith("checkpoint step00000005 was not written")


def test_a_run_directory_that_cannot_be_is_named(world, tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=f"run_dir={place} cannot be written"):
            lock_run(place, World(0, 1, 0, 1, "alone"))
    assert train.main([f"{world}/run.yaml", f"run_dir={tmp_path}/file", "check=true"]) == 78
    assert f"error: run_dir={tmp_path}/file is not a folder" in capsys.readouterr().err


def test_no_arguments_prints_the_usage(capsys):
    assert train.main([]) == 78
    assert "python train.py configs/" in capsys.readouterr().out


def test_shipped_configs_parse():
    from common.settings import load_config

    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = load_config(train.RunConfig, path, [])
        assert (ROOT / config.deepspeed).is_file(), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "t2v"])
def test_sample_writes_a_clip_and_a_sheet(runs, tmp_path, name):
    import av
    from PIL import Image

    (tmp_path / "prompts.jsonl").write_text(json.dumps(
        {"id": "a/b", "video_caption": "a red ball", "audio_caption": "a thud"}) + "\n")
    done = run([sys.executable, "-m", "tools.sample", str(runs / name), "--prompts",
                str(tmp_path / "prompts.jsonl"), "--num-steps", "2"])
    path = runs / name / "samples" / f"step{SOME_STEPS:08d}_sampled" / "a_b.mp4"
    assert str(path) in done.stdout
    with av.open(str(path)) as clip:
        streams = {stream.type: stream for stream in clip.streams}
        assert streams["video"].codec_context.name == "h264"
        assert ("audio" in streams) == (name == "zero3")
        pictures = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    assert len(pictures) == 9 and pictures[0].shape == (64, 64, 3)
    assert Image.open(path.with_suffix(".png")).width == 8 * 64 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "--video-prompt", "x"], "must be a run directory"),
        (["{run}"], "give either --prompts FILE or --video-prompt TEXT"),
        (["{run}", "--prompts", "/nowhere.jsonl"], "no such file"),
        (["{run}", "--video-prompt", "x", "--step", "3"], "step=3 has no checkpoint"),
    ],
)
@pytest.mark.slow
def test_sample_refuses_bad_input(runs, capsys, monkeypatch, arguments, message):
    from tools import sample

    chosen = [argument.format(run=runs / "zero3") for argument in arguments]
    monkeypatch.setattr("sys.argv", ["sample", *chosen])
    assert sample.main() == 78
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_shipped_bf16_engines_train_save_resume_and_are_read(world):
    """zero1, zero2 and zero3 as shipped but for smaller buckets, on two ranks in bf16."""
    from training.checkpoint.save_load import read_weights

    runs = {}
    for name in ("zero1", "zero2", "zero3"):
        values = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        zero = values["zero_optimization"]
        zero |= {key: 100_000 for key in zero if key.endswith("bucket_size")}
        values["train_micro_batch_size_per_gpu"] = 4
        (world / f"bf16_{name}.json").write_text(json.dumps(values))
        overrides = use(world, f"bf16_{name}.json", f"run_dir={world}/runs/bf16_{name}",
                        "validate_every=null")
        runs[f"bf16_{name}:first"] = [*overrides, "max_steps=2"]
        runs[f"bf16_{name}:second"] = [*overrides, "max_steps=3"]
    start(world, 2, runs)
    weights = {}
    for name in ("zero1", "zero2", "zero3"):
        run_dir = world / "runs" / f"bf16_{name}"
        assert sorted(records(run_dir, "train/loss")) == [1, 2, 3]
        step, weights[name] = read_weights(run_dir)
        assert step == 3
    for name in ("zero2", "zero3"):
        assert weights[name].keys() == weights["zero1"].keys()
        for key, value in weights["zero1"].items():
            assert weights[name][key].shape == value.shape
            assert (weights[name][key] - value).abs().max() < 0.02, key
