"""Tensors as safetensors files."""

import os
import re
import stat
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qlora_contract.files import sync_file


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that any new file gets, and make it durable.

    Args:
        tensors: name -> tensor of any shape and strides.
        path: the file; replaced if there is one.
        metadata: of the file's header.

    Raises:
        OSError: the system's error, such as a full disk, which safetensors wraps into one of its own.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(mode)  # safetensors makes it readable by its owner alone
    sync_file(path)
