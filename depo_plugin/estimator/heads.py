"""The paper's scoring network: heads on a text's embedding. Their weights are always fp32.

Suffixes: B = prompts, T = tokens, E = the encoder's width, H = the trunk's width.
"""

import torch
from torch import nn

from depo_plugin.estimator.encoder import pool

NEAR_ZERO = 1e-3  # std of the output layers' initial weights: the first scores are within about 0.01 of 0.5


class ResidualBlock(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))); all layers have the same width."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x_BH: torch.Tensor) -> torch.Tensor:
        """Return x plus the output of the block's layers, (B, H)."""
        return x_BH + self.body(x_BH)


class DifficultyHeads(nn.Module):
    """A shared trunk and two heads on a text's embedding: score logit (pass rate) and confidence logit."""

    def __init__(self, width: int, hidden: int = 1024):
        """width: E; hidden: H, the trunk's width; its last layer has half of it (paper: 1024 and 512)."""
        super().__init__()
        half = hidden // 2
        self.trunk = nn.Sequential(
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            ResidualBlock(hidden),
            ResidualBlock(hidden),
            nn.Linear(hidden, half),
            nn.LayerNorm(half),
            nn.GELU(),
            nn.Dropout(0.1),
        )
        self.score_head = nn.Linear(half, 1)
        self.confidence_head = nn.Linear(half, 1)
        for head in (self.score_head, self.confidence_head):
            nn.init.normal_(head.weight, std=NEAR_ZERO)
            nn.init.zeros_(head.bias)

    def forward(self, pooled_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the score logits and the confidence logits, float32 (B,)."""
        x_BH = self.trunk(pooled_BE)
        return self.score_head(x_BH)[:, 0].float(), self.confidence_head(x_BH)[:, 0].float()


class DifficultyModel(nn.Module):
    """The encoder and the heads on its mean-pooled output, trained together."""

    def __init__(self, encoder: nn.Module, hidden: int = 1024):
        """Put untrained heads on an encoder. hidden: as in DifficultyHeads."""
        super().__init__()
        self.encoder = encoder
        self.heads = DifficultyHeads(encoder.config.hidden_size, hidden)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the score logits and the confidence logits, float32 (B,), from (B, T) tokens."""
        return self.heads(pool(self.encoder, input_ids, attention_mask))
