"""Models of a test's own blocks."""

from torch import Tensor, nn


class Net(nn.Module):
    """Words of 16 numbers, then the blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(20, 16), nn.ModuleList(blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x
