"""The processes that serve a VM's devices: a keeper that holds every descriptor, a worker that does the work.

service ── launch.py ──> keeper (one a VM; outlives the service)
                           ├─ listens for QEMU, relays vhost-user, remembers what was negotiated
                           └─ worker (forked; may die at any instruction, its successor goes on)
"""
