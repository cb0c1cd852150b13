"""README.md and docs/: every command and Python block runs, every setting, link and file exists.

Blocks marked ``sh`` are run line by line, in order, in one folder per page. Of blocks marked ``bash``, which hold loops
and job scripts, the commands are parsed; blocks marked ``yaml`` are used as configs. Fits are shortened and start from
random weights; what they learn is tested elsewhere.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import draw_shape
from PIL import Image

from rexnet_lit.cli import main
from rexnet_lit.models import checkpoint, rexnet
from rexnet_lit.models.spec import ModelSpec

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rexnet_lit"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 150

# What is not run here, and why. Commands of rexnet_lit are still parsed (`--print_config`).
NOT_RUN = {
    "hardware/gpu_amp": "needs a GPU",
    "hardware/ddp": "needs a GPU, or starts a second process; tests/cli does that",
    "hardware/multinode": "needs several machines",
    "--data.fixes": "tests/cli does that",
    "--model.teacher": "tests/training trains with one",
    "--model.backbone rexnet_2": "larger networks take longer; tests/models builds them all",
    "--find_lr true": "trains a hundred steps; tests/cli does that",
    "--model.backbone rexnet_1": "larger networks take longer; tests/models builds them all",
    "fit DIR --data.labels": "tests/cli trains with a table",
    "rexnet_lit crossval": "tests/search runs it",
    "rexnet_lit tune": "tests/search runs it",
    "s3://": "needs object storage; tests/data reads from a URL",
    "--data.image_size 288": "large images take longer",
    "--model.loss": "tests/training trains with every loss",
}
SKIPPED = {
    "pip install": "installs packages",
    "--labels --report": "needs the published weights",
    "--format torch": "tests/export writes it; that the format exists is checked",
    "--format hub": "the same",
    "--format openvino": "the same",
    "--format onnx-int8": "the same",
    "rexnet_lit compare": "tests/report runs it",
    "rexnet_lit completion": "tests/cli runs it",
    "rexnet_lit demo": "it runs until Ctrl-C; tests/cli runs it",
    "rexnet_lit plan": "takes a minute; tests/search runs it",
    "rexnet_lit models": "builds all networks; tests/cli runs it",
    "make ": "installs packages, and calls the commands that are run here; that the target exists is checked",
    "tests/benchmarks/": "takes long or needs other tools; that the script has these options is checked",
}
SHORT = (
    "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu", "--data.num_workers=0",
    "--model.strategy.blend=false",
)  # fmt: skip


# Lightning 2.6.6's own calls of what jsonargparse 4.49 calls deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.usefixtures("quick_runs"),
]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The lines of the shell blocks, without comments."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in (line.partition(" #")[0].strip() for line in lines) if line]


def ids(page: Path) -> str:
    return page.stem


def write_photos(root: Path) -> None:
    """Class folders of images of five patients each, for every split, fold and group."""
    for kind, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(15):
            pixels = draw_shape(kind, np.random.default_rng((kind, i)))
            Image.fromarray(pixels).save(root / name / f"patient{i // 3}_{i}.png")


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """A folder with what the pages mention: a dataset, its table, a photo, weights to start from, a model."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "DIR")
    images = sorted((tmp_path / "DIR").rglob("*.png"))
    rows = [f"{image.relative_to(tmp_path / 'DIR')},{image.parent.name}\n" for image in images]
    (tmp_path / "train.csv").write_text("path,label\n" + "".join(rows))
    write_photos(tmp_path / "NEW_IMAGES")
    for name in ("photo.jpg", "other.jpg"):
        Image.fromarray(draw_shape(0, np.random.default_rng(0), 80)).save(name)
    spec = ModelSpec("rexnet_100", ("cat", "horse"))
    checkpoint.save_model(tmp_path / "FILE.safetensors", spec, rexnet.build_network("rexnet_100", 2).state_dict())
    (tmp_path / "fixes.csv").write_text("path,action,label\ncat/patient0_0.png,relabel,dog\n")
    for page in PAGES:
        for text in blocks(page, "yaml"):
            (tmp_path / "medical.yaml").write_text(text)
    return tmp_path


def reason_not_to_run(command: str, reasons: dict[str, str]) -> str | None:
    return next((reason for part, reason in reasons.items() if part in command), None)


def short_form(argv: list[str], epochs: int) -> list[str]:
    """The same fit, but short, on small images and from random weights."""
    argv = [*argv, *SHORT, "--trainer.max_epochs", str(epochs)]
    argv += [] if "--data.image_size" in argv else ["--data.image_size", "32"]
    return argv if "--model.weights" in argv else [*argv, "--model.pretrained", "false"]


