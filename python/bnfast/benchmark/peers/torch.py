"""PyTorch in both memory formats, whatever the layout of the case, since a user may choose the faster one.

train and infer call torch.nn.functional.batch_norm on tensors that record no gradient. grad calls
native_batch_norm_backward, the operator that autograd uses, with the statistics saved by the forward. `reused` calls
the out variant of native_batch_norm; the backward's out variant copies, so grad has no `reused`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import EPSILON, MOMENTUM, Arrays, Case
from bnfast.benchmark.peers.base import Calls, Peer, Unsupported


class _Torch(Peer):
    distribution = "torch"
    uses_malloc = True
    channels_last: ClassVar[bool]

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch

    def version(self) -> str:
        return str(self.torch.__version__)

    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        torch, tensor = self.torch, self._tensor
        x = self._image(case, arrays, "x")
        gamma, beta = tensor(arrays.gamma), tensor(arrays.beta)
        if case.op == "grad":
            return self._grad(case, arrays, x, gamma, beta)
        moving = tensor(arrays.moving_mean.copy()), tensor(arrays.moving_variance.copy())
        training = case.op != "infer"
        momentum = 1 - MOMENTUM  # torch's momentum is the weight of the new value
        batch_norm = torch.nn.functional.batch_norm

        def fresh() -> Any:
            return batch_norm(x, *moving, gamma, beta, training, momentum, EPSILON)

        channels = case.shape.c if training else 0  # only training saves the batch statistics
        outputs = {
            "out": torch.ones_like(x),
            "save_mean": torch.ones(channels, dtype=gamma.dtype),
            "save_invstd": torch.ones(channels, dtype=gamma.dtype),
        }
        batch_norm_out = torch.ops.aten.native_batch_norm.out

        def reused() -> None:
            batch_norm_out(x, gamma, beta, *moving, training, momentum, EPSILON, **outputs)

        return Calls(fresh, lambda y: {"y": self._numpy(case, y)}, reused)

    def _grad(self, case: Case, arrays: Arrays, x: Any, gamma: Any, beta: Any) -> Calls:
        torch = self.torch
        dy = self._image(case, arrays, "dy")
        _, mean, invstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, EPSILON)
        backward = torch.ops.aten.native_batch_norm_backward
        output_mask = [True, True, True]  # dx, dgamma, dbeta

        def fresh() -> Any:
            return backward(dy, x, gamma, None, None, mean, invstd, True, EPSILON, output_mask)

        def read(result: Any) -> dict[str, Array]:
            dx, dgamma, dbeta = result
            return {"dx": self._numpy(case, dx), "dgamma": dgamma.numpy(), "dbeta": dbeta.numpy()}

        return Calls(fresh, read)

    def _image(self, case: Case, arrays: Arrays, name: str) -> Any:
        """The array of that name as a tensor (N, C, *spatial) in this memory format."""
        array: Array = getattr(arrays, name)
        if array.ndim == 2:
            return self._tensor(array)
        if self.channels_last == (case.layout == "channels_last"):
            return self._view(case, self._tensor(array), to_torch=True)
        return arrays.keep(f"torch {name}", lambda: self._converted(case, array))

    def _converted(self, case: Case, array: Array) -> Any:
        image = self._view(case, self._tensor(array), to_torch=True)
        if not self.channels_last:
            return image.contiguous()
        return image.movedim(1, -1).contiguous().movedim(-1, 1)

    def _view(self, case: Case, tensor: Any, to_torch: bool) -> Any:
        """A view with the channel axis where torch expects it (`to_torch`), or back where the case has it."""
        if case.layout == "channels_first" or tensor.ndim == 2:
            return tensor
        return tensor.movedim(-1, 1) if to_torch else tensor.movedim(1, -1)

    def _tensor(self, array: Array) -> Any:
        if array.dtype.name == "bfloat16":  # from_numpy does not know it
            return self.torch.from_numpy(array.view("int16")).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def _numpy(self, case: Case, tensor: Any) -> Array:
        tensor = self._view(case, tensor, to_torch=False)
        if tensor.dtype is self.torch.bfloat16:
            tensor = tensor.float()
        array: Array = tensor.numpy()
        return array


class TorchContiguous(_Torch):
    """The default memory format; the only one for a dense layer."""

    name = "torch-contiguous"
    title = "torch contiguous"
    channels_last = False


class TorchChannelsLast(_Torch):
    """The memory format torch.channels_last."""

    name = "torch-channels_last"
    title = "torch channels_last"
    channels_last = True

    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        if not case.shape.spatial:
            raise Unsupported("a dense layer has only one memory format")
        return super().prepare(case, arrays)
