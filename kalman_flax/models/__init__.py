"""The networks, written once for every normaliser."""

from kalman_flax.models import detection as detection
from kalman_flax.models.bottleneck_resnet import BottleneckResNet as BottleneckResNet
from kalman_flax.models.inception import InceptionV2 as InceptionV2
from kalman_flax.models.inception import SmallInception as SmallInception
from kalman_flax.models.network import Network as Network
from kalman_flax.models.nf_resnet import NFResNet as NFResNet
from kalman_flax.models.resnet import ResNet as ResNet
from kalman_flax.models.unet import UNet as UNet