def run_command(command: str, capsys) -> None:
    """Run a line of a page, or parse it where it cannot run here."""
    argv = shlex.split(command)
    assert "rexnet_lit" in argv, f"not a command that this test knows: {command}"
    argv = argv[argv.index("rexnet_lit") + 1 :]
    if reason_not_to_run(command, NOT_RUN):
        argv.append("--print_config")
    elif argv[0] == "fit":
        argv = short_form(argv, epochs=2 if "last" in argv else 1)
    code = main.main(argv)
    assert code == 0, (argv, capsys.readouterr().err)
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_and_python_run(page, surroundings, capsys, monkeypatch):
    for command in commands(page):
        if not reason_not_to_run(command, SKIPPED):
            run_command(command, capsys)
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), {})  # noqa: S102


def test_commands_in_scripts_are_parsed(surroundings, capsys):
    scripts = "\n".join(text for page in PAGES for text in blocks(page, "bash"))
    found = re.findall(r'python -m rexnet_lit ([^"\n]+)', scripts)
    assert len(found) >= 2
    for arguments in found:
        assert main.main([*shlex.split(arguments), "--print_config"]) == 0, capsys.readouterr().err


def test_every_exception_is_used():
    everything = "\n".join(command for page in PAGES for command in commands(page))
    assert [part for part in {**NOT_RUN, **SKIPPED} if part not in everything] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for command in commands(page):
        if command.startswith("make "):
            assert set(command.split()[1:]) <= set(targets), command


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_export_formats_exist(page, capsys):
    assert main.main(["export", "--help"]) == 0
    known = re.findall(r"[\w-]+", capsys.readouterr().out)
    for name in re.findall(r"--format ([\w-]+)", "\n".join(commands(page))):
        assert name in known


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_benchmarks_have_the_options(page):
    for command in commands(page):
        if "tests/benchmarks/" in command:
            _, script, *arguments = shlex.split(command)
            source = (ROOT / script).read_text("utf-8")
            if script.endswith(".py"):
                compile(source, script, "exec")
            for option in (a for a in arguments if a.startswith("--")):
                assert (f'"{option}"' if script.endswith(".py") else f"= {option} ]") in source, command


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text("utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_named_exist(page):
    for name in re.findall(r"\b(?:configs|tests|docs|notebooks)/[\w/.-]+\.\w+", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


def test_settings_exist(capsys):
    assert main.main(["fit", "--help_all"]) == 0
    help_text = capsys.readouterr().out
    settings = {
        key
        for page in PAGES
        for key in re.findall(r"`(?:--)?((?:data|model|trainer)\.\w[\w.]*)", page.read_text("utf-8"))
    } - {"model.safetensors", "model.onnx", "model.xml", "model.bin"}
    assert len(settings) > 15
    assert [key for key in sorted(settings) if f"--{key}" not in help_text] == []


def test_yaml_blocks_are_configs():
    assert [yaml.safe_load(text) for page in PAGES for text in blocks(page, "yaml")]


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES
    early = "\n".join(lines[:40])
    for needed in ("For you if", "Not for you if", "pip install .", "rexnet_lit fit", "report.html"):
        assert needed in early, needed


def test_images_are_small():
    images = sorted((ROOT / "docs" / "images").glob("*.png"))
    assert {image.stem for image in images} == {"report", "check"}
    assert all(image.stat().st_size < 200_000 for image in images)


def tree(text: str) -> set[str]:
    """The files that the indented tree of architecture.md names."""
    found, folder = set(), ""
    for line in text.partition("    rexnet_lit/\n")[2].partition("\n## ")[0].splitlines():
        name = line.split()[0] if line.strip() else ""
        indent = len(line) - len(line.lstrip())
        if name.endswith("/") and indent == 6:
            folder = name
        elif name.endswith(".py"):
            found.add(name if indent == 6 else folder + name)
    return found


def test_architecture_names_every_file():
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    files -= {name for name in files if name.endswith("/__init__.py")}
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    assert tree(text) == files
    folders = "|".join(sorted({name.partition("/")[0] for name in files}))
    assert set(re.findall(rf"`((?:{folders})/\w+\.py)`", text)) <= files


def test_architecture_names_what_each_folder_imports():
    from test_architecture import ALLOWED

    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for folder, allowed in ALLOWED.items():
        line = re.search(rf"^      {folder}/ +\(imports ([\w, /]+)", text, re.MULTILINE)
        if line and line[1] != "everything":
            assert set(re.findall(r"[\w/]+", line[1])) - {"nothing", "of", "this", "package"} == set(allowed), folder
