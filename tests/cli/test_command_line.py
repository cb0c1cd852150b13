"""The command line before anything runs: configs by name, short forms, help, wrong names, completion; and the wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from cli_tools import fails, lively_model, write_dataset
from jsonargparse import Namespace

from rexnet_lit.cli import main, settings_parser, shipped_configs
from rexnet_lit.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
RUNS = ("fit", "validate", "test", "predict")

# Lightning 2.6.6's own calls of what jsonargparse 4.49 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def printed(capsys, *argv):
    """What a command prints."""
    assert main.main([str(a) for a in argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def settings(capsys, *argv):
    """The settings of a fit."""
    return yaml.safe_load(printed(capsys, "fit", *argv, "--print_config"))


# Configs


def test_own_parts_are_mappings_of_a_class(capsys):
    """In a file, and as an option; beside the settings of an earlier config, or without any."""
    own = {
        "loss": {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.2}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02}},
        "schedule": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 10}},
    }
    Path("own.yaml").write_text(yaml.safe_dump({"model": own}))
    options = [f"--model.{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in own.items()]
    apart = [word for option in options for word in option.split("=", 1)]
    for argv in (["--config", "own.yaml"], ["--config", "finetune", "--config", "own.yaml"], options, apart):
        found = settings(capsys, *argv)["model"]
        for key, value in own.items():
            assert {name: found[key][name] for name in value} == value


def test_configs_by_name(capsys):
    whole = settings(capsys, "--config", ROOT / "configs" / "quickstart.yaml")
    assert whole["trainer"]["max_epochs"] == 8
    for name in ("quickstart", "quickstart.yaml"):
        assert settings(capsys, "--config", name) == whole
    for name in ("hardware/ddp", "hardware/ddp.yaml"):
        assert settings(capsys, "-c", "quickstart", "--config", name)["trainer"]["strategy"] == "ddp"
    Path("quickstart").mkdir()  # no file
    Path("quickstart.yaml").write_text("trainer: {max_epochs: 3}\n")
    assert settings(capsys, "--config", "quickstart") == whole
    assert settings(capsys, "--config", "quickstart.yaml")["trainer"]["max_epochs"] == 3


@pytest.mark.parametrize(
    ("name", "meant"),
    [("finetun", "'finetune'"), ("ddp", "'hardware/ddp'"), ("configs/finetune.yaml", "'finetune'"), ("hardware", "")],
)
def test_an_unknown_config(name, meant, capsys):
    for argv in (("fit", "--config", name), ("check", ".", "--config", name), ("configs", name)):
        line = fails(capsys, *argv)
        assert repr(name) in line
        assert meant in line
    assert "linear_probe, " in fails(capsys, "fit", "--config", "nothing-like-it")


def test_configs_are_listed_and_printed(capsys):
    rows = dict(line.split(maxsplit=1) for line in printed(capsys, "configs").splitlines())
    files = {file.relative_to(ROOT / "configs").with_suffix("").as_posix() for file in ROOT.glob("configs/**/*.yaml")}
    assert set(rows) == files
    assert rows["hardware/cpu"].startswith("Overlay: the CPU")
    assert printed(capsys, "configs", "finetune.yaml") == (ROOT / "configs" / "finetune.yaml").read_text()


@pytest.mark.parametrize("given", [(), ("--config", "hardware/cpu")], ids=len)
def test_a_fit_starts_from_finetune(given, capsys, tmp_path):
    found = settings(capsys, *given)
    assert found["model"]["strategy"]["blend"] is True  # false by default
    assert found["trainer"]["accelerator"] == ("cpu" if given else "auto")
    argv = ["fit", str(write_dataset(tmp_path / "data", train=1, val=1)), *given, "--trainer.max_epochs=0"]
    assert main.main([*argv, "--model.pretrained=false", "--data.image_size=32"]) == 2
    assert "shipped config finetune" in capsys.readouterr().out


def test_a_config_of_ones_own_replaces_finetune(capsys):
    Path("mine.yaml").write_text("data: {batch_size: 4}\n")
    assert settings(capsys, "--config", "mine.yaml")["model"]["strategy"]["blend"] is False
    assert settings(capsys, "--config", "finetune", "--config", "mine.yaml")["model"]["strategy"]["blend"] is True


def test_check_takes_a_config_by_name(tmp_path, capsys):
    root = write_dataset(tmp_path / "data", train=1, val=1)
    printed(capsys, "check", root, "--config", "finetune", "--json")


# Short forms


def test_short_forms(capsys, tmp_path):
    assert settings(capsys, "DIR")["data"]["root"] == "DIR"
    assert settings(capsys, "--trainer.max_epochs", 3, "DIR", "--config=quickstart")["data"]["root"] == "DIR"
    assert settings(capsys, "--seed_everything", 7)["data"]["root"] is None  # an option's value
    model = lively_model(tmp_path / "model.safetensors", size=32)
    root = write_dataset(tmp_path / "data", val=1, test=1, train=1)
    quick = ("--data.num_workers", 0, "--trainer.accelerator", "cpu")
    assert "Validation: 3 images" in printed(capsys, "validate", model, root, *quick)
    assert "Test: 3 images" in printed(capsys, "test", *quick, model, root)
    assert "predictions.csv (27" not in printed(capsys, "predict", model, root / "test", *quick)
    assert len(Path("predictions.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("fit a b", "unexpected argument 'b'"),
        ("test m d e", "unexpected argument 'e'"),
        ("fit a --data.root b", "DIR is given twice, as 'a' and by --data.root"),
        ("test m --ckpt_path=m", "MODEL is given twice"),
        ("predict m p --data.predict_path p", "PATH is given twice"),
        ("predict pics", "predict MODEL PATH"),
        ("predict", "--ckpt_path"),
    ],
)
def test_wrong_short_forms(argv, words, capsys):
    assert words in fails(capsys, *argv.split())


# Wrong names


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        ("train DIR", "'fit'"),
        ("eval MODEL", "'validate' or 'test'"),
        ("evaluate", "'validate' or 'test'"),
        ("fit --data DIR", "'data.root'"),
        ("fit DIR --batch-size 16", "'data.batch_size'"),
        ("fit DIR --data.batch-size 16", "'data.batch_size'"),
        ("fit DIR --model rexnet_150", "'model.backbone'"),
        ("predict MODEL pics --output FILE", "'data.predict_output'"),
        ("test --weights FILE", "'ckpt_path'?"),
        ("test --model FILE", "'ckpt_path'?"),
        ("check --js", "'json'"),
        ("check DIR --jsn", "'json'"),
        ("export MODEL --out FILE", "'output'"),
        ("--vers", "'--vers'"),
    ],
)
def test_a_wrong_name_is_an_error_that_names_the_right_one(argv, key, capsys):
    assert key in fails(capsys, *argv.split())


WRONG_OPTIONS = {
    "--model.lr 0.1": "'model.optimizer.lr'",
    "--lr 0.1": "'model.optimizer.lr'",
    "--epochs=5": "'trainer.max_epochs'",
    "--max_epochs 5": "'trainer.max_epochs'",
    "--root DIR": "'data.root'",
    "--folder DIR": "'data.root'",
    "--batch_size 16": "'data.batch_size'",
    "--data.batch_siz 4": "'data.batch_size'",
    "--image_size 64": "'data.image_size'?",
    "--img 64": "'data.image_size'",
    "--backbone rexnet_150": "'model.backbone'",
    "--gpus 1": "'trainer.devices'",
    "--device cuda": "'trainer.accelerator'",
    "--workers 2": "'data.num_workers'",
    "--num_workers 2": "'data.num_workers'",
    "--seed 1": "'seed_everything'",
    "--output DIR": "'trainer.default_root_dir'?",
    "--weights FILE": "'model.weights'?",
    "--checkpoint FILE": "'ckpt_path'",
    "--ckpt FILE": "'ckpt_path'",
    "--conf FILE": "'config'",
    "--resume": "'ckpt_path last'",
    "--amp": "'trainer.precision ",
    "--data.augment.help": "'help_all'",
    "--help_al": "'help_all'",
}


@pytest.mark.parametrize("start", [0, 1])  # one error has at most 20 lines
def test_wrong_options_of_a_fit(start, capsys):
    given = list(WRONG_OPTIONS)[start::2]
    said = fails(capsys, "fit", "DIR", *" ".join(given).split()).split("; unrecognized arguments: ")
    for line, option in zip(said, given, strict=True):
        assert line.removeprefix("unrecognized arguments: ").startswith(f"{option}; did you mean ")
        assert WRONG_OPTIONS[option] in line


def test_settings_of_other_runs(capsys):
    """A config may be shared, so they are taken, but an option without an effect is said so."""
    options = ["--data.root=d", "--data.strangers=s", "--data.augment.name=none", "--trainer.max_epochs", "3"]
    config = Namespace()
    assert list(settings_parser.unused(options, "fit", config)) == [
        "--data.strangers has no effect in fit; it is for test"
    ]
    assert list(settings_parser.unused(options, "test", config)) == [
        "--data.augment.name has no effect in test; it is for fit",
        "--trainer.max_epochs has no effect in test; it is for fit",
    ]
    assert [line.split()[0] for line in settings_parser.unused(options, "predict", config)] == [
        *("--data.root", "--data.strangers", "--data.augment.name", "--trainer.max_epochs"),
    ]
    assert fails(capsys, "test", "m.ckpt", "--model.loss", "focal").startswith("model.loss.name is for fit")


@pytest.mark.parametrize(
    ("key", "chooser", "unused", "used"),
    [
        ("model.strategy.frozen", "model.strategy.name", "full", "partial"),
        ("model.loss.gamma", "model.loss.name", "cross_entropy", "focal"),
        ("model.schedule.gamma", "model.schedule.name", "cosine", "plateau"),
        ("model.schedule.warmup_epochs", "model.schedule.name", "one_cycle", "step"),
        ("model.head.hidden", "model.head.name", "linear", "mlp"),
        ("data.augment.num_ops", "data.augment.name", "light", "randaugment"),
        ("data.cache_gb", "data.cache", "none", "disk"),
    ],
)
def test_a_setting_of_another_choice(key, chooser, unused, used):
    options = [f"--{key}", "3", "--data.root=d"]
    (line,) = settings_parser.unused(options, "fit", Namespace({chooser: unused}))
    assert line.startswith(f"--{key} has no effect with --{chooser} {unused}; it is for ")
    assert not list(settings_parser.unused(options, "fit", Namespace({chooser: used})))


def test_a_setting_beside_an_own_class():
    options = ["--model.schedule.class_path=mine.Own", "--model.schedule.warmup_epochs", "3"]
    config = Namespace({"model.schedule.class_path": "mine.Own", "model.schedule.name": "constant"})
    assert list(settings_parser.unused(options, "fit", config)) == [
        "--model.schedule.warmup_epochs has no effect with --model.schedule.class_path; give its arguments in init_args"
    ]


def test_what_the_data_decides_in_a_config(capsys):
    Path("mine.yaml").write_text("model: {num_classes: 3, image_size: 64, crop_mode: null}\ntrainer: {epochs: 3}\n")
    line = fails(capsys, "fit", "DIR", "--config", "mine.yaml")
    assert "mine.yaml: model.num_classes is taken from the data; remove it; " in line
    assert "mine.yaml: model.image_size is taken from the data; remove it; " in line
    assert "crop_mode" not in line
    assert "trainer.epochs" in line


def test_a_wrong_key_in_a_config(capsys):
    Path("mine.yaml").write_text("lr: 0.1\ntrainer: {epochs: 3}\n")
    line = fails(capsys, "fit", "DIR", "--config", "mine.yaml")
    assert "'model.optimizer.lr'" in line
    assert "'trainer.max_epochs'" in line


def test_synonyms_stand_for_what_exists(capsys):
    from rexnet_lit.cli.suggestions import _SYNONYMS

    known = printed(capsys, "fit", "--help_all") + printed(capsys, "predict", "--help_all")
    meant = {key.partition(" ")[0] for keys in _SYNONYMS.values() for key in keys}
    assert [key for key in meant - set(COMMANDS) if not re.search(rf"--{key}\b", known)] == []


# Help


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", RUNS)
def test_help_is_short(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = printed(capsys, command, "--help")
    assert out.startswith(f"usage: rexnet-lit {command} ")
    assert "--help_all" in out
    lines = out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= columns
    full = printed(capsys, command, "--help_all")
    assert len(full.splitlines()) > 300
    keys = re.findall(r"^  --(\S+)", out, re.MULTILINE)
    assert 8 <= len(keys) <= 30
    assert [key for key in keys if f"--{key} " not in full] == []


def test_help_shows_registries_and_the_values_of_finetune(capsys, monkeypatch):
    from rexnet_lit.training.freezing import STRATEGIES

    monkeypatch.setenv("COLUMNS", "120")
    out = " ".join(printed(capsys, "fit", "-h").split())
    assert f"{', '.join(STRATEGIES)} [full]" in out
    finetune = yaml.safe_load((ROOT / "configs" / "finetune.yaml").read_text())
    assert f"own by default [{finetune['data']['image_size']}]" in out  # null without a config
    assert "Lightning" not in out


def test_help_of_a_class(capsys):
    assert "--trainer.logger.save_dir" in printed(capsys, "fit", "--trainer.logger.help", "CSVLogger")


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts_know_the_settings(shell, capsys):
    pytest.importorskip("shtab")
    out = printed(capsys, "completion", shell)
    for word in ("fit", "configs", "trainer.max_epochs", "model.head.name", "cosine", "onnx-int8"):
        assert word in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(capsys):
    pytest.importorskip("shtab")
    Path("script").write_text(printed(capsys, "completion", "bash"))
    words = "COMP_WORDS=(rexnet-lit fit --model.head.name ''); COMP_CWORD=3"
    run = f'source ./script; {words}; _shtab_rexnet_lit rexnet-lit "" --model.head.name; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["linear", "mlp", "cosine"], done.stderr


def test_completion_names_its_extra(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "rexnet-lit[completion]" in fails(capsys, "completion", "bash")


# The wheel


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A wheel and an sdist of a copy of the sources, built without a network."""
    pytest.importorskip("setuptools")
    base = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("rexnet_lit", "configs"):
        shutil.copytree(ROOT / name, base / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, base)
    build = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    (base / "dist").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=base, check=True, capture_output=True, timeout=120)
    (wheel,), (sdist,) = base.glob("dist/*.whl"), base.glob("dist/*.tar.gz")
    return wheel, sdist


