"""Time NF4 quantisation and dequantisation, and bitsandbytes' beside it when it is installed.

    python trainer/benchmarks/dequantise.py [--threads 1] [--repeats 30]

Prints, for the shapes of SmolLM2-135M's linear layers and one of a 7B model, the
least nanoseconds per weight over the repeats. Results worth keeping are in LOG.md.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qlora_trainer.quantization.kernels.reference import dequantize, dequantize_scales
from qlora_trainer.quantization.nf4 import BLOCK, NestedScales, quantize_nf4

SHAPES = [(192, 576), (576, 576), (1536, 576), (576, 1536), (4096, 4096)]


def least_seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def ours(matrix: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured of this project, by name."""
    plain, double = (quantize_nf4(matrix, double=double, name="w") for double in (False, True))
    yield "quantise", lambda: quantize_nf4(matrix, double=False, name="w")
    yield "quantise, double", lambda: quantize_nf4(matrix, double=True, name="w")
    for dtype in (torch.float32, torch.bfloat16):
        memory = torch.empty(matrix.shape, dtype=dtype)
        label = str(dtype).removeprefix("torch.")
        yield f"{label}", lambda dtype=dtype: dequantize(plain, dtype)
        yield f"{label}, out", lambda dtype=dtype, memory=memory: dequantize(plain, dtype, out=memory)
        yield f"{label}, double, out", lambda dtype=dtype, memory=memory: dequantize(double, dtype, memory)
    assert isinstance(double.scales, NestedScales)
    scales = double.scales
    yield "un-nesting alone", lambda: dequantize_scales(scales)


def theirs(matrix: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same of bitsandbytes, by name."""
    import bitsandbytes.functional as bnb

    for double in (False, True):
        settings = {"quant_type": "nf4", "blocksize": BLOCK, "compress_statistics": double}
        label = ", double" if double else ""
        yield f"bitsandbytes quantise{label}", lambda settings=settings: bnb.quantize_4bit(matrix, **settings)
        packed, state = bnb.quantize_4bit(matrix, **settings)
        yield (
            f"bitsandbytes float32{label}",
            lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state),
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {arguments.threads} threads"
    )
    for shape in SHAPES:
        matrix = torch.randn(shape) * 0.02
        works = list(ours(matrix))
        if importlib.util.find_spec("bitsandbytes"):
            works += theirs(matrix)
        repeats = max(3, arguments.repeats * 1_000_000 // max(matrix.numel(), 1_000_000))
        for label, work in works:
            nanoseconds = least_seconds(work, repeats) / matrix.numel() * 1e9
            print(f"{shape[0]:>5} x {shape[1]:<5} {label:<32} {nanoseconds:8.3f} ns/weight")


if __name__ == "__main__":
    main()
