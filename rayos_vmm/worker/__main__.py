"""`python -P -m rayos_vmm.worker`: a VM's keeper."""

import sys

from rayos_vmm.worker.keeper import main

sys.exit(main())
