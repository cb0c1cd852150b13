"""Training steps with this project's ReXNet blocks against timm's own, in turns in one process.

    python tests/benchmarks/bench_blocks.py [--size 224] [--steps 10]

rexnet_100, fp32, channels_last, batch 32, AdamW; the allocator is set up for both. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import rexnet_lit

rexnet_lit.tune()

import timm  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from rexnet_lit.blocks import save_memory_traffic  # noqa: E402


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    images = torch.randn(32, 3, options.size, options.size).to(memory_format=torch.channels_last)
    targets = torch.randint(10, (32,))
    networks, seconds = {}, {}
    for name in ("timm's", "ours"):
        network = timm.create_model("rexnet_100", num_classes=10).to(memory_format=torch.channels_last)
        if name == "ours":
            save_memory_traffic(network)
        networks[name] = network, torch.optim.AdamW(network.parameters(), fused=True)
        seconds[name] = []
    for _ in range(options.steps + 2):
        for name, (network, optimizer) in networks.items():
            started = time.perf_counter()
            functional.cross_entropy(network(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    print(f"rexnet_100 at {options.size} px, {torch.get_num_threads()} threads\n")
    print("| blocks | images/s | ratio |\n|---|---|---|")
    first = medians["timm's"]
    for name, median in medians.items():
        print(f"| {name} | {32 / median:.1f} | {first / median:.3f} |")


if __name__ == "__main__":
    main()
