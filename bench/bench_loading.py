"""Loading a checkpoint against reading its bytes.

    python bench/bench_loading.py [--out bench/results/cpu] [--gigabytes 4] [--folder /tmp]

Writes layers of a 7B decoder (hidden 3584, 28 heads of which 4 for keys, 18,944 in the MLP) with
random bfloat16 weights in files of at most 2 GB, as many as fit into the size. ``load_model`` and a
plain sequential read of the same files take turns; before each, the files are dropped from the
page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from pdiff_runtime import Decoder, load_model
from pdiff_runtime.bench.kernels import header
from pdiff_runtime.models import ModelConfig

CHUNK_BYTES = 8 << 20
SHARD_BYTES = 2 << 30
BYTES_OF_LAYER = 2 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944)


def config(gigabytes: float) -> ModelConfig:
    """As many layers as make up the size, with a vocabulary as small as one layer's matrix."""
    num_layers = max(1, int(gigabytes * 1e9 / BYTES_OF_LAYER))
    return ModelConfig(
        vocab_size=18944, hidden_size=3584, num_layers=num_layers, num_heads_q=28, num_heads_kv=4,
        head_dim=128, intermediate_size=18944, qkv_bias=True, rope_theta=1e6, full_attention=True,
        model_type="Dream",
    )  # fmt: skip


def write(folder: Path, shape: ModelConfig) -> None:
    """A sharded checkpoint, one shard in memory at a time."""
    (folder / "config.json").write_text(json.dumps(shape.to_hf()))
    with torch.device("meta"):
        model = Decoder(shape)
    weight_map = {}
    for idx, names in enumerate(shards(model)):
        file = f"model-{idx:05}.safetensors"
        tensors = {name: random_tensor(model.get_parameter(name)) for name in names}
        safetensors.torch.save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shards(model: Decoder) -> Iterator[list[str]]:
    """Names of the parameters, file by file."""
    names: list[str] = []
    num_bytes = 0
    for name, parameter in model.named_parameters():
        size = 2 * parameter.numel()
        if num_bytes + size > SHARD_BYTES:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += size
    yield names


def random_tensor(like: Tensor) -> Tensor:
    """Values of any bits would hold NaNs, so an exponent is drawn with the rest."""
    bits = torch.randint(0x3000, 0x3E00, like.shape, dtype=torch.int16)
    return bits.view(torch.bfloat16)


def drop(files: list[Path]) -> None:
    """Leave nothing of the files in the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read(files: list[Path]) -> None:
    """One file after another, from its start to its end."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def seconds(act: Callable[[], object], files: list[Path]) -> float:
    """Of one call with cold files."""
    drop(files)
    start = time.perf_counter()
    result = act()
    elapsed = time.perf_counter() - start
    del result  # giving gigabytes back is no part of it
    return elapsed


def main() -> None:
    """Write the checkpoint, measure, and write loading.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        write(folder, config(args.gigabytes))
        files = sorted(folder.glob("*.safetensors"))
        num_bytes = sum(file.stat().st_size for file in files)
        rates: dict[str, list[float]] = {"read": [], "load_model": []}
        print(f"{header()['machine']}\n{num_bytes / 1e9:.2f} GB in {len(files)} files")
        for _ in range(args.rounds):
            rates["read"].append(num_bytes / 1e9 / seconds(lambda: read(files), files))
            rates["load_model"].append(num_bytes / 1e9 / seconds(lambda: load_model(folder), files))
            print("  ".join(f"{name} {of[-1]:.2f} GB/s" for name, of in rates.items()), flush=True)
    finally:
        shutil.rmtree(folder)
    record = {
        "what": "load_model from cold files, of a plain read", "gigabytes": num_bytes / 1e9,
        "rounds": args.rounds,
        **{f"{name}_gb_s": statistics.median(of) for name, of in rates.items()},
        "ratio": statistics.median(
            load / read for load, read in zip(rates["load_model"], rates["read"], strict=True)
        ),
    }  # fmt: skip
    print(f"load_model at {100 * record['ratio']:.0f} % of the read")
    args.out.mkdir(parents=True, exist_ok=True)
    result = {**header(), "records": [record]}
    (args.out / "loading.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
