"""One virtual machine: its life cycle, command line, process, agent and picture."""
