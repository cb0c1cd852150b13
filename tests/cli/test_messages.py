"""Every pattern of rexnet_lit.cli.messages, on the message that the real library gives."""

from __future__ import annotations

import datetime
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from cli_tools import fails, write_dataset
from torch.utils.data import DataLoader, Dataset

from rexnet_lit.cli import main
from rexnet_lit.cli.messages import named_key, parser_message, user_message
from rexnet_lit.utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# The parser


def by_class(path, **arguments):
    """A config that gives ``trainer.callbacks`` as a class."""
    return {"trainer": {"callbacks": [{"class_path": path, "init_args": arguments}]}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--data.bogus 1 --data.other=2", "unrecognized arguments: --data.bogus 1"),
        ({"trainer": {"max_epoch": 3}}, "c.yaml: there is no setting 'trainer.max_epoch'; did you mean 'trainer.max_"),
        ("--data.batch_size many", "data.batch_size: expected int, got many"),
        ("--data.image_size big", "data.image_size: expected int, null, got big"),
        ("--data.cache tape", "data.cache: expected one of 'auto', 'none', 'ram', 'disk', got tape"),
        ("--data.augment.transforms x", "data.augment.transforms: expected list[Any], null, got x"),
        ("--data.size_schedule [[0,x]]", "data.size_schedule: expected list[tuple[int, int]], null, got [[0, 'x']]"),
        ("--trainer.logger a-b", "trainer.logger: expected lightning.pytorch.loggers.logger.Logger, "),
        ("--model.image_size 64", "model.image_size is taken from the data; remove it"),
        (by_class("my.Own"), "c.yaml: trainer.callbacks: my.Own: No module named 'my'"),
        (by_class("EarlyStoping"), "c.yaml: trainer.callbacks: there is no class 'EarlyStoping'; did you mean 'Ear"),
        (by_class("mine"), "c.yaml: trainer.callbacks: there is no class 'mine'; give its full path"),
        (by_class("torch.nn.Linear"), "c.yaml: trainer.callbacks: torch.nn.Linear is not a subclass of Callback"),
        (
            by_class("EarlyStopping", monitor="val/loss", patience="x"),
            "c.yaml: trainer.callbacks: lightning.pytorch.callbacks.EarlyStopping: patience: expected int, got x",
        ),
    ],
    ids=str,
)
def test_the_parser(given, expected, capsys, monkeypatch):
    if isinstance(given, dict):
        Path("c.yaml").write_text(yaml.safe_dump(given))
        given = "--config c.yaml"
    assert fails(capsys, "fit", "--data.root", "gone", *given.split()).startswith(expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (by_class("EarlyStopping", monitor="val/loss", mode="foo"), "trainer: `mode` can be"),
        (by_class("Timer", duration="1:0"), "trainer: `Timer(duration='1:0')` is not a valid duration"),
        (
            {"trainer": {"strategy": {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy"}}},
            "trainer: Does not validate",
        ),
    ],
    ids=str,
)
def test_errors_while_the_trainer_is_built(given, expected, capsys, tmp_path):
    Path("c.yaml").write_text(yaml.safe_dump(given))
    root = write_dataset(tmp_path / "data", train=1, val=1)
    argv = ("fit", "--data.root", root, "--model.pretrained", "false", "--data.image_size", 32, "--config", "c.yaml")
    line = fails(capsys, *argv)
    assert line.startswith(expected)
    assert "Given value" not in line


def test_an_unknown_message_of_the_parser_is_one_line():
    assert parser_message("something\n  new") == "something new"
    assert named_key("something new") is None


# Other libraries


def message_of(function, *args, **kwargs):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which it is depends on the library
        function(*args, **kwargs)
    return user_message(caught.value)


class Broken(Dataset):
    """A dataset whose workers fail."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("a.png: wrong")


def test_memory():
    expected = "out of memory; set a smaller data.batch_size or data.image_size"
    assert message_of(torch.empty, 2**60, dtype=torch.uint8) == expected
    assert message_of(np.empty, 2**60, dtype=np.uint8) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu():
    assert message_of(torch.empty, 2**50, dtype=torch.uint8, device="cuda").startswith("out of memory")


def test_loader_workers():
    assert message_of(list, DataLoader(Broken("raises"), num_workers=1)) == "a.png: wrong"
    assert message_of(list, DataLoader(Broken("dies"), num_workers=1)).startswith("a data loading worker died (DataLo")


def test_paths_and_disks(tmp_path):
    assert message_of(open, "a\0b") == "a path contains a null byte"
    assert message_of(open, tmp_path / "gone") == f"[Errno 2] No such file or directory: '{tmp_path / 'gone'}'"
    if Path("/dev/full").exists():
        assert message_of(Path("/dev/full").write_text, "x").startswith("the disk is full")


@pytest.mark.parametrize("content", ["", "raise ImportError('libGL.so.1: cannot open shared object file')"])
def test_a_broken_opencv(content, tmp_path):
    """What is left when one of its two packages was removed, or the one that needs a screen is installed."""
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text(content)
    code = "import sys; sys.path.insert(0, '.'); "
    for run in (
        "from rexnet_lit.cli import main; sys.exit(main.main(['check', '.']))",
        "import rexnet_lit; rexnet_lit.load",
    ):
        done = subprocess.run([sys.executable, "-c", code + run], capture_output=True, text=True, cwd=tmp_path)
        assert "pip install --force-reinstall opencv-python-headless" in done.stderr.splitlines()[-1]
        if "main" in run:
            assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_lightning_refuses_a_setting():
    assert "limit_train_batches" in message_of(pl.Trainer, limit_train_batches=-5, logger=False)


PEER = """
import sys, time, datetime, torch.distributed as dist, torch
from rexnet_lit.cli.messages import user_message
rank, port, fate = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + port, rank=rank, world_size=2)
group = dist.new_group(timeout=datetime.timedelta(seconds=1 if fate == "hangs" else 100))
dist.all_reduce(torch.ones(1))
if rank:
    time.sleep(300 if fate == "hangs" else 0)
    sys.exit()
try:
    dist.all_reduce(torch.ones(1), group=group)
except Exception as error:
    print(user_message(error))
"""


@pytest.mark.parametrize(
    ("fate", "expected"), [("ends", "has ended; its own error"), ("hangs", "has not answered for 1 s")]
)
def test_another_process(fate, expected):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    peers = [
        subprocess.Popen([sys.executable, "-c", PEER, str(rank), port, fate], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    assert re.match(f"another process of this run {expected}", peers[0].communicate(timeout=120)[0])
    peers[1].kill()
    peers[1].communicate()


def test_a_process_that_cannot_be_reached():
    with pytest.raises(RuntimeError) as caught:
        torch.distributed.TCPStore("127.0.0.1", 1, 2, False, timeout=datetime.timedelta(seconds=1))
    assert user_message(caught.value).startswith("another process of this run has ended or cannot be reached")


def test_bugs_have_no_message():
    assert user_message(ZeroDivisionError("x")) is None
    assert user_message(RuntimeError("x")) is None
    assert main.user_message is user_message
