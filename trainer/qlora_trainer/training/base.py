"""The base model of a rank: mapped from an image that its pod has found or made in the workspace, else its own."""

import logging
import time
from pathlib import Path

import torch

from qlora_contract.paths import resolve
from qlora_contract.progress import Work
from qlora_contract.quantization import is_mapped
from qlora_contract.units import format_bytes
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.image_cache import ImageCache, Mapped
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.weight_files import WeightsHash, weight_files
from qlora_trainer.quantization.schemes import scheme_of
from qlora_trainer.training.context import RankContext

log = logging.getLogger(__name__)

WAITING_SECONDS = 0.2
"""Between two looks for what another rank of the pod makes."""


def image_cache(context: RankContext, model_folder: Path, dtype: torch.dtype) -> ImageCache:
    """The images of a job's model. `dtype`: what is computed in."""
    run, world = context.run, context.world
    workspace = resolve(run.workspace, context.volumes)
    return ImageCache(
        workspace, (run.job.uid, run.job.attempt, world.pod), model_folder, run.quantization, dtype
    )


def pods_that_map(
    context: RankContext, model_folder: Path, dtype: torch.dtype, size: int, space: int
) -> dict[int, bool]:
    """Pod -> whether its ranks will map the base, alike on every rank.

    Args:
        context: this rank's.
        model_folder: the job's model.
        dtype: what is computed in.
        size: bytes that the image will take, about.
        space: bytes that the job needs besides.
    """
    mine = None
    if context.world.local_rank == 0:
        mine = is_mapped(context.run.quantization, context.world.local_size) and image_cache(
            context, model_folder, dtype
        ).can_keep(size, size + space)
    of_ranks = context.group.all_gather_object([context.world.pod, mine])
    return {pod: maps for pod, maps in of_ranks if maps is not None}


def load_base(
    context: RankContext, model_folder: Path, dtype: torch.dtype, *, mapped: bool
) -> tuple[BaseModel, str]:
    """The base, and the hash of its weights, which the first rank of each pod takes for all of them.

    Args:
        context: this rank's.
        model_folder: the job's model.
        dtype: what is computed in.
        mapped: whether the ranks of this pod map it (`pods_that_map`).

    Raises:
        ModelError: the weights cannot be used.
    """
    weights = sum(file.stat().st_size for file in weight_files(model_folder))
    context.progress.begin(Work(name="loading the model", unit="bytes", total=weights))
    image = _image(context, image_cache(context, model_folder, dtype)) if mapped else None
    if image is not None:
        context.mapped_bytes = image.nbytes
        model, digest = image.model(dtype), image.weights_sha256
    else:
        weights_hash = WeightsHash(torch.get_num_threads()) if context.world.local_rank == 0 else None
        scheme = scheme_of(context.run.quantization)
        model = load_model(model_folder, scheme, dtype, context.advance, weights_hash)
        digest = weights_hash.hexdigest() if weights_hash else ""
    context.progress.begin(None)
    of_ranks = context.group.all_gather_object([context.world.pod, digest])
    hashes = {pod: theirs for pod, theirs in of_ranks if theirs}
    return model, hashes[context.world.pod]


def _image(context: RankContext, cache: ImageCache) -> Mapped | None:
    """The image, found or made by the first rank of the pod, for which the others wait; None: it cannot be kept."""
    group, threads = context.group, torch.get_num_threads()
    done = f"model of pod {context.world.pod}"
    if context.world.local_rank > 0:
        while (key := group.told(done)) is None:
            context.advance(0)
            time.sleep(WAITING_SECONDS)
        return cache.read(key, threads, check=False) if key else None
    key = cache.known()
    image = cache.read(key, threads, context.advance) if key else None
    found = image is not None
    if image is None and (key := cache.write(threads, context.advance)) is not None:
        image = cache.read(key, threads, check=False)  # its digests were taken a moment ago
    group.tell(done, key if key is not None and image is not None else "")
    if image is not None:
        how = "found there, and the model's files have not changed since" if found else "made now"
        log.info("the model is mapped: %s of %s, %s", format_bytes(image.nbytes), cache.folder, how)
    return image
