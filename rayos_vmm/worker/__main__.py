"""`python -P -m rayos_vmm.worker`: the parent of all keepers of a service."""

import sys

from rayos_vmm.worker.spawner import main

sys.exit(main())
