import json
import os
import subprocess
import sys

import pytest

from training.catalog import ROOT
from training.tracking import mode

TINY = [
    *("task=digits", "model=mlp", "technique=mish", "trainer.max_steps=2", "trainer.device=cpu"),
    *("trainer.batch_size=16", "trainer.log_every=1"),
]


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_offline_unless_logged_in(monkeypatch, tmp_path):
    assert mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"


def test_an_offline_run_carries_its_techniques_as_tags(tmp_path):
    """Read back from what W&B itself wrote."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "cli", "run", *TINY, "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / json.loads(done.stdout.splitlines()[-1])["run_dir"]
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    from wandb.proto import wandb_internal_pb2

    tags, logged = [], set()
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        tags = list(record.run.tags) or tags
        for item in record.history.item:
            logged.add(item.key or "/".join(item.nested_key))
    assert "mish" in tags
    assert {"train/loss", "val/loss"} <= logged


def records(content):
    """Records of a LevelDB log after W&B's header of 7 bytes: blocks of 32 KiB, in each of them
    pieces with a checksum (4 bytes), a length (2) and a type (whole, first, middle or last)."""
    at, piece = 7, b""
    while at + 7 <= len(content):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield piece
            piece = b""
