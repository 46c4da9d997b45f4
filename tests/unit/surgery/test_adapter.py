"""A LoRA goes onto the blocks of a family's stacks and onto nothing else."""

from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from ppcl.surgery.adapter import add_lora


class Model(nn.Module, ConfigMixin, PeftAdapterMixin):
    """A stack `blocks`, and another of that name within a module."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"ff": nn.Linear(4, 4)}) for _ in range(2)])
        self.encoder = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"ff": nn.Linear(4, 4)})])})


def test_a_stack_whose_name_ends_anothers_is_told_apart():
    for stacks, expected in (
        (["blocks"], {"blocks.0.ff", "blocks.1.ff"}),
        (["encoder.blocks"], {"encoder.blocks.0.ff"}),
    ):
        model = Model()
        add_lora(type("Named", (), {"stacks": stacks}), model, 2, seed=0)
        found = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert found == expected
