"""Measures the latency and the peak memory of one denoising step, for all variants in the same run."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def interleaved_latency_ms(
    steps: dict[str, Callable[[], object]],
    repeats: int,
    prepare: Callable[[str], object] = lambda name: None,
    show: Callable[[range], Iterable[int]] = iter,
) -> dict[str, float]:
    """Return the median time of each step in milliseconds, by name.

    The steps are run in turns, `repeats` times after 3 warm-up rounds, so that a disturbance of the machine affects all
    of them alike. `prepare(name)` is called before each run and not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for round_number in show(range(repeats + 3)):
        for name, step in steps.items():
            prepare(name)
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if round_number >= 3:  # the first rounds warm up
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are created in the context; `peak` is the most that were alive at one time.

    Tensors that existed before and are used, such as weights, optimiser state and inputs, are counted in `resident`.
    Tensors on the meta device have no memory.

    `cudnn`: whether to count what cuDNN needs for a convolution of videos: copies of input and output in its layout.
    """

    def __init__(self, *, cudnn: bool = False) -> None:
        super().__init__()
        self.cudnn = cudnn
        self.live = self.peak = self.resident = 0
        self._seen: set[int] = set()
        self._before: set[int] = set()  # those that are still alive: another one may get the address of one that is not

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._seen and key not in self._before:
                    self._before.add(key)
                    self.resident += storage.nbytes()
                    weakref.finalize(storage, self._before.discard, key)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._hold(tensor.untyped_storage())
        if self.cudnn and func is torch.ops.aten.convolution.default and result.ndim == 5:
            self.peak = max(self.peak, self.live + args[0].nbytes + result.nbytes)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen or key in self._before:
            return
        self._seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_memory_mb(step: Callable[[], object], resident_bytes: int, device: torch.device) -> float:
    """Return the peak memory of tensors during `step`, weights included, in MB (1e6 bytes).

    It is `resident_bytes`, the size of the weights, plus the peak of what the step adds: on a GPU in the allocator, on
    a CPU in tensors. What else lies on the device does not count.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (resident_bytes + torch.cuda.max_memory_allocated(device) - before) / 1e6
    with LiveBytes() as recorded:
        step()
    return (resident_bytes + recorded.peak) / 1e6
