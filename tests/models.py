"""Networks that people deploy, with seeded weights, and a photograph to run them on.

The architectures are those of the papers named at each; `width` divides their channels, for tests
that must be quick. Weights are random, so that outputs say nothing about the photograph, but they
pass through every layer at a scale that float16 holds.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 100


def normalised(channels, filters, kernel=3, stride=1, groups=1, activation=nn.ReLU):
    """A convolution without bias, batch normalisation, and what makes it non-linear."""
    conv = nn.Conv2d(
        channels, filters, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False
    )
    layers = [("conv", conv), ("norm", nn.BatchNorm2d(filters))]
    if activation is not None:
        layers.append(("activation", activation()))
    return nn.Sequential(OrderedDict(layers))


class Bottleneck(nn.Module):
    def __init__(self, channels, middle, stride):
        super().__init__()
        self.body = nn.Sequential(
            normalised(channels, middle, 1),
            normalised(middle, middle, 3, stride),
            normalised(middle, 4 * middle, 1, activation=None),
        )
        narrow = stride == 1 and channels == 4 * middle
        self.shortcut = (
            nn.Identity()
            if narrow
            else normalised(channels, 4 * middle, 1, stride, activation=None)
        )

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50(width=1):
    """He et al., Deep Residual Learning, 2016; strides in the 3 x 3 convolutions, as PyTorch's."""
    channels = 64 // width
    layers = [normalised(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, blocks in enumerate((3, 4, 6, 3)):
        middle = (64 << stage) // width
        for block in range(blocks):
            layers.append(Bottleneck(channels, middle, 2 if stage and not block else 1))
            channels = 4 * middle
    return nn.Sequential(*layers, *head(channels))


def head(channels):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)


def vgg_trunk(width=1, pools=5):
    """The convolutions of configuration D up to a pooling, as a list; and their channels."""
    layers, channels = [], 3
    for stage, convolutions in enumerate((2, 2, 3, 3, 3)):
        filters = min(64 << stage, 512) // width
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
            channels = filters
        if stage < pools:
            # SSD keeps the last column and row: 75 becomes 38.
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=pools < 5 and stage == 2))
    return layers, channels


def vgg16(width=1):
    """Simonyan and Zisserman, Very Deep Convolutional Networks, 2015, configuration D.

    Without its two large matrix products, which are not convolutions and hold most of its weights.
    """
    layers, channels = vgg_trunk(width)
    return nn.Sequential(*layers, *head(channels))


class Inverted(nn.Module):
    def __init__(self, channels, filters, stride, expansion):
        super().__init__()
        middle = channels * expansion
        first = [] if expansion == 1 else [normalised(channels, middle, 1, activation=nn.ReLU6)]
        self.body = nn.Sequential(
            *first,
            normalised(middle, middle, 3, stride, middle, nn.ReLU6),
            normalised(middle, filters, 1, activation=None),
        )
        self.adds = stride == 1 and channels == filters

    def forward(self, x):
        return x + self.body(x) if self.adds else self.body(x)


# Expansion, filters, blocks, stride of the first.
_INVERTED = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


def mobilenet_v2(width=1):
    """Sandler et al., MobileNetV2, 2018, table 2."""
    channels = 32 // width
    layers = [normalised(3, channels, 3, 2, activation=nn.ReLU6)]
    for expansion, filters, blocks, stride in _INVERTED:
        for block in range(blocks):
            wanted = filters // width
            layers.append(Inverted(channels, wanted, stride if block == 0 else 1, expansion))
            channels = wanted
    last = 1280 // width
    return nn.Sequential(*layers, normalised(channels, last, 1, activation=nn.ReLU6), *head(last))


