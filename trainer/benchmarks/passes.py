"""Time the passes of a training step beside its products: the kernel library's tiers against plain torch.

    taskset -c 1 python trainer/benchmarks/passes.py [--tiers avx2 avx512] [--only attention] [--rounds 15]

One thread, shapes of SmolLM2-135M with 512 tokens, random data. In each round every tier and torch run once, in turn;
the table has medians of microseconds, forward and gradient together. Results worth keeping are in LOG.md.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_trainer.errors import ConfigurationError
from qlora_trainer.kernels.library import KERNELS_ENV, REFERENCE, TIERS, find, loaded
from qlora_trainer.modeling.attention import packed_attention
from qlora_trainer.modeling.layers import RmsNorm, _Gated
from qlora_trainer.modeling.lora_linear import Mask
from qlora_trainer.modeling.loss import summed_cross_entropy
from qlora_trainer.quantization.nf4 import quantize_nf4

TOKENS, HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KEY_HEADS, HEAD = 512, 576, 1536, 49152, 9, 3, 64
SEGMENTS = [100, 97, 110, 88, 117]


def with_gradient(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward, and the gradients of the inputs."""
    inputs = tuple(x.requires_grad_() for x in inputs)
    dy = torch.randn_like(run(*inputs))
    return lambda: torch.autograd.grad(run(*inputs), inputs, dy)


def works(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    def attention(segments: list[int]) -> Callable[[], object]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return packed_attention(nn.Identity(), *heads_first, None, segment_lengths=segments)[0]

        tokens = sum(segments)
        return with_gradient(run, *(randn(1, tokens, h, HEAD) for h in (HEADS, KEY_HEADS, KEY_HEADS)))

    norm = RmsNorm(randn(HIDDEN), 1e-5)
    head, targets = randn(VOCABULARY, HIDDEN) / 24, torch.randint(VOCABULARY, (128,))
    mask, x, out = Mask(0.05, ((1, TOKENS),)), randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN)
    weight = randn(INTERMEDIATE, HIDDEN)
    return {
        "quantize 1536x576": lambda: quantize_nf4(weight, double=False, name="w"),
        "rms_norm 512x576": with_gradient(norm, randn(TOKENS, HIDDEN)),
        "swiglu 512x1536": with_gradient(
            _Gated.apply, randn(TOKENS, INTERMEDIATE), randn(TOKENS, INTERMEDIATE)
        ),
        "attention, samples of 100": attention(SEGMENTS),
        "attention, one of 512": attention([TOKENS]),
        "head and loss, 128 rows": with_gradient(
            lambda hidden: summed_cross_entropy(hidden, head, targets), randn(128, HIDDEN)
        ),
        "dropout 512x576, twice": lambda: (mask.times(x), mask.add_times(out, x)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=["avx2", "avx512", "avx512_bf16"])
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiers = [REFERENCE]
    for tier in arguments.tiers:
        try:
            find(environ={KERNELS_ENV: tier})
        except ConfigurationError as error:
            print(error)
            continue
        tiers.append(tier)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread; microseconds")
    for dtype in (torch.float32, torch.bfloat16):
        for name, work in works(dtype).items():
            if arguments.only not in name:
                continue
            times: dict[str, list[float]] = {tier: [] for tier in tiers}
            for number in range(arguments.rounds + 2):
                for tier in tiers:
                    os.environ[KERNELS_ENV] = tier
                    loaded.cache_clear()
                    loaded()
                    start = time.thread_time()  # what other programs take meanwhile does not count
                    work()
                    if number >= 2:  # the first two warm up
                        times[tier].append(time.thread_time() - start)
            row = "  ".join(f"{tier} {statistics.median(t) * 1e6:.0f}" for tier, t in times.items())
            print(f"{str(dtype).removeprefix('torch.'):>8}  {name:<26} {row}", flush=True)


if __name__ == "__main__":
    main()
