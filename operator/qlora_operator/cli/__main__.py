"""The command without its script: `python -m qlora_operator.cli`."""

import sys

from qlora_operator.cli.main import main

sys.exit(main())
