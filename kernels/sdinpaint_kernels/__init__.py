"""The operations on the models' hot path. They take tensors, and know no model."""

from sdinpaint_kernels.add_bias import add_bias
from sdinpaint_kernels.add_layer_norm import add_layer_norm, layer_norm
from sdinpaint_kernels.attention import attention
from sdinpaint_kernels.backend import is_functional, is_transformed
from sdinpaint_kernels.contents import Contents, contents, unchanged
from sdinpaint_kernels.conv3 import conv3
from sdinpaint_kernels.conv3_add import conv3_add
from sdinpaint_kernels.downsample_conv3 import downsample_conv3
from sdinpaint_kernels.geglu import geglu
from sdinpaint_kernels.group_norm import group_norm
from sdinpaint_kernels.heap import keeping_memory
from sdinpaint_kernels.linear import joint_linear, linear
from sdinpaint_kernels.linear_geglu import linear_geglu
from sdinpaint_kernels.pages import lies_in, private_maps, release
from sdinpaint_kernels.prepacked import forget, is_replaced, verified
from sdinpaint_kernels.upsample_conv3 import upsample_conv3

__all__ = [
    "Contents",
    "add_bias",
    "add_layer_norm",
    "attention",
    "contents",
    "conv3",
    "conv3_add",
    "downsample_conv3",
    "forget",
    "geglu",
    "group_norm",
    "is_functional",
    "is_replaced",
    "is_transformed",
    "joint_linear",
    "keeping_memory",
    "layer_norm",
    "lies_in",
    "linear",
    "linear_geglu",
    "private_maps",
    "release",
    "unchanged",
    "upsample_conv3",
    "verified",
]