class UNet(nn.Module):
    """Ronneberger et al., U-Net, 2015, with padding, so that outputs have the size of inputs."""

    def __init__(self, width=1):
        super().__init__()
        sizes = [(64 << level) // width for level in range(5)]
        pairs = zip([3, *sizes], sizes, strict=False)
        self.down = nn.ModuleList(self.double(channels, filters) for channels, filters in pairs)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(below, above, 2, 2)
            for below, above in zip(sizes[:0:-1], sizes[-2::-1], strict=True)
        )
        self.merge = nn.ModuleList(self.double(2 * n, n) for n in sizes[-2::-1])
        self.last = nn.Conv2d(sizes[0], 2, 1)

    @staticmethod
    def double(channels, filters):
        return nn.Sequential(
            nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(),
            nn.Conv2d(filters, filters, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x):
        kept = []
        for level, double in enumerate(self.down):
            x = double(x if level == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for up, merge, other in zip(self.up, self.merge, kept[-2::-1], strict=True):
            x = merge(torch.cat([other, up(x)], 1))
        return self.last(x)


class SSD300(nn.Module):
    """Liu et al., SSD, 2016, at 300 x 300: a VGG trunk, conv6 with holes, six maps of boxes.

    Without the normalisation of its first map.
    """

    BOXES, OBJECTS = (4, 6, 6, 6, 4, 4), 21

    def __init__(self, width=1):
        super().__init__()
        trunk, channels = vgg_trunk(width, pools=4)
        # Up to conv4_3 with its ReLU; the pooling after it begins the second part.
        self.one, self.two = nn.Sequential(*trunk[:23]), nn.Sequential(*trunk[23:])
        wide = 1024 // width
        self.six = nn.Sequential(
            nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(channels, wide, 3, padding=6, dilation=6), nn.ReLU(),
            nn.Conv2d(wide, wide, 1), nn.ReLU(),
        )  # fmt: skip
        maps, self.extra = [channels, wide], nn.ModuleList()
        for middle, filters, stride, padding in (
            (256, 512, 2, 1), (128, 256, 2, 1), (128, 256, 1, 0), (128, 256, 1, 0),
        ):  # fmt: skip
            middle, filters = middle // width, filters // width
            self.extra.append(
                nn.Sequential(
                    nn.Conv2d(maps[-1], middle, 1),
                    nn.ReLU(),
                    nn.Conv2d(middle, filters, 3, stride, padding),
                    nn.ReLU(),
                )
            )
            maps.append(filters)
        self.boxes, self.classes = (
            nn.ModuleList(
                nn.Conv2d(n, boxes * values, 3, padding=1)
                for n, boxes in zip(maps, self.BOXES, strict=True)
            )
            for values in (4, self.OBJECTS)
        )

    def forward(self, x):
        """Boxes and scores of all maps, ``[N, 8732 * (4 + 21)]`` at 300 x 300."""
        maps = [self.one(x)]
        maps.append(self.six(self.two(maps[0])))
        for extra in self.extra:
            maps.append(extra(maps[-1]))
        found = []
        for each, boxes, classes in zip(maps, self.boxes, self.classes, strict=True):
            found += [boxes(each).flatten(1), classes(each).flatten(1)]
        return torch.cat(found, 1)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = (
            nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        )  # fmt: skip

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """Over channels, which come second."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext_tiny(width=1):
    """Liu et al., A ConvNet for the 2020s, 2022."""
    sizes = [n // width for n in (96, 192, 384, 768)]
    layers = [nn.Conv2d(3, sizes[0], 4, 4), ChannelNorm(sizes[0])]
    for stage, blocks in enumerate((3, 3, 9, 3)):
        if stage:
            layers += [
                ChannelNorm(sizes[stage - 1]),
                nn.Conv2d(*sizes[stage - 1 : stage + 1], 2, 2),
            ]
        layers += [ConvNeXtBlock(sizes[stage]) for _ in range(blocks)]
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, *pooled, nn.LayerNorm(sizes[-1]), nn.Linear(sizes[-1], CLASSES))


#: By name: how each is made, and the side of its usual input.
MODELS = {
    "resnet50": (resnet50, 224),
    "vgg16": (vgg16, 224),
    "mobilenet_v2": (mobilenet_v2, 224),
    "unet": (UNet, 256),
    "ssd300": (SSD300, 300),
    "convnext_tiny": (convnext_tiny, 224),
}


def model(name, width=1):
    """One of MODELS in evaluation mode, with weights that are the same every time."""
    torch.manual_seed(0)
    made = MODELS[name][0](width)
    for module in made.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.1, 0.1)
        elif isinstance(module, nn.BatchNorm2d):
            # The last of a residual block is small, so that sums of many stay in range.
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return made.eval()


def folded(made):
    """The model with batch normalisation within its convolutions, as deployers have it; in place.

    By PyTorch's own function.
    """
    for module in list(made.modules()):
        if hasattr(module, "norm") and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return made


def photograph(side, batch=1):
    """``[batch, 3, side, side]`` of about unit scale: a portrait that Matplotlib ships.

    Further images of a batch are the first one, turned sideways by some columns.
    """
    import numpy as np
    from matplotlib import cbook
    from PIL import Image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB").resize((side, side))
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255.0
    mean, spread = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    pixels = (pixels - mean) / spread
    return torch.stack([pixels.roll(7 * n, 2) for n in range(batch)])
