"""Remote shards from a live S3 server on loopback, through streaming's own boto3 path."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
import pytest

from data.loading.node import SHARED_MEMORY
from data.loading.sources import DataConfig, check_data
from data.schema import DataError
from tests.support.inputs.prepared import write_shards
from tests.support.launch import ROOT, environment, records, run
from tests.support.models.tiny import write_tangoflux, write_wan
from tests.support.workers.ranks import Job, read_job

BUCKET, STEPS = "latents", 40
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
               "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server():
    """A moto server process; its address is in the environment, as a user would set it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (CREDENTIALS | {"S3_ENDPOINT_URL": f"http://127.0.0.1:{port}"}).items():
            patch.setenv(key, value)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        client().create_bucket(Bucket=BUCKET)
        yield process
    process.terminate()
    process.wait(30)


def client():
    return boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])


def upload(folder: Path, name: str) -> str:
    """Copy a data set into the bucket -> its address."""
    for path in folder.rglob("*"):
        if path.is_file():
            client().upload_file(str(path), BUCKET, f"{name}/{path.relative_to(folder)}")
    return f"s3://{BUCKET}/{name}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("local") / "shards", 26, 5)


@pytest.fixture(scope="module")
def remote(server, shards):
    return upload(shards, "whole")


def test_remote_batches_equal_local_ones(remote, shards, tmp_path):
    local = read_job(Job(DataConfig(str(shards), num_workers=0), 1, 14), 0)
    for cache in (None, str(tmp_path / "cache")):  # the job's own folder, and one that is named
        config = DataConfig(remote=remote, num_workers=0, cache_dir=cache)
        assert read_job(Job(config, 1, 14), 0) == local
    kept = {path.suffix for path in (tmp_path / "cache").rglob("train/*") if path.is_file()}
    assert kept == {".mds", ".json"}  # compressed copies make room


@pytest.mark.parametrize("policy", ["stop", "substitute"])
@pytest.mark.parametrize("kind", ["bad", "missing", "truncated"])
def test_a_bad_remote_shard(remote, shards, tmp_path, kind, policy):
    address = upload(shards, f"{kind}-{policy}")
    key = f"{kind}-{policy}/train/shard.00001.mds.zstd"
    body = client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
    client().delete_object(Bucket=BUCKET, Key=key)
    if kind != "missing":
        spoiled = body[: len(body) // 2] if kind == "truncated" else body[:-9] + bytes(9)
        client().put_object(Bucket=BUCKET, Key=key, Body=spoiled)
    config = DataConfig(remote=address, num_workers=0, shuffle=False, on_bad_shard=policy,
                        max_substituted_fraction=0.5, download_retries=1,
                        cache_dir=str(tmp_path / "cache"))
    found = read_job(Job(config, 1, 6), 0)
    if policy == "stop":
        assert "shard.00001.mds.zstd: this shard cannot be read" in found["error"]
        assert len(found["batches"]) == 1
    else:
        assert found["error"] is None and len(found["batches"]) == 6
    assert not list((tmp_path / "cache").rglob("train/shard.00001*"))  # never trusted next time


def test_an_address_without_data_is_refused_at_the_start(server):
    config = DataConfig(remote=f"s3://{BUCKET}/nowhere", download_retries=1)
    with pytest.raises(DataError, match="nowhere/dataset.json cannot be fetched.*S3_ENDPOINT_URL"):
        check_data(config, 4)


@pytest.fixture
def short():
    """A TMPDIR of its own with a short name: Python's worker server has a socket in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_killed_run_resumes_with_a_cold_cache_as_if_undisturbed(remote, tmp_path, short):
    write_wan(tmp_path / "wan")
    write_tangoflux(tmp_path / "tangoflux")
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4}))
    (tmp_path / "run.yaml").write_text(f"""
run_dir: {tmp_path}/undisturbed
wan: {tmp_path}/wan
tangoflux: {tmp_path}/tangoflux
model: {{num_joint_blocks: 2}}
data: {{remote: "{remote}", num_workers: 1}}
optimizer: {{lr: 1.0e-3}}
warmup_steps: 3
global_batch_size: 4
max_steps: {STEPS}
validate_every: 1000
validation_samples: 2
save_every: 5
deepspeed: {tmp_path}/ds.json
""")
    command = [sys.executable, "train.py", f"{tmp_path}/run.yaml"]
    private = {"TMPDIR": str(short)}
    run(command, **private)
    assert not list(short.glob("avfulldit-*"))  # the cache went with its job

    killed = [*command, f"run_dir={tmp_path}/killed"]
    process = subprocess.Popen(killed, cwd=ROOT, env=environment() | private,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(6000):
        if list((tmp_path / "killed" / "checkpoints").glob("*/manifest.json")):
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    seen = len(records(tmp_path / "killed", "train/loss"))
    assert 5 <= seen < STEPS
    assert list(short.glob("avfulldit-*"))  # what it had fetched is left behind
    run(killed, **private)
    assert not list(short.glob("avfulldit-*"))
    own = [path for path in SHARED_MEMORY.glob("*_avfulldit")
           if str(short) in path.read_text(encoding="utf-8")]
    assert own == []
    for tag in ("train/loss_video", "train/loss_audio"):
        assert records(tmp_path / "killed", tag) == records(tmp_path / "undisturbed", tag)
