"""What the width-pruned models of all families share; an export carries it within the file of its model."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualLinear(nn.Linear):
    """x + W x + b, which starts as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def width_roles(
    num_layers: int, pruned_text: list[int], pruned_ffn: list[int], text_output: str, keep_text_query: bool
) -> list[dict[str, bool] | None]:
    """Keyword arguments of a pruned dual-stream block, per block of a stack; None where the stock block stays.

    `text_output`: `last`, one ehs_proj at the end of a run of text-pruned blocks, or `each` block its own.
    """
    text, ffn = set(pruned_text), set(pruned_ffn)
    roles: list[dict[str, bool] | None] = []
    for index in range(num_layers):
        carry = index + 1 in text
        role = {
            "project_text": index in text,
            "project_text_output": index in text and (text_output == "each" or not carry),
            "project_ffn": index in ffn,
            "carry": carry,
        }
        any_role = any(role.values())
        role["keep_text_query"] = keep_text_query and index in text
        roles.append(role if any_role else None)
    return roles
