"""PyTorch in either memory format, whatever the case's layout: a user may choose the faster one.

train, infer: torch.nn.functional.batch_norm of tensors that record no gradient. grad: native_batch_norm_backward, the
operator that autograd calls, on the statistics that the forward saved. reused: native_batch_norm's out variant; the
backward has none that avoids a copy.
"""

from __future__ import annotations

from typing import Any, ClassVar

from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import EPSILON, MOMENTUM, Arrays, Case
from bnfast.benchmark.peers.base import Calls, Peer, Unsupported


class _Torch(Peer):
    distribution = "torch"
    mallocs = True
    channels_last: ClassVar[bool]

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch

    def version(self) -> str:
        return str(self.torch.__version__)

    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        torch, move = self.torch, self._tensor
        x = self._image(case, arrays, "x")
        gamma, beta = move(arrays.gamma), move(arrays.beta)
        moving = move(arrays.moving_mean.copy()), move(arrays.moving_variance.copy())
        training, forget = case.op != "infer", 1 - MOMENTUM  # torch's momentum is the weight of the new value
        if case.op == "grad":
            return self._grad(case, arrays, x, gamma, beta)
        out = torch.ones_like(x)
        saved = [torch.ones_like(gamma) if training else torch.empty(0, dtype=gamma.dtype) for _ in range(2)]
        batch_norm = torch.nn.functional.batch_norm

        def fresh() -> Any:
            return batch_norm(x, *moving, gamma, beta, training, forget, EPSILON)

        into = torch.ops.aten.native_batch_norm.out

        saves = {"save_mean": saved[0], "save_invstd": saved[1]}

        def reused() -> None:
            into(x, gamma, beta, *moving, training, forget, EPSILON, out=out, **saves)

        return Calls(fresh, lambda y: {"y": self._numpy(case, y)}, reused)

    def _grad(self, case: Case, arrays: Arrays, x: Any, gamma: Any, beta: Any) -> Calls:
        torch = self.torch
        dy = self._image(case, arrays, "dy")
        _, mean, invstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, EPSILON)
        backward, wanted = torch.ops.aten.native_batch_norm_backward, [True, True, True]

        def fresh() -> Any:
            return backward(dy, x, gamma, None, None, mean, invstd, True, EPSILON, wanted)

        def read(result: Any) -> dict[str, Array]:
            dx, dgamma, dbeta = result
            return {"dx": self._numpy(case, dx), "dgamma": dgamma.numpy(), "dbeta": dbeta.numpy()}

        return Calls(fresh, read)

    def _image(self, case: Case, arrays: Arrays, name: str) -> Any:
        """That array as (N, C, *spatial) in this memory format."""
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
        last = (0, *range(2, image.ndim), 1)
        first = (0, image.ndim - 1, *range(1, image.ndim - 1))
        return image.permute(last).contiguous().permute(first)

    def _view(self, case: Case, tensor: Any, to_torch: bool) -> Any:
        """The same memory with the channels moved to where torch (to_torch) or the case has them."""
        if case.layout == "channels_first" or tensor.ndim == 2:
            return tensor
        return tensor.movedim(-1, 1) if to_torch else tensor.movedim(1, -1)

    def _tensor(self, array: Array) -> Any:
        if array.dtype.name == "bfloat16":  # unknown to from_numpy
            return self.torch.from_numpy(array.view("int16")).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def _numpy(self, case: Case, tensor: Any) -> Array:
        tensor = self._view(case, tensor, to_torch=False)
        if tensor.dtype is self.torch.bfloat16:
            tensor = tensor.float()
        array: Array = tensor.numpy()
        return array


class TorchContiguous(_Torch):
    """The default memory format; for a dense layer the only one."""

    name = "torch-contiguous"
    title = "torch contiguous"
    channels_last = False


class TorchChannelsLast(_Torch):
    """memory_format=torch.channels_last."""

    name = "torch-channels_last"
    title = "torch channels_last"
    channels_last = True

    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        if not case.shape.spatial:
            raise Unsupported("a dense layer has one memory format")
        return super().prepare(case, arrays)
