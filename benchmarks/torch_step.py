"""The same network and step in PyTorch, channels last: what JAX is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NETWORKS = ("cifar_resnet", "resnet50")


def make(
    network: str, shape: tuple[int, int, int, int], blocks: int, dtype: str
) -> Callable[[], Any]:
    """Returns a training step on random images; what it returns can be waited for.

    Args:
        network: of `NETWORKS`; resnet50 is torchvision's.
        shape: ``[N, 3, H, W]``.
        blocks: n of the ResNet of 6n + 2 layers.
        dtype: float32, or bfloat16 by autocast.

    Raises:
        ValueError: PyTorch is not installed.
    """
    try:
        import torch
        from torch.nn import functional as F
    except ImportError as error:
        raise ValueError("--torch needs PyTorch: pip install torch.") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True  # XLA tries cuDNN's algorithms, too
    model = _resnet50() if network == "resnet50" else _cifar_resnet(blocks)
    model = model.to(device, memory_format=torch.channels_last)
    images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, shape[:1], device=device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4
    )

    def step() -> _Loss:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return _Loss(loss)

    return step


class _Loss:
    """Waits for the device as a JAX array does."""

    def __init__(self, loss: Any):
        self._loss = loss

    def block_until_ready(self) -> None:
        self._loss.item()


def _resnet50() -> Any:
    try:
        from torchvision.models import resnet50
    except ImportError as error:
        raise ValueError(
            "--torch with resnet50 needs torchvision: pip install torchvision."
        ) from error
    return resnet50(num_classes=10)


def _cifar_resnet(blocks: int) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional as F

    def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int, first: bool):
            super().__init__()
            self.norm1 = nn.Identity() if first else nn.BatchNorm2d(inputs)
            self.first, self.stride, self.extra = first, stride, outputs - inputs
            self.conv1 = conv(inputs, outputs, stride)
            self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x if self.first else F.relu(self.norm1(x))
            y = self.conv2(F.relu(self.norm2(self.conv1(y))))
            if self.stride > 1:
                x = F.avg_pool2d(x, self.stride)
            pad = self.extra // 2
            return y + F.pad(x, (0, 0, 0, 0, pad, self.extra - pad))

    widths, layers, inputs = (16, 32, 64), [], 16
    for stage, width in enumerate(widths):
        for index in range(blocks):
            stride = 2 if stage and not index else 1
            layers.append(Block(inputs, width, stride, first=not stage and not index))
            inputs = width
    return nn.Sequential(
        conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(), *layers, nn.BatchNorm2d(64),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
