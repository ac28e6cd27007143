"""`python -m qlora_operator.kubectl`."""

import sys

from qlora_operator.kubectl.main import main

if __name__ == "__main__":
    sys.exit(main())
