"""The operations on the hot path of the models; they know tensors, and no model."""

from sdinpaint_kernels.attention import attention
from sdinpaint_kernels.group_norm import group_norm

__all__ = ["attention", "group_norm"]
