"""The experiments. Run them from the repository's root, as `python -m experiments.pareto.run`."""

from ppcl.quiet import quiet_messages

quiet_messages()  # before the modules here import torch and diffusers
