"""Draw the images of README.md: a test report and a page of `check`, both of the sample digits.

    python tests/benchmarks/draw_docs.py [--run RUN_FOLDER] [--browser chromium]

Without --run, trains configs/quickstart.yaml first. RUN_FOLDER is a run of that config, whose digits still exist.
Needs Chromium (apt-get install chromium). Writes docs/images/report.png and docs/images/check.png.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def rexnet(*arguments: object, cwd: Path, codes: tuple[int, ...] = (0,)) -> None:
    """Run a command of rexnet_lit."""
    done = subprocess.run([sys.executable, "-m", "rexnet_lit", *map(str, arguments)], cwd=cwd)
    if done.returncode not in codes:
        sys.exit(f"{arguments[0]} failed")


def screenshot(browser: str, page: Path, target: Path, width: int, height: int) -> None:
    """Write the top of an HTML page as a PNG of 64 colours."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        subprocess.run([*command, f"--window-size={width},{height}", page.absolute().as_uri()], check=True, timeout=120)
        with Image.open(shot) as image:
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1e3:.0f} kB")


def spoil(digits: Path) -> None:
    """Put into a copy of the digits what `check` is for: duplicates, a broken file and a rare class."""
    first, second, third = sorted((digits / "train" / "7").iterdir())[:3]
    shutil.copy(first, digits / "val" / "1" / "copy.png")
    shutil.copy(second, digits / "test" / "7" / "copy.png")
    third.write_bytes(third.read_bytes()[:100])
    for file in sorted((digits / "train" / "9").iterdir())[12:]:
        file.unlink()


def main() -> None:
    """Draw both images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder of configs/quickstart.yaml")
    parser.add_argument("--browser", default="chromium")
    options = parser.parse_args()
    images = ROOT / "docs" / "images"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rexnet("sample", "digits", cwd=work)
        run = options.run.absolute() if options.run else work / "lightning_logs" / "version_0"
        if not options.run:
            rexnet("fit", "--config", ROOT / "configs" / "quickstart.yaml", "--data.root", "digits", cwd=work)
        rexnet("test", "--ckpt_path", run / "model.safetensors", cwd=work)
        screenshot(options.browser, run / "report" / "report.html", images / "report.png", 1000, 760)
        spoil(work / "digits")
        rexnet("check", "digits", "--report", "check.html", cwd=work, codes=(0, 1))
        screenshot(options.browser, work / "check.html", images / "check.png", 1000, 760)


if __name__ == "__main__":
    main()
