"""Eq. 8-9 over plain tensors: what the references of the pruned dual-stream models have in common."""

import torch
from torch.nn import functional as F

HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM


class PlainTensors:
    """Layers by the names of a teacher's state dict, for one sample."""

    def __init__(self, teacher, projectors):
        self.teacher, self.state = teacher, teacher.state_dict() | projectors

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def rms(self, name, x):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * self.state[f"{name}.weight"]

    def project(self, name, x):
        return x + self.linear(name, x)

    def modulation(self, name, temb):
        return self.linear(name, F.silu(temb)).split(WIDTH, dim=-1)

    @staticmethod
    def modulated(x, shift, scale):
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift

    def heads(self, name, norm, x, freqs):
        x = self.linear(name, x).view(len(x), HEADS, HEAD_DIM)
        if norm is None:
            return x
        turned = torch.view_as_complex(self.rms(norm, x).view(len(x), HEADS, -1, 2)) * freqs[:, None]
        return torch.view_as_real(turned).flatten(2)

    @staticmethod
    def attend(query, key, value):
        found = []
        for head in range(HEADS):
            weights = (query[:, head] @ key[:, head].T / HEAD_DIM**0.5).exp()
            found.append(weights / weights.sum(dim=-1, keepdim=True) @ value[:, head])
        return torch.cat(found, dim=-1)

    def joint_attention(self, attn, image_in, z, image_freqs, text_freqs, with_text):
        """What the image gets, and the text, of keys and values of both, text first."""
        key, value = (
            torch.cat([self.heads(f"{attn}.{of_text}", norms[0], z, text_freqs),
                       self.heads(f"{attn}.{of_image}", norms[1], image_in, image_freqs)])
            for of_text, of_image, norms in (
                ("add_k_proj", "to_k", (f"{attn}.norm_added_k", f"{attn}.norm_k")),
                ("add_v_proj", "to_v", (None, None)),
            )
        )  # fmt: skip
        query = self.heads(f"{attn}.to_q", f"{attn}.norm_q", image_in, image_freqs)
        of_image = self.linear(f"{attn}.to_out.0", self.attend(query, key, value))
        if not with_text:
            return of_image, None
        query = self.heads(f"{attn}.add_q_proj", f"{attn}.norm_added_q", z, text_freqs)
        return of_image, self.linear(f"{attn}.to_add_out", self.attend(query, key, value))

    def mlp(self, name, x):
        return self.linear(f"{name}.net.2", F.gelu(self.linear(f"{name}.net.0.proj", x), approximate="tanh"))


class PlainDualStream(PlainTensors):
    """A dual-stream block; names of its parts come from the model's own reference."""

    # Of an image block and of a text block: its modulation, its MLP.
    names: dict

    def __init__(self, teacher, projectors, text, ffn, text_output):
        super().__init__(teacher, projectors)
        self.text, self.ffn, self.text_output = text, ffn, text_output

    def feed_forward(self, block, stream, index, state, modulation):
        if index in self.ffn:
            return self.project(f"{block}.{'img' if stream == 'image' else 'txt'}_ffn_proj", state)
        shift, scale, gate = modulation[3:]
        return state + gate * self.mlp(f"{block}.{self.names[stream][1]}", self.modulated(state, shift, scale))

    def dual(self, index, image, h, temb_image, temb_text, image_freqs, text_freqs):
        name, pruned = f"transformer_blocks.{index}", index in self.text
        image_mod = self.modulation(f"{name}.{self.names['image'][0]}", temb_image)
        text_mod = () if pruned else self.modulation(f"{name}.{self.names['text'][0]}", temb_text)
        if pruned:
            z = self.project(f"{name}.txt_proj", self.z)
        else:
            self.z = z = self.modulated(h, *text_mod[:2])
        image_in = self.modulated(image, *image_mod[:2])
        attended = self.joint_attention(f"{name}.attn", image_in, z, image_freqs, text_freqs, not pruned)
        image = self.feed_forward(name, "image", index, image + image_mod[2] * attended[0], image_mod)
        if pruned:
            if self.text_output == "each" or index + 1 not in self.text:
                h = self.project(f"{name}.ehs_proj", h)
            return image, h
        return image, self.feed_forward(name, "text", index, h + text_mod[2] * attended[1], text_mod)
