"""The methods that DiER is compared with, and the sizes they come in.

    dier                the program's own
    dier-notime         the same network, its encoder always called with t = 0: one vector for all
                        noise levels, and nothing else changed
    dier-unet           DiER's encoder on Diff-AE's U-Net; dier-unet-notime: with t = 0
    diffae              Diff-AE, the paper's baseline (unet.py)
    mae, lmim, dmjd     masked image modelling on a ViT (masked.py)
    supervised          DiER's encoder at t = 0, trained on labels: a ceiling, not a competitor

Each is a module as runs.py:Method describes it: encoder(x0, t) -> v, and a forward that guesses the
noise or is its own loss. train.py's loop trains them, probe.py's functions probe them.

Presets: "paper" has Table 5 for U-Nets and Table 4's patch, width, depth and heads for ViTs; "cpu"
has DiER's cpu input sizes. On MNIST the cpu U-Nets cost 0.7 (diffae) to 1.5 times what DiER does,
MAE and LMIM a quarter of it, since three quarters of their tokens are hidden. The cpu ViTs have
width 128 and depth 4; 16 tokens (of 4 x 4 pixels) are an image of 16 pixels a side, 64 tokens one
of 32 or 64.

Shapes: B batch, C channels, H W pixels, V = 1024 length of v, K classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from appendix.masked import DMJD, LMIM, MAE, ViTConfig
from appendix.unet import UNetConfig, UNetMethod, VectorEncoder
from data import Split
from model import PRESETS, DiER, Encoder, ModelConfig, Preset, V
from runs import BASELINES, DIER, Method, fail, model_config

ROWS = (32, 64, 256)  # of Table 4
CPU_LR = 1e-3  # of every method but dier, dier-notime and supervised, which take DiER's


# ---------------------------------------------------------------------------- modules


class TimelessEncoder(Encoder):
    """DiER's encoder with the same parameters, always told that t = 0: (B, C, H, W), (B,) ->
    (B, V), the same for every t."""

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        """As the class says."""
        return super().forward(x0, torch.zeros_like(t))


class Supervised(nn.Module):
    """The same encoder and a linear classifier on v: x0 (B, C, H, W), index (B,) -> cross-entropy
    with the images' labels (B,)."""

    def __init__(self, cfg: ModelConfig, classes: int):
        super().__init__()
        self.encoder = TimelessEncoder(cfg)
        self.classifier = nn.Linear(V, classes)
        self.labels = torch.zeros(1, dtype=torch.int64)  # (N,), of the set that is trained on

    def forward(self, x0: Tensor, index: Tensor) -> Tensor:
        """As the class says."""
        labels = self.labels[index.to(self.labels.device)]  # (B,)
        logits = self.classifier(self.encoder(x0, torch.zeros_like(labels)))  # (B, K)
        return F.cross_entropy(logits.float(), labels, reduction="none")


def build_supervised(settings: dict[str, Any]) -> Supervised:
    """A classifier for the classes of the set; exits where it has none."""
    if not settings["classes"]:
        fail(f"{settings['data']} has no classes, and supervised needs them: lay it out as CLASS/*")
    return Supervised(model_config(settings), settings["classes"])


def give_labels(model: Supervised, split: Split) -> None:
    """Put the labels of the training set where the model is."""
    model.labels = torch.from_numpy(split.labels).to(model.classifier.weight.device)


# ---------------------------------------------------------------------------- sizes


def presets(model: Callable[[str, int | str], Any]) -> dict[str, dict[int | str, Preset]]:
    """A table like model.py:PRESETS with model(name, row) in each place; batches, epochs and
    minutes are DiER's, and so is the learning rate of the paper's rows."""
    table: dict[str, dict[int | str, Preset]] = {}
    for name, rows in PRESETS.items():
        table[name] = {}
        for row, dier in rows.items():
            lr = dier.lr if name == "paper" else CPU_LR
            own = model(name, row)
            table[name][row] = Preset(own, dier.batch_size, lr, dier.epochs, dier.minutes)
    return table


def by_row(paper: list, cpu: list) -> Callable[[str, int | str], Any]:
    """(name, row) -> the model of that preset and row, out of those of rows 32, 64 and 256; glyphs
    and mnist have 32's."""
    models = {"paper": dict(zip(ROWS, paper)), "cpu": dict(zip(ROWS, cpu))}
    return lambda name, row: models[name].get(row, models[name][ROWS[0]])


