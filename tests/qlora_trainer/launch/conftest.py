"""The recorded machines of the host's tests, on which layouts are tested, too."""

import runpy
from pathlib import Path

machines = runpy.run_path(str(Path(__file__).parents[1] / "host" / "conftest.py"))["machines"]
