"""A residual network for small images."""

from torch import Tensor, nn

from models.layers import Factory, build_activation, build_image_norm
from models.outputs import Outputs


class ResNet(nn.Module):
    """The residual network for CIFAR of "Deep Residual Learning", arXiv 1512.03385, section 4.2.

    A 3×3 convolution, three stages of residual blocks at full, half and quarter resolution with
    `width`, 2·`width` and 4·`width` channels, the mean over positions, and a classifier. Width 16
    and depth 3, 5, 9, 18 are the paper's ResNet-20, 32, 56 and 110, but for projections (its
    option B) where a stage changes the shape. Weights as there: He's normal initialisation.

    Args:
        in_channels: of the images, which may have any size from 4×4.
        num_classes: classes to tell apart.
        width: channels of the first stage.
        depth: residual blocks per stage; 6·depth + 2 layers.
        activation: of any shape, or of channels on the last dimension.
        norm: factory `(channels)`; torch's image norms, or one on the last dimension.
        head: factory `(in_features, out_features)`.
        preactivation: norm and activation before the convolutions instead of after them, and once
            more at the end, as in "Identity Mappings in Deep Residual Networks", arXiv 1603.05027.
        shortcuts: whether blocks have them; without, they are plain pairs of convolutions, as the
            `noshort` networks of "Visualizing the Loss Landscape of Neural Nets", arXiv 1712.09913.

    Returns `hidden` (batch, 4·width) and `classifier`; `logits` (batch, num_classes).

    Raises:
        ValueError: when `width` or `depth` is below 1, or for `preactivation` without shortcuts.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int,
        depth: int,
        activation: Factory,
        norm: Factory,
        head: Factory,
        preactivation: bool = False,
        shortcuts: bool = True,
    ) -> None:
        super().__init__()
        for name, value in {"width": width, "depth": depth}.items():
            if value < 1:
                raise ValueError(f"model.{name}: must be at least 1, got {value}")
        if preactivation and not shortcuts:
            raise ValueError("model.shortcuts: blocks with preactivation have them")
        block = PreActivationBlock if preactivation else ResidualBlock
        self.stem = nn.Sequential(conv3x3(in_channels, width, stride=1))
        if not preactivation:
            self.stem.append(build_image_norm(norm, width))
            self.stem.append(build_activation(activation, width, images=True))
        blocks, channels = [], width
        for stage, stage_width in enumerate((width, 2 * width, 4 * width)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(block(channels, stage_width, stride, activation, norm))
                channels = stage_width
        if preactivation:
            blocks.append(build_image_norm(norm, channels))
            blocks.append(build_activation(activation, channels, images=True))
        if not shortcuts:
            for residual in blocks:
                residual.shortcut = Nothing()
        self.blocks = nn.Sequential(*blocks)
        self.head = head(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor) -> Outputs:
        hidden = self.blocks(self.stem(pixel_values)).mean(dim=(2, 3))
        return Outputs(hidden=hidden, classifier=self.head)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: `(batch, channels, height, width)` in and out."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, activation: Factory, norm: Factory
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.norm1 = build_image_norm(norm, channels)
        self.activation1 = build_activation(activation, channels, images=True)
        self.conv2 = conv3x3(channels, channels, stride=1)
        self.norm2 = build_image_norm(norm, channels)
        self.activation2 = build_activation(activation, channels, images=True)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, build_image_norm(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(self.norm1(self.conv1(x)))
        return self.activation2(self.norm2(self.conv2(y)) + self.shortcut(x))


class Nothing(nn.Module):
    """A shortcut that adds 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


class PreActivationBlock(nn.Module):
    """Norm, activation and 3×3 convolution, twice, beside a shortcut, which where it changes the
    shape projects the first activation: `(batch, channels, height, width)` in and out."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, activation: Factory, norm: Factory
    ) -> None:
        super().__init__()
        self.norm1 = build_image_norm(norm, in_channels)
        self.activation1 = build_activation(activation, in_channels, images=True)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.norm2 = build_image_norm(norm, channels)
        self.activation2 = build_activation(activation, channels, images=True)
        self.conv2 = conv3x3(channels, channels, stride=1)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(self.activation2(self.norm2(self.conv1(y)))) + shortcut


def conv3x3(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
