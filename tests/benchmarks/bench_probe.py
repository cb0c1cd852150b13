"""A linear probe of 20 epochs with its features computed once, against the same with features computed in each epoch.

    python tests/benchmarks/bench_probe.py [--images 2000] [--size 224] [--epochs 20] [--uncached 3]

The uncached probe does all epochs alike, so it runs for --uncached epochs, and the time of those after the first counts
--epochs times. An eighth more images validate. Both times are of the whole command, start-up included.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

from bench_train import draw_photos, run

CONFIG = Path(__file__).parents[2] / "configs" / "linear_probe.yaml"


def probe(root: Path, size: int, epochs: int, out: Path, *extra: str) -> tuple[list[float], float, float]:
    """Return when each epoch's line came, in seconds, how long the command took, and the last validation loss."""
    started = time.monotonic()
    command = [
        sys.executable, "-m", "rexnet_lit", "fit", f"--config={CONFIG}", f"--data.root={root}",
        f"--data.image_size={size}", "--model.pretrained=false", f"--trainer.max_epochs={epochs}",
        "--trainer.accelerator=cpu", f"--trainer.default_root_dir={out}", *extra,
    ]  # fmt: skip
    lines = [(when - started, line) for when, line in run(command, out) if line.startswith("epoch ")]
    loss = re.search(r"val/loss ([\d.]+)", lines[-1][1])
    return [when for when, _ in lines], time.monotonic() - started, float(loss.group(1)) if loss else float("nan")


def main() -> None:
    """Time both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--uncached", type=int, default=3)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        draw_photos(out / "photos", o.images, o.images // 8)
        _, cached, loss = probe(out / "photos", o.size, o.epochs, out)
        # A step that does nothing makes the recipe one that might augment.
        whens, whole, _ = probe(out / "photos", o.size, o.uncached, out, "--data.augment.transforms=[NoOp]")
        each = (whens[-1] - whens[0]) / (o.uncached - 1)
        uncached = whole + (o.epochs - o.uncached) * each
        print(f"{o.images} images at {o.size} px, {o.epochs} epochs (validation loss {loss:.4f}):")
        print(f"  features once       {cached:7.1f} s")
        print(f"  in each epoch       {uncached:7.1f} s ({each:.1f} s an epoch), {uncached / cached:.1f} x")


if __name__ == "__main__":
    main()