def diffae(size: int, mult: tuple, enc_mult: tuple, attention: tuple) -> UNetConfig:
    """A row of Table 5."""
    return UNetConfig(size, 3, 128, 2, enc_mult, attention, 128, 2, mult, attention)


def diffae_cpu(size: int, mult: tuple) -> UNetConfig:
    """Table 5 in small: the encoder has one level more, as there at 32 and 64 pixels."""
    enc_mult = (*mult, mult[-1])
    return UNetConfig(size, 3, 16, 1, enc_mult, (4,), 16, 1, mult, (4,), dropout=0.0)


DIFFAE = presets(by_row(
    [
        diffae(32, (1, 1, 2, 3, 4), (1, 1, 2, 3, 4, 4), (16, 8)),
        diffae(64, (1, 1, 2, 3, 4), (1, 1, 2, 3, 4, 4), (16, 8)),
        diffae(256, (1, 1, 2, 2, 3, 3, 4, 4), (1, 1, 2, 2, 3, 3, 4, 4), (32,)),
    ],
    [diffae_cpu(16, (1, 1, 2, 4)), diffae_cpu(32, (1, 1, 2, 4)), diffae_cpu(64, (1, 1, 2, 4, 8))],
))  # fmt: skip


def with_dier_encoder(name: str, row: int | str) -> UNetConfig:
    """The U-Net of DIFFAE with DiER's encoder of the same preset and row."""
    m, u = PRESETS[name][row].model, DIFFAE[name][row].model
    return UNetConfig(
        m.size, 3, m.base, m.blocks, m.mult, m.attention,
        u.unet_base, u.unet_blocks, u.unet_mult, u.unet_attention, m.enc_heads, m.dropout,
    )  # fmt: skip


# The decoders are light: half the width, and a third of the depth (half for the cpu sizes).
VIT = presets(by_row(
    [ViTConfig(32, 3, 2, 192, 12, 3, 96, 4), ViTConfig(64, 3, 4, 384, 12, 6, 192, 4),
     ViTConfig(256, 3, 8, 768, 16, 12, 384, 5)],
    [ViTConfig(16, 3, 4, 128, 4, 4, 64, 2), ViTConfig(32, 3, 4, 128, 4, 4, 64, 2),
     ViTConfig(64, 3, 8, 128, 4, 4, 64, 2)],
))  # fmt: skip
DIER_UNET = presets(with_dier_encoder)


# ---------------------------------------------------------------------------- all of them


def baseline(name: str, module: Any, table: dict, config: type = ModelConfig, **facts) -> Method:
    """A method whose module is made of a config alone, and whose commands are of baselines.py."""
    facts = {"build": lambda settings: module(model_config(settings, config)), **facts}
    command = f"{BASELINES} --method {name}"
    return Method(name, presets=table, train=command, probe=f"{command} --probe", **facts)


METHODS = {
    method.name: method
    for method in (
        DIER,
        baseline("dier-notime", partial(DiER, encoder=TimelessEncoder), PRESETS, timed=False,
                 recomputes=True),
        baseline("dier-unet", partial(UNetMethod, encoder=Encoder), DIER_UNET, UNetConfig),
        baseline("dier-unet-notime", partial(UNetMethod, encoder=TimelessEncoder), DIER_UNET,
                 UNetConfig, timed=False),
        baseline("diffae", partial(UNetMethod, encoder=VectorEncoder), DIFFAE, UNetConfig,
                 timed=False),
        *(baseline(name, module, VIT, ViTConfig, denoises=False, timed=False)
          for name, module in (("mae", MAE), ("lmim", LMIM), ("dmjd", DMJD))),
        baseline("supervised", None, PRESETS, build=build_supervised, prepare=give_labels,
                 denoises=False, timed=False),
    )
}  # fmt: skip


def method_of(settings: dict[str, Any]) -> Method:
    """The method of a run; exits where this program has none of that name."""
    if settings["method"] not in METHODS:
        fail(f"a run of {settings['method']}, which is none of {', '.join(METHODS)}")
    return METHODS[settings["method"]]
