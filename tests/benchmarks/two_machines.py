"""A run on two machines, as far as one machine can show it: two network namespaces and torchrun. Linux, as root.

    python tests/benchmarks/two_machines.py

The machines are joined by a virtual cable; torchrun's rendezvous and gloo go over it. There are 64 training and 15
validation images, so that the machines do not get equally many. Normalisation layers are frozen, and there is no
dropout: what remains must equal one process with twice the batch, but for rounding, which AdamW would amplify: the
optimiser is SGD. It prints

- the largest difference of a weight between two machines and one process after 20 steps;
- the validation metrics of the two machines, and of one process for the same weights;
- how the first machine ends when the second is killed (SIGKILL) during the second epoch, and after how many seconds;
- whether the run that is resumed after this has the weights of the undisturbed one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

ADDRESSES = {"m1": "10.77.0.1", "m2": "10.77.0.2"}
PORT = 29500
FIT = [
    "-m", "rexnet_lit", "fit", "data", "--config", "quickstart", "--trainer.accelerator", "cpu",
    "--trainer.max_epochs", "3", "--trainer.max_steps", "20", "--data.image_size", "32", "--data.num_workers", "0",
    "--model.strategy.bn", "frozen", "--model.head.dropout", "0", "--model.calibrate", "false",
    "--model.optimizer", "sgd", "--model.optimizer.lr", "0.2",
]  # fmt: skip


def cable(*, create: bool) -> None:
    """Create or delete two network namespaces that can reach each other."""
    if create:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "add", name], check=True)
        veth = ["type", "veth", "peer", "name", "v1", "netns", "m2"]
        subprocess.run(["ip", "link", "add", "v1", "netns", "m1", *veth], check=True)
        for name, address in ADDRESSES.items():
            subprocess.run(["ip", "-n", name, "addr", "add", f"{address}/24", "dev", "v1"], check=True)
            for device in ("v1", "lo"):
                subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True)
    else:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def draw(root: Path) -> None:
    """Write squares of three colours."""
    rng = np.random.default_rng(0)
    for split, count in (("train", (22, 21, 21)), ("val", (5, 5, 5))):
        for channel, images in enumerate(count):
            (root / split / "rgb"[channel]).mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 140, (32, 32, 3), np.uint8)
                pixels[..., channel] += 60
                Image.fromarray(pixels).save(root / split / "rgb"[channel] / f"{i}.png")


def start(machine: str, out: Path, *settings: str) -> subprocess.Popen[str]:
    """Start a machine's torchrun."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "v1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    hosts = ["--rdzv-endpoint", f"{ADDRESSES['m1']}:{PORT}", "--rdzv-conf", f"is_host={int(machine == 'm1')}"]
    command = [
        "ip", "netns", "exec", machine, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
        "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--local-addr", ADDRESSES[machine], *hosts, *FIT,
        "--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp", "--data.batch_size", "4",
        "--trainer.default_root_dir", str(out), *settings,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def both(out: Path, *settings: str) -> None:
    """Train on both machines."""
    machines = [start(machine, out, *settings) for machine in ADDRESSES]
    screens = [machine.communicate()[0] for machine in machines]
    if any(machine.returncode for machine in machines):
        sys.exit("\n".join(screens))


def killed(out: Path) -> None:
    """Train, kill the second machine in the second epoch, and print how the first one ends."""
    first, second = (start(machine, out) for machine in ADDRESSES)
    while not list(out.glob("lightning_logs/*/checkpoints/last.ckpt")):
        time.sleep(0.05)
    of_machine = subprocess.run(["ip", "netns", "pids", "m2"], capture_output=True, text=True, check=True).stdout
    for process in of_machine.split():
        os.kill(int(process), signal.SIGKILL)
    begun = time.monotonic()
    screen, _ = first.communicate()
    lines = "; ".join(line for line in screen.splitlines() if line.startswith("rexnet-lit"))
    print(
        f"killed: the first machine ends after {time.monotonic() - begun:.1f} s, exit code {first.returncode}: {lines}"
    )
    second.wait()


def model(out: Path) -> Path:
    """Return the model file of the last run."""
    return max((out / "lightning_logs").iterdir()) / "model.safetensors"


def main() -> None:
    """Run all."""
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        draw(Path("data"))
        cable(create=True)
        try:
            both(Path("two"))
            killed(Path("resumed"))
            both(Path("resumed"), "--ckpt_path", "last")
        finally:
            cable(create=False)
        one = [sys.executable, *FIT, "--data.batch_size", "8", "--trainer.default_root_dir", "one"]
        subprocess.run([*one, "--trainer.devices", "1"], check=True, capture_output=True)
        two, single, resumed = (load_file(model(Path(name))) for name in ("two", "one", "resumed"))
        difference = max(float((two[key].double() - single[key].double()).abs().max()) for key in two)
        print(f"largest difference of a weight between two machines and one process: {difference:.1e}")
        shown = json.loads((model(Path("two")).parent / "result.json").read_text())["metrics"]
        validate = [sys.executable, "-m", "rexnet_lit", "validate", str(model(Path("two"))), "--report"]
        subprocess.run(validate, check=True, capture_output=True)
        again = json.loads((model(Path("two")).parent / "report" / "metrics.json").read_text())
        print(
            f"validation loss {shown['val/loss']:.6f} on two machines, {again['nll']:.6f} on one, of {again['count']}"
        )
        print(f"resumed weights equal: {all(bool((two[key] == resumed[key]).all()) for key in two)}")


if __name__ == "__main__":
    main()
