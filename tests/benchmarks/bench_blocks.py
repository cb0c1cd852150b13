"""Training steps with this project's ReXNet blocks against timm's own, in turns in one process.

    python tests/benchmarks/bench_blocks.py [--size 224] [--batch 32] [--steps 10]
    python tests/benchmarks/bench_blocks.py --device cuda --precision bf16 --batch 128 --steps 20

rexnet_100, AdamW; the allocator is set up for both. Medians. On a CPU channels_last; on a GPU timm's own layout too,
and the time that the first step takes, in which cuDNN makes its kernels: for whoever comes first in a layout.
"""

from __future__ import annotations

import argparse
import statistics
import time

import rexnet_lit

rexnet_lit.configure_allocator()

import timm  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from rexnet_lit.models.blocks import save_memory_traffic  # noqa: E402


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    options = parser.parse_args()
    device, gpu = torch.device(options.device), options.device == "cuda"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    drawn = torch.randn(options.batch, 3, options.size, options.size, device=device)
    targets = torch.randint(10, (options.batch,), device=device)
    cases, seconds = {}, {}
    for layout in (torch.contiguous_format, torch.channels_last) if gpu else (torch.channels_last,):
        images = drawn.contiguous(memory_format=layout)
        for whose in ("timm's", "ours"):
            network = timm.create_model("rexnet_100", num_classes=10).to(device, memory_format=layout)
            if whose == "ours":
                save_memory_traffic(network)
            name = f"{whose}, {str(layout).rpartition('.')[2]}"
            cases[name] = network, torch.optim.AdamW(network.parameters(), fused=True), images
            seconds[name] = []
    for _ in range(options.steps + 2):
        for name, (network, optimizer, images) in cases.items():
            started = time.perf_counter()
            with torch.autocast(options.device, dtype, enabled=options.precision != "fp32"):
                loss = functional.cross_entropy(network(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if gpu:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    where = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    print(f"rexnet_100 at {options.size} px, batch {options.batch}, {options.precision}, {where}\n")
    print("| blocks, layout | images/s | ratio | first step |\n|---|---|---|---|")
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"| {name} | {options.batch / median:.1f} | {first / median:.3f} | {seconds[name][0]:.1f} s |")


if __name__ == "__main__":
    main()