def test_the_wheel_and_the_sdist_hold_everything(archives):
    files = [*ROOT.glob("configs/**/*.yaml"), *(ROOT / "rexnet_lit").rglob("*.*")]
    files = {file.relative_to(ROOT).as_posix() for file in files if "__pycache__" not in file.parts}
    assert "configs/hardware/ddp.yaml" in files
    with zipfile.ZipFile(archives[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {re.sub("^configs/", "rexnet_lit/configs/", file) for file in files}
    with tarfile.open(archives[1]) as sdist:
        assert {f"{sdist.getnames()[0]}/{file}" for file in files} <= set(sdist.getnames())


def test_configs_of_an_installed_package(archives, tmp_path, monkeypatch):
    shutil.unpack_archive(archives[0], tmp_path / "installed", "zip")
    monkeypatch.setattr(shipped_configs, "__file__", str(tmp_path / "installed/rexnet_lit/cli/shipped_configs.py"))
    assert shipped_configs.folder() == tmp_path / "installed" / "rexnet_lit" / "configs"
    assert {"finetune", "hardware/ddp"} <= shipped_configs.shipped().keys()


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(archives, tmp_path):
    """In a fresh environment that borrows this one's packages, from the sample to the export."""
    subprocess.run([sys.executable, "-m", "venv", "env"], cwd=tmp_path, check=True, timeout=120)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    import torch

    pip = [tmp_path / "env" / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", archives[0]]
    subprocess.run(pip, check=True, timeout=120)
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    work = tmp_path / "work"
    work.mkdir()
    short = "--model.pretrained false --trainer.max_epochs 1 --data.image_size 32 --trainer.limit_train_batches 4"
    short += " --data.num_workers 0 --model.strategy.blend false --trainer.accelerator cpu"
    model = "lightning_logs/version_0/model.safetensors"
    for line in (
        "sample digits",
        f"fit digits {short}",
        f"fit digits --config finetune --config hardware/cpu.yaml {short}",
        f"test {model}",
        f"predict {model} digits/test/7",
        f"export {model} --format safetensors --output out.safetensors",
        "check digits --config finetune --report check.html",
    ):
        command = [str(tmp_path / "env" / "bin" / "rexnet-lit"), *line.split()]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
