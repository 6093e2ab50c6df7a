"""Small modules of odd shapes, and models of several stacks."""

from typing import Any

import torch
from support import zoo
from support.random_models import randomise
from torch import Tensor, nn

REFUSED = {
    "resnet": "does not look like a transformer",
    # A convolution between blocks writes the stream from the embeddings.
    "deberta_v2_conv": "encoder.conv",
}


# ---- blocks written to mislead


class Plain(nn.Module):
    """x + f(norm(x)) twice, f the attention or the MLP; `how` says how the sum is made."""

    def __init__(self, how: str, width: int = 16) -> None:
        super().__init__()
        self.how = how
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.hidden = nn.Linear(width, 32), nn.Linear(32, width), nn.Linear(width, width)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def join(self, x: Tensor, branch: Tensor) -> Tensor:  # noqa: PLR0911
        match self.how:
            case "sum":
                return sum([x, branch])  # type: ignore[return-value]
            case "in place":
                return x.clone().add_(branch)
            case "in place of the branch":
                branch += x
                return branch
            case "in place, returned by name":
                branch.add_(x)
                return branch
            case "alpha":
                return torch.add(x, branch, alpha=0.5)
            case "shift by a number":  # 0 with every branch off, so that only the last check sees it
                y = x + branch
                return y + float((x - y).square().mean())
            case "sub":
                return x - branch
            case "lerp":
                return torch.lerp(x, branch, 0.5)
            case "stack":
                return torch.stack([x, branch]).sum(0)
            case "addcmul":
                return torch.addcmul(x, branch, branch.new_ones(1))
            case "highway":
                gate = torch.sigmoid(self.hidden(x))
                return gate * x + (1 - gate) * branch
            case "out":
                out = torch.empty_like(x)
                return torch.add(x, branch, out=out)
        return x + branch

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(x, self.attention(self.norm1(x)))
        y = self.join(x, self.down(self.up(self.norm2(x)).relu()))
        if self.how == "third path":  # through numpy, which no torch function sees
            y = y + 0.1 * torch.from_numpy(x.detach().numpy().copy())
        return y


class Stack(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Plain(how) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


class Odd(Plain):
    """Attention by hand: `how` says in which layout the patterns are, or what they look at."""

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)) for t in self.qkv(x).chunk(3, -1))  # (B, T, H, d)
        if self.how == "tokens before heads":
            scores = torch.einsum("bthd,bshd->bths", q, k).softmax(-1)
            return self.out(torch.einsum("bths,bshd->bthd", scores, v).flatten(2))
        if self.how == "heads before batch":
            scores = torch.einsum("bthd,bshd->hbts", q, k).softmax(-1)
            return self.out(torch.einsum("hbts,bshd->bthd", scores, v).flatten(2))
        scores = torch.einsum("bthd,bshd->bhts", q, k)
        if self.how == "forward only":
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).tril(-1).bool(), -1e9)
        return self.out(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.down(self.up(self.norm2(x)).relu())
        return x + (y * self.hidden(x).softmax(-1) if self.how == "router" else y)


# ---- several stacks in one model, and blocks named by hand


def t5() -> Any:
    import transformers

    config = transformers.T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64, vocab_size=100)
    model = transformers.T5ForConditionalGeneration(config).eval()
    randomise(model, torch.float32)
    return model


def clip() -> tuple[Any, dict[str, Tensor]]:
    import transformers

    text = zoo.BERT | {"num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=zoo.VIT, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    randomise(model, torch.float32)
    torch.manual_seed(0)
    return model, {
        "input_ids": torch.randint(10, 100, (2, 7)),
        "pixel_values": torch.randn(2, 3, 32, 32),
    }
