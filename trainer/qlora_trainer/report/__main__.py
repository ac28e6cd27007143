"""Write report.html anew from what a job's folder holds.

python -m qlora_trainer.report FOLDER        for `qlora report`; prints the path. QLORA_PRICE is the price.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_contract.cost import parse_price
from qlora_contract.env import PRICE_ENV
from qlora_trainer.errors import TrainerError
from qlora_trainer.report.files import write_page


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Write the page; the exit status: 1 where there is nothing to report or no space, 2 for wrong arguments."""
    if len(arguments) != 1:
        print("usage: python -m qlora_trainer.report FOLDER", file=sys.stderr)
        return 2
    try:
        price = parse_price(environ[PRICE_ENV]) if environ.get(PRICE_ENV) else None
        path = write_page(Path(arguments[0]), price)
    except (TrainerError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if path is None:
        print(f"{arguments[0]} holds no job that has made a step", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
