"""Benches of the GPU kernels and of a whole model.

    python bench/gpu [GROUP ...] [--out FILE.jsonl] [--seconds N] [--kernels sm90a] [--smoke]

Groups: machine, plan, unmask, cross_entropy, rope, attention, model; without one, all. Each case is
checked against the reference before it is timed. ``--smoke`` takes tiny shapes; without a GPU that
is all there is, on emulated CUDA kernels where the build has them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # what all benches share

import torch
from device import ON_GPU, ceilings, machine
from records import Bench

from pdiff_runtime.testing import use_cuda_kernels

GROUPS = ("machine", "plan", "unmask", "cross_entropy", "rope", "attention", "model")
SKIPPED = 77  # as bench/gpu_check.sh reads an exit status


def main() -> int:
    """Run groups; the number of failed cases is the exit status, 77 that none can run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case after these")
    parser.add_argument("--kernels", choices=("portable", "sm90a"), default="portable")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    if not ON_GPU and not args.smoke:
        parser.error("no GPU: --smoke runs tiny shapes on the CPU")
    if args.kernels == "sm90a" and args.groups != ["attention"]:
        parser.error("--kernels sm90a: expected the group attention alone")
    torch.manual_seed(0)
    bench = Bench(args.out, is_tiny=args.smoke, seconds=args.seconds, kernels=args.kernels)
    with use_cuda_kernels(args.kernels) as available:
        if args.kernels == "sm90a" and not available:
            print("sm90a kernels are not for this device")
            return SKIPPED
        for group in args.groups or GROUPS:
            print(f"== {group}", flush=True)
            if group == "machine":
                _machine(bench)
            else:
                importlib.import_module(group).run(bench)
    return min(bench.num_failed, SKIPPED - 1)


def _machine(bench: Bench) -> None:
    header = machine()
    print(json.dumps(header, indent=1))
    if bench.path is not None:
        with bench.path.open("a") as file:
            file.write(json.dumps({"machine": header}) + "\n")
    names = {"GB/s": "device copy, read and write", "TFLOP/s": "bf16 product, 8192 cubed"}
    for unit, value in ceilings().items():
        bench.value(names[unit], "torch", value, unit)


if __name__ == "__main__":
    sys.exit(main())
