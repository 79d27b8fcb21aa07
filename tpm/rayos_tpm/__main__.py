"""`python -m tpm`: a stranger's tools, which need files and no service."""

import sys

from rayos_tpm.verify import main

sys.exit(main(sys.argv[1:]))
