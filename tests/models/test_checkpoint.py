"""Model files: round trips, atomic writes, and everything that must be refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from rexnet_lit.data.settings import DataRecord, EvalRecipe
from rexnet_lit.models import checkpoint
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.predictor import load
from rexnet_lit.models.spec import FORMAT_VERSION, ModelSpec
from rexnet_lit.utils.errors import Stopped, UserError

SPEC = ModelSpec("rexnet_100", ("ant", "bee"), HeadSpec("mlp", 8), EvalRecipe(64))
RECORD = DataRecord(root="/somewhere", val_fraction=0.3, class_order="natural")
STATE = {
    "weight": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "count": torch.tensor(7),
}


def content(spec: ModelSpec = SPEC, **more: object) -> dict[str, object]:
    record = checkpoint.make_record(spec, RECORD)
    state = {**{f"network.{k}": v for k, v in STATE.items()}, "val_metrics.x": torch.zeros(1)}
    return {checkpoint.KEY: record, "state_dict": state, "epoch": 3, **more}


def refused(call, *args) -> str:
    """The one line with which a call refuses its file."""
    with pytest.raises(UserError) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- round trips ----------------------------------------------------------------------------------


def assert_state(state) -> None:
    assert state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    checkpoint.save_model(path, SPEC, STATE)
    model = checkpoint.load_model(path)
    assert model.spec == SPEC
    assert_state(model.state)
    assert model.data == DataRecord()  # a shared file names nobody's folder
    assert b"somewhere" not in path.read_bytes()
    assert_state(safetensors.torch.load_file(path))  # readable by others


def test_ckpt_round_trip(tmp_path):
    path = tmp_path / "best.ckpt"
    checkpoint.write_ckpt(content(), path)
    model = checkpoint.load_model(path)
    assert (model.spec, model.data) == (SPEC, RECORD)
    assert_state(model.state)  # the network's alone, without Lightning's prefix
    assert checkpoint.read_ckpt(str(path))["epoch"] == 3


def test_a_signal_while_a_file_is_read_is_not_damage(tmp_path, monkeypatch):
    def told(*args, **kwargs):
        raise Stopped(15, "told")

    file = tmp_path / "model.ckpt"
    checkpoint.write_ckpt(content(), file)
    monkeypatch.setattr(torch, "load", told)
    with pytest.raises(Stopped):
        checkpoint.load_model(file)


def test_starting_weights_of_each_kind(tmp_path):
    ours, ckpt, theirs = tmp_path / "a.safetensors", tmp_path / "b.ckpt", tmp_path / "c.safetensors"
    checkpoint.save_model(ours, SPEC, STATE)
    checkpoint.write_ckpt(content(), ckpt)
    safetensors.torch.save_file({k: v.contiguous() for k, v in STATE.items()}, theirs)
    for path, spec in ((ours, SPEC), (ckpt, SPEC), (theirs, None)):
        state, found = checkpoint.load_starting_weights(str(path))
        assert_state(state)
        assert found == spec


def test_a_shared_model_in_its_run_folder_finds_its_dataset(tmp_path):
    model, last = tmp_path / "model.safetensors", tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.save_model(model, SPEC, STATE)
    assert checkpoint.load_model(model).data == DataRecord()
    record = DataRecord(root="/pictures", val_fraction=0.3)
    checkpoint.write_ckpt({checkpoint.KEY: checkpoint.make_record(SPEC, record)}, last)
    assert checkpoint.load_model(model).data == record
    last.write_bytes(b"damaged")
    assert checkpoint.load_model(model).data == DataRecord()


# --- atomic writes --------------------------------------------------------------------------------


def test_what_cannot_be_pickled_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.write_ckpt(content(), path)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        checkpoint.write_ckpt(content(bad=lambda: None), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


# --- refusals -------------------------------------------------------------------------------------


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_the_payload_is_live(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))  # noqa: S301
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("where", ["beside", "state", "record"])
@pytest.mark.parametrize(
    "read", [checkpoint.load_model, checkpoint.load_starting_weights, lambda p: checkpoint.read_ckpt(str(p))]
)
def test_a_pickle_is_refused_and_does_not_run(tmp_path, where, read):
    evil = content()
    payload = Payload(tmp_path / "canary")
    if where == "beside":
        evil["hyper_parameters"] = payload
    elif where == "state":
        evil["state_dict"]["network.weight"] = payload  # type: ignore[index]
    else:
        evil[checkpoint.KEY]["spec"] = payload  # type: ignore[index]
    torch.save(evil, tmp_path / "evil.ckpt")
    assert "could run code" in refused(read, str(tmp_path / "evil.ckpt"))
    assert not (tmp_path / "canary").exists()


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path):
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Payload(tmp_path / "canary"), protocol=2))
    refused(checkpoint.load_model, tmp_path / "evil.ckpt")
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "canary"), protocol=2))
    refused(checkpoint.load_model, tmp_path / "evil.safetensors")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.ckpt", "https://x.org/a.safetensors", "s3://b/a.ckpt"])
def test_addresses_are_refused_without_asking_them(url, no_network):
    for read in (checkpoint.load_model, checkpoint.read_ckpt, checkpoint.load_starting_weights):
        assert "local files only" in refused(read, url)
    assert not no_network


@pytest.mark.parametrize("path", ["no.ckpt", "no.safetensors", "no/folder/a.ckpt"])
def test_missing_files_name_the_key(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(checkpoint.load_model, path) == f"ckpt_path: there is no file {path!r}"
    assert refused(checkpoint.load_starting_weights, path) == f"model.weights: there is no file {path!r}"
    assert "ckpt_path: '.' is a folder; name a model file" in refused(checkpoint.load_model, ".")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_truncated_files(tmp_path, suffix, share):
    path = tmp_path / f"model.{suffix}"
    checkpoint.write_ckpt(content(), path) if suffix == "ckpt" else checkpoint.save_model(path, SPEC, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(1, int(len(whole) * share))])
    assert f"{path}: damaged or not a" in refused(checkpoint.load_model, path)


def test_a_flipped_byte_of_a_shared_file(tmp_path):
    """In the description, the names or the weights: what safetensors itself would load in silence."""
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, SPEC, STATE)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            model = checkpoint.load_model(path)
        except UserError:
            continue
        else:  # what it hit says nothing of the model, such as the name of the checksum
            assert model.spec == SPEC
            assert_state(model.state)


HOSTILE = (
    "!!python/object/apply:os.mkdir [canary]",
    "os.mkdir('canary')",
    "__import__('os').mkdir('canary')",
    "{{ ().__class__.__base__.__subclasses__() }}",
    '{"class_path": "os.mkdir", "init_args": {"path": "canary"}}',
    "$(mkdir canary)",
    "`mkdir canary`",
    "; mkdir canary;",
    "../../canary",
    "https://127.0.0.1:1/canary",
    "\x1b]8;;file:///canary\x07",
)


def test_s1_s4_s9_nothing_in_a_model_file_runs(tmp_path, monkeypatch, no_network):
    """As class names, description, metadata or hyper-parameters: canaries stay names, or are refused."""
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    spec = dataclasses.replace(SPEC, class_names=HOSTILE)
    checkpoint.save_model("named.safetensors", spec, STATE)
    assert checkpoint.load_model("named.safetensors").spec.class_names == HOSTILE
    state = {name: tensor.contiguous() for name, tensor in STATE.items()}
    for number, hostile in enumerate(HOSTILE):
        metadata = {checkpoint.KEY: SPEC.to_json(), "format": hostile, hostile: hostile, "__pickle__": hostile}
        safetensors.torch.save_file(state, f"{number}.safetensors", metadata)
        assert checkpoint.load_model(f"{number}.safetensors").spec == SPEC
        safetensors.torch.save_file(state, "described.safetensors", {checkpoint.KEY: hostile})
        refused(checkpoint.load_model, "described.safetensors")
        described = json.dumps({**json.loads(SPEC.to_json()), "backbone": hostile})
        safetensors.torch.save_file(state, "backbone.safetensors", {checkpoint.KEY: described})
        refused(load, "backbone.safetensors")
        hyper = {"_class_path": hostile, "_instantiator": hostile, "class_path": "os.mkdir", "path": "canary"}
        more = {"hyper_parameters": hyper, "hparams_name": hostile, "datamodule_hyper_parameters": hyper}
        torch.save({**content(), **more}, "hyper.ckpt")
        assert checkpoint.load_model("hyper.ckpt").spec == SPEC
    assert not list(tmp_path.rglob("canary*"))
    assert not no_network


def png() -> bytes:
    import io

    Image.new("RGB", (9, 9), "red").save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


GARBAGE = {"empty": b"", "text": b"hello\n" * 99, "json": b'{"a": 1}', "zeros": bytes(999), "picture": png()}


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(suffix, kind) for suffix in ("ckpt", "safetensors") for kind in GARBAGE],
)
def test_garbage(tmp_path, suffix, kind):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(GARBAGE[kind])
    assert f"{path}: damaged or not a" in refused(checkpoint.load_model, path)


@pytest.mark.parametrize(
    "what",
    [
        [1, 2],
        {},
        {"state_dict": {}, "pytorch-lightning_version": "2.6.6"},  # another program's
        {checkpoint.KEY: 5, "state_dict": {}},
        {checkpoint.KEY: {"spec": "{}", "data": "{}"}, "state_dict": {}},
        {checkpoint.KEY: {"spec": SPEC.to_json(), "data": '{"surprise": 1}'}, "state_dict": {}},
        {checkpoint.KEY: {"spec": SPEC.to_json(), "data": "["}, "state_dict": {}},
        {checkpoint.KEY: {"spec": SPEC.to_json(), "data": "[" * 100_000}, "state_dict": {}},
        {checkpoint.KEY: checkpoint.make_record(SPEC, RECORD)},
        {checkpoint.KEY: checkpoint.make_record(SPEC, RECORD), "state_dict": 5},
        {checkpoint.KEY: checkpoint.make_record(SPEC, RECORD), "state_dict": {5: torch.zeros(1)}},
        {checkpoint.KEY: checkpoint.make_record(SPEC, RECORD), "state_dict": {"network.a": "text"}},
    ],
    ids=range(12),
)
def test_checkpoints_that_are_not_ours(tmp_path, what):
    torch.save(what, tmp_path / "a.ckpt")
    assert str(tmp_path / "a.ckpt") in refused(checkpoint.load_model, tmp_path / "a.ckpt")


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_newer_format(tmp_path, suffix):
    newer = json.dumps({**json.loads(SPEC.to_json()), "format_version": FORMAT_VERSION + 1, "news": True})
    path = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({**content(), checkpoint.KEY: {"spec": newer, "data": "{}"}}, path)
    else:
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, {checkpoint.KEY: newer})
    for read in (checkpoint.load_model, checkpoint.load_starting_weights):
        assert f"{path}: model format {FORMAT_VERSION + 1} is newer" in refused(read, str(path))


def test_foreign_safetensors_are_for_starting_from_only(tmp_path):
    path = tmp_path / "timm.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"stem.conv.weight": torch.zeros(1)}, path, metadata)
        assert "use fit with model.weights" in refused(checkpoint.load_model, path)
        assert checkpoint.load_starting_weights(str(path))[1] is None


def test_a_file_that_may_not_be_read(tmp_path):
    if sys.platform == "win32" or os.geteuid() == 0:
        pytest.skip("needs a user whom permissions bind")
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, SPEC, STATE)
    path.chmod(0)
    assert "may not be read" in refused(checkpoint.load_model, path)
