"""Time the NF4 linear layer, forward and gradient: the kernel library's tiers, plain torch, and bitsandbytes.

    taskset -c 1 python trainer/benchmarks/linear.py [--tiers avx2 avx512] [--shapes 576x576] [--rows 512] [--rounds 15]

One thread. Everything that is compared runs once in each round, in turn, on random data; the table has medians of
GFLOP/s, with dequantizing in the time of whatever does it. `torch alone` multiplies with a matrix that is dequantized
already: what plain LoRA would do. Results worth keeping
are in LOG.md.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_trainer.errors import ConfigurationError
from qlora_trainer.kernels.library import EMULATED, KERNELS_ENV, TIERS, find
from qlora_trainer.quantization.kernels.compiled import CompiledNf4Weight
from qlora_trainer.quantization.kernels.reference import Nf4Weight
from qlora_trainer.quantization.nf4 import BLOCK, quantize_nf4

SHAPES = ["576x576", "1536x576", "576x1536", "2048x2048", "8192x2048", "2048x8192"]
"""out x in: SmolLM2-135M's, and those of a model of 1B weights."""
ROWS = [16, 64, 256, 512, 1024]
Products = tuple[Callable[[], object], Callable[[], object]]
"""x W^T and dy W."""


def contenders(weight: Tensor, x: Tensor, dy: Tensor, tiers: list[str]) -> dict[str, Products]:
    """What is compared, by name, for one weight (out, in) and its inputs."""
    matrix = quantize_nf4(weight, double=True, name="w")
    plain = Nf4Weight(matrix)
    whole = plain.dequantize(x.dtype)
    found: dict[str, Products] = {}
    for tier in tiers:
        try:
            library = find(environ={KERNELS_ENV: tier})
        except ConfigurationError:
            continue
        assert library is not None
        ours = CompiledNf4Weight(matrix, library)
        found[tier] = (
            lambda ours=ours: ours.linear(x, None),
            lambda ours=ours: ours.linear_grad_input(dy),
        )
    found["reference"] = (lambda: plain.linear(x, None), lambda: plain.linear_grad_input(dy))
    found["torch alone"] = (lambda: x @ whole.t(), lambda: dy @ whole)
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes"] = by_bitsandbytes(weight, x, dy)
    return found


def by_bitsandbytes(weight: Tensor, x: Tensor, dy: Tensor) -> Products:
    """As its layer computes in training: the matrix is dequantized whole for each product."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight.to(x.dtype), quant_type="nf4", blocksize=BLOCK, compress_statistics=True
    )
    return (
        lambda: x @ bnb.dequantize_4bit(packed, state).to(x.dtype).t(),
        lambda: dy @ bnb.dequantize_4bit(packed, state).to(x.dtype),
    )


def seconds(work: Callable[[], object]) -> float:
    """Processor time of this thread: what other programs take meanwhile does not count."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def median_rates(works: dict[str, Products], flop: float, rounds: int) -> dict[str, tuple[float, float]]:
    """GFLOP/s of both products, by name."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in works}
    for number in range(rounds + 2):
        for name, products in works.items():
            for kept, product in zip(times[name], products, strict=True):
                taken = seconds(product)
                if number >= 2:  # the first two warm up
                    kept.append(taken)
    return {
        name: (flop / statistics.median(forward) / 1e9, flop / statistics.median(backward) / 1e9)
        for name, (forward, backward) in times.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=[t for t in TIERS if t != EMULATED])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread; forward / gradient"
    )
    for shape in arguments.shapes:
        out, in_ = (int(word) for word in shape.split("x"))
        weight = torch.randn(out, in_) * 0.02
        for dtype in (getattr(torch, name) for name in arguments.dtypes):
            for rows in arguments.rows:
                works = contenders(
                    weight,
                    torch.randn(rows, in_).to(dtype),
                    torch.randn(rows, out).to(dtype),
                    arguments.tiers,
                )
                rates = median_rates(works, 2.0 * rows * out * in_, arguments.rounds)
                row = "  ".join(f"{name} {one:.0f}/{other:.0f}" for name, (one, other) in rates.items())
                print(f"{shape:>10} {str(dtype).removeprefix('torch.'):>8} {rows:>5}  {row}", flush=True)


if __name__ == "__main__":
    main()
