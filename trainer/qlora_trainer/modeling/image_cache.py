"""The images of a workspace: a model is quantized once, and mapped by all ranks of a pod and by later jobs.

    cache/models/<key>/        an image (modeling.image)
    cache/weights/<state>      WeightsHash of a model, by the state that its files were in when they were read

The key is a hash of everything that decides about an image, the weights' own hash among it: another revision of a
model at the same path is another image. To find an image without reading the weights again, their hash is looked up by
the state of their files (weight_files.state_of_files). What a job records is the hash of the weights that its image was
made of: it is true of what was trained on, even where the files have changed since without a trace in their state.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from qlora_contract import files
from qlora_contract.run_config import Quantization
from qlora_trainer import modeling, quantization
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.image import Damaged, Image, Table, describe
from qlora_trainer.modeling.loading import load_image, write_image
from qlora_trainer.modeling.weight_files import WeightsHash, state_of_files
from qlora_trainer.quantization import kernels
from qlora_trainer.quantization.schemes import scheme_of
from qlora_trainer.storage.cache import Cache, Use, Writer, code_digest

log = logging.getLogger(__name__)

FOLDER = "cache/models"
"""In a workspace."""
HASHES = "cache/weights"
"""In a workspace."""
SETTLED_SECONDS = 5.0
"""How long ago files must have changed for their state to be trusted: clocks of file systems tick in steps, and two
changes within one cannot be told apart."""
FORGOTTEN_SECONDS = 90 * 86_400
"""After which a hash that nobody has asked for is removed."""
LIBRARIES = ("numpy", "safetensors", "torch", "transformers")


class ImageCache:
    """The images of a workspace, as one process of a job uses them."""

    def __init__(
        self, workspace: Path, writer: Writer, model: Path, settings: Quantization, dtype: torch.dtype
    ) -> None:
        """The images of one model, quantized in one way.

        Args:
            workspace: of the job.
            writer: who this process is.
            model: the model's folder.
            settings: the job's.
            dtype: what is computed in; an unquantized model is kept in it.
        """
        self.folder = workspace / FOLDER
        self._hashes = workspace / HASHES
        self._model = model
        self._settings = settings
        self._dtype = dtype
        self._cache = Cache(
            self.folder,
            writer,
            "the prepared model",
            "each rank prepares the model, and has it in memory for itself",
        )

    def known(self) -> str | None:
        """The key of the image, if there is one and the state of the model's files tells; nothing is checked."""
        state, _ = state_of_files(self._model)
        path = self._hashes / state
        try:
            weights = path.read_text()
        except (OSError, UnicodeDecodeError):
            return None
        if not re.fullmatch("[0-9a-f]{64}", weights):
            return None
        with suppress(OSError):
            os.utime(path)  # as of its last use
        key = self.key(weights)
        return key if (self.folder / key).is_dir() else None

    def can_keep(self, size: int, room: int) -> bool:
        """Whether there is an image, or one can be written; logs why not. Arguments as of Cache.make_room."""
        return self.known() is not None or self._cache.make_room(size, room)

    def read(
        self, key: str, threads: int, advance: Callable[[int], None] = lambda _: None, *, check: bool = True
    ) -> "Mapped | None":
        """The image under a key; None when there is none that is whole.

        Args:
            key: by `known` or `write`.
            threads: that check it.
            advance: called now and then with 0; it may raise.
            check: whether to compare the digests of the weights: once a pod is enough.
        """
        use = self._cache.use(key)
        try:
            image = Image.open(self.folder / key, key)
            if check:
                image.check(threads, advance)
        except FileNotFoundError as error:
            if use is not None:
                self._cache.discard(key, use, f"{Path(error.filename).name} is gone")
            return None
        except Damaged as error:
            self._cache.discard(key, use, str(error))
            return None
        return Mapped(image, use, self._model)

    def write(self, threads: int, advance: Callable[[int], None] = lambda _: None) -> str | None:
        """Make an image of the model; its key, or None when it cannot be kept here, which is logged.

        Args:
            threads: that take digests.
            advance: as load_model has it.

        Raises:
            ModelError: the weights cannot be used.
        """
        written = ""

        def make(folder: Path) -> tuple[str, dict[str, object]]:
            nonlocal written
            before, changed = state_of_files(self._model)
            began = time.time()
            weights_hash = WeightsHash(threads)
            table: Table = write_image(
                self._model, scheme_of(self._settings), self._dtype, folder, advance, weights_hash
            )
            weights = weights_hash.hexdigest()
            if changed < began - SETTLED_SECONDS and state_of_files(self._model)[0] == before:
                self._remember(before, weights)
            written = self.key(weights)
            return written, describe(folder, written, weights, table, threads)

        return written if self._cache.write(make) else None

    def key(self, weights_sha256: str) -> str:
        """What the image of these weights is called."""
        config = self._model / "config.json"
        parts = {
            "code": code_digest(Path(modeling.__path__[0]), Path(quantization.__path__[0])),
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "weights": weights_sha256,
            # It says what the weights are stored in, and in which order some of them are.
            "config": hashlib.sha256(config.read_bytes() if config.is_file() else b"").hexdigest(),
            "quantization": self._settings.model_dump(mode="json"),
            # One that is quantized serves every dtype.
            "dtype": str(self._dtype) if self._settings.scheme == "none" else None,
            "kernels": kernels.name(self._settings.scheme),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]

    def _remember(self, state: str, weights_sha256: str) -> None:
        with suppress(OSError):  # it costs the next start time, no more
            self._hashes.mkdir(parents=True, exist_ok=True)
            files.write_atomically(self._hashes / state, weights_sha256)
            for path in self._hashes.iterdir():
                if time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS:
                    path.unlink(missing_ok=True)


class Mapped:
    """An image that is in use."""

    def __init__(self, image: Image, use: Use | None, model: Path) -> None:
        self._image = image
        self._use = use
        self._model = model
        self.weights_sha256 = image.weights_sha256
        """WeightsHash of the model that the image was made of."""
        self.nbytes = image.nbytes

    def model(self, dtype: torch.dtype) -> BaseModel:
        """The model, mapped, in use as long as there is a reference to it. `dtype`: what is computed in."""
        model = load_image(self._model, self._image, dtype)
        model.use = self._use
        return model
