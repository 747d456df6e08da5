"""Speed on this device: python tests/benchmark.py [--device cuda] [--precision bf16].

Prints, asserts nothing. For each network: images/s of a training step and of one evaluation, the arithmetic
rate it reaches and its share of what a large matrix product reaches here, and the peak memory.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
import twosdm


def seconds(work, device, least=1.0):
    """The shortest of at least two runs of work(), and of all that fit into `least` seconds; one warms up."""
    times = []
    while len(times) < 3 or sum(times[1:]) < least:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="(default: %(default)s)")
    parser.add_argument("--only", default="", help="only the networks whose name contains this")
    args = parser.parse_args()
    device = twosdm.pick_device(args.device)
    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=kind)
    peak = 2 * n**3 / seconds(lambda: a @ a, device)
    print(f"{device}, {args.precision}, {torch.get_num_threads()} threads: "
          f"matrix product {peak / 1e9:,.0f} GFLOP/s")
    small = device.type != "cuda"
    print(f"{'network':<22}{'params':>12}{'batch':>7}{'train/s':>10}"
          f"{'eval/s':>10}{'GFLOP/s':>10}{'of peak':>9}{'MB':>8}")
    for name, dataset, stage, batch in (
            ("shapes U-Net", "shapes", "image", 32), ("shapes prior", "shapes", "prior", 256),
            ("prior", "afhq", "prior", 256), ("DDPM++-64", "afhq", "image", 4 if small else 128),
            ("ADM-64", "afhq", "image", 2 if small else 64)):
        if args.only not in name:
            continue
        changes = dict(arch="adm", width=192, mults=(1, 2, 3, 4), blocks=3,
                       attention=(32, 16, 8)) if "ADM" in name else {}
        config = twosdm.configure(dataset, stage, **changes)
        recipe = train.recipe(config, 64 if dataset == "shapes" else 512, 0)
        denoiser = twosdm.build_denoiser(recipe).to(device)
        s = recipe["settings"]
        x = torch.randn(batch, *((s["dim"],) if stage == "prior" else (3, s["resolution"], s["resolution"])),
                        device=device)
        cond = torch.randn(batch, s["cond_dim"], device=device) if s["cond_dim"] else None
        if stage != "prior":
            denoiser, x = (denoiser.to(memory_format=torch.channels_last),
                           x.contiguous(memory_format=torch.channels_last))

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                denoiser.loss(x, cond).mean().backward()

        def evaluate():
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16,
                                                 enabled=args.precision == "bf16"):
                denoiser(x, torch.ones(batch, device=device), cond)

        with FlopCounterMode(display=False) as flops:
            evaluate()
        training, evaluation = seconds(step, device), seconds(evaluate, device)
        rate = flops.get_total_flops() / evaluation
        memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"{name:<22}{sum(p.numel() for p in denoiser.parameters()):>12,}{batch:>7}"
              f"{batch / training:>10,.1f}{batch / evaluation:>10,.1f}{rate / 1e9:>10,.0f}"
              f"{rate / peak:>9.0%}{memory:>8,.0f}", flush=True)


if __name__ == "__main__":
    main()
