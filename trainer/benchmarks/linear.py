"""Time the frozen linear layer, forward and gradient: the kernel library's tiers, plain torch, and bitsandbytes.

    taskset -c 1 python trainer/benchmarks/linear.py [--schemes nf4 int8 none] [--tiers avx2 avx512] [--shapes 576x576]
        [--rows 512] [--rounds 15]

One thread. Everything that is compared runs once in each round, in turn, on random data; the table has medians of
GFLOP/s, with dequantizing in the time of whatever does it. `torch alone` multiplies with a matrix that is dequantized
already: what plain LoRA would do, and the reference of scheme none. bitsandbytes is there for 4 bits alone: its 8 bits
quantize activations as well. Results worth keeping are in LOG.md.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_contract.quantization import SCHEMES
from qlora_contract.run_config import Quantization
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.kernels.library import EMULATED, KERNELS_ENV, REFERENCE, TIERS, find, loaded
from qlora_trainer.quantization.frozen_weight import FrozenWeight
from qlora_trainer.quantization.nf4 import BLOCK
from qlora_trainer.quantization.schemes import scheme_of

SHAPES = ["576x576", "1536x576", "576x1536", "2048x2048", "8192x2048", "2048x8192"]
"""out x in: SmolLM2-135M's, and those of a model of 1B weights."""
ROWS = [16, 64, 256, 512, 1024]
Products = tuple[Callable[[], object], Callable[[], object]]
"""x W^T and dy W."""


def contenders(scheme: str, weight: Tensor, x: Tensor, dy: Tensor, tiers: list[str]) -> dict[str, Products]:
    """What is compared, by name, for one weight (out, in) of a scheme and its inputs."""
    found: dict[str, Products] = {}
    for tier in tiers:
        try:
            find(environ={KERNELS_ENV: tier})
        except ConfigurationError:
            continue
        found[tier] = products(frozen(scheme, weight, x.dtype, tier), x, dy)
    plain = frozen(scheme, weight, x.dtype, REFERENCE)
    whole = plain.dequantize(x.dtype)
    if scheme != "none":
        found["reference"] = products(plain, x, dy)
    found["torch alone"] = (lambda: x @ whole.t(), lambda: dy @ whole)
    if scheme in ("nf4", "fp4") and importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes"] = by_bitsandbytes(scheme, weight, x, dy)
    return found


def frozen(scheme: str, weight: Tensor, dtype: torch.dtype, tier: str) -> FrozenWeight:
    """The weight as a job on that tier keeps it."""
    os.environ[KERNELS_ENV] = tier
    loaded.cache_clear()
    return scheme_of(Quantization.model_validate({"scheme": scheme})).freeze("w", weight, dtype)


def products(weight: FrozenWeight, x: Tensor, dy: Tensor) -> Products:
    """A frozen weight's."""
    return lambda: weight.linear(x, None), lambda: weight.linear_grad_input(dy)


def by_bitsandbytes(scheme: str, weight: Tensor, x: Tensor, dy: Tensor) -> Products:
    """As its layer computes in training: the matrix is dequantized whole for each product."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight.to(x.dtype), quant_type=scheme, blocksize=BLOCK, compress_statistics=True
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
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
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
    for shape, scheme, dtype_name, rows in itertools.product(
        arguments.shapes, arguments.schemes, arguments.dtypes, arguments.rows
    ):
        out, in_ = (int(word) for word in shape.split("x"))
        dtype = getattr(torch, dtype_name)
        weight = torch.randn(out, in_) * 0.02
        x, dy = torch.randn(rows, in_).to(dtype), torch.randn(rows, out).to(dtype)
        works = contenders(scheme, weight, x, dy, arguments.tiers)
        rates = median_rates(works, 2.0 * rows * out * in_, arguments.rounds)
        row = "  ".join(f"{name} {one:.0f}/{other:.0f}" for name, (one, other) in rates.items())
        print(f"{shape:>10} {scheme:>4} {dtype_name:>8} {rows:>5}  {row}", flush=True)


if __name__ == "__main__":
    main()
