"""`python -m rayos_vmm.cli` is `rayos`."""

import sys

from rayos_vmm.cli.main import main

sys.exit(main())
