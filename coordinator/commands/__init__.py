"""What the command line does: a module or a package for each command, called by `coordinator.cli`.

Each command has one function that takes plain values and returns the exit code. Results go to
stdout, progress to stderr; what goes wrong is raised and shown by `coordinator.cli` in one line.
"""

from __future__ import annotations
