"""The probe: a fixed batch, how the model is called on it, and the batch's fingerprint.

A head's numbers can be compared over training only if the batch is the same, so it is copied once and its fingerprint
stands in the record. `Probe.run` is called inside `quiet`, which restores all state that a forward changes.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attnmonitor.capture.hooks import replaced_hooks
from attnmonitor.measurement.batches import copied, is_plain, map_tensors, moved, plain_parts, shape_of, tensors_of
from attnmonitor.messages import error_text
from attnmonitor.parallel.fsdp import through_wrapper
from attnmonitor.parallel.process_state import restored_random_state
from attnmonitor.parallel.wrappers import data_parallel_left_out

__all__ = ["ForwardFunction", "HookFilter", "Probe", "default_forward"]

ForwardFunction = Callable[[nn.Module, Any], Any]
HookFilter = Callable[[Callable[..., Any]], bool]


class Probe:
    """A fixed batch, how to run it, and its fingerprint.

    Args:
        model: The unwrapped model the batch is for.
        batch: A tensor, a mapping, a tuple or list, or a ``DataLoader`` whose first batch (in stored order, where it
            shuffles) is drawn here without advancing its generators. A batch given directly must be on the model's
            device; one drawn from a loader is moved.
        forward: ``forward(model, batch)``, where the default call does not fit. By default a tensor is the first
            argument; a mapping is passed by keyword (as one argument if ``forward`` knows none of the keys); of a
            tuple or list, as many leading entries are passed as ``forward`` has arguments without a default, at least
            one.
        skip_hooks: Called with every forward hook and pre-hook of the model's modules; returns True for one that the
            probe's forward must not call. None calls all of them.

    Attributes:
        batch: A detached copy of the batch.
        fingerprint: 12 hex digits of the SHA-256 over names, shapes, dtypes and bytes of the batch's tensors.

    Raises:
        ValueError: The batch holds no tensor, is on another device than the model, or is longer than the positions
            the model's configuration allows; a tensor of it cannot be read; the model's weights hold no numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        forward: ForwardFunction | None = None,
        skip_hooks: HookFilter | None = None,
    ) -> None:
        if forward is not None and not callable(forward):
            raise ValueError(f"forward={forward!r} is not callable; give a function forward(model, batch)")
        if skip_hooks is not None and not callable(skip_hooks):
            raise ValueError(
                f"skip_hooks={skip_hooks!r} is not callable; give a function of a hook: lambda hook: hook is count"
            )
        device = _device(model)
        if isinstance(batch, DataLoader):
            batch = moved(_first_batch(batch), device)
        tensors = dict(tensors_of(batch))
        if not tensors:
            raise ValueError(
                f"probe={type(batch).__name__} holds no tensor; give a tensor of token ids (batch, length), a dict or "
                "tuple of tensors, or a DataLoader"
            )
        if device.type == "meta":
            raise ValueError(
                f"model={type(model).__qualname__}: its weights are on 'meta', without numbers; load them, then attach"
            )
        for where, tensor in tensors.items():
            if tensor.device != device:
                raise ValueError(
                    f"probe{where} is on {tensor.device} but the model is on {device}; move it there: "
                    f"probe.to({str(device)!r})"
                )
            _check_readable(where, tensor)
        _check_length(model, tensors)
        # A copy: the user may later write into the batch in place, and the probe must not change.
        self.batch = copied(batch)
        self.fingerprint = _fingerprint(self.batch)
        self._forward = forward if forward is not None else default_forward
        self._skip_hooks = skip_hooks

    def run(self, model: nn.Module) -> None:
        """Run the model once on the batch, moved to where the model is now; the output is dropped."""
        batch = moved(self.batch, _device(model))
        with ExitStack() as stack:
            stack.enter_context(data_parallel_left_out(model))
            through_wrapper(model, lambda inner: self._forward(inner, batch))

    def without_hooks(self, model: nn.Module) -> AbstractContextManager[None]:
        """Leave out the hooks that ``skip_hooks`` selects. Enter it before hooks of this package are on the model."""
        skip = self._skip_hooks
        return (
            nullcontext()
            if skip is None
            else replaced_hooks(model.modules(), lambda _, hook: None if skip(hook) else hook)
        )

    def half(self) -> Probe | None:
        """Return a probe of the first half of the batch's sequences; None where there is only one sequence.

        The sequences are the first axis of the first tensor that has axes; a tensor of another length is kept whole.
        """
        tensors = [tensor for _, tensor in tensors_of(self.batch)]
        num_sequences = next((tensor.size(0) for tensor in tensors if tensor.dim()), 0)
        if num_sequences < 2 or any(shape_of(x)[:1] == (num_sequences,) and not is_plain(x) for x in tensors):
            return None
        half = copy.copy(self)
        half.batch = map_tensors(
            self.batch,
            lambda tensor: tensor[: num_sequences // 2] if shape_of(tensor)[:1] == (num_sequences,) else tensor,
        )
        half.fingerprint = _fingerprint(half.batch)
        return half

    def describe(self) -> str:
        """Return the shapes of the batch's tensors as text, for error messages and the run's configuration."""
        return ", ".join(
            f"{where.lstrip('.') or 'tensor'} {shape_of(tensor)} {str(tensor.dtype).removeprefix('torch.')}"
            for where, tensor in tensors_of(self.batch)
        )


def _device(model: nn.Module) -> torch.device:
    """Return where the model runs: where its weights are, or where accelerate brings those that it offloads."""
    first = next(chain(model.parameters(), model.buffers()), None)
    if first is None:
        return torch.device("cpu")
    if first.device.type == "meta":
        for module in model.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return first.device


def _check_readable(where: str, tensor: Tensor) -> None:
    try:
        _fingerprint(copied(tensor))
    except Exception as error:
        raise ValueError(
            f"probe{where} is a {type(tensor).__name__} of {tensor.dtype} and {tensor.layout} that cannot be "
            f"copied and read ({error_text(error)}); give it in another form"
        ) from error


def _fingerprint(batch: Any) -> str:
    digest = hashlib.sha256()
    for where, tensor in tensors_of(batch):
        digest.update(f"{where}|{shape_of(tensor)}|{tensor.dtype}|".encode())
        for part in plain_parts(tensor.detach()):
            # Through a byte view: numpy has no bfloat16.
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _first_batch(loader: DataLoader[Any]) -> Any:
    """Return the loader's first batch, drawn without its workers and without advancing any of its generators."""
    generators = {
        id(generator): generator
        for owner in (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
    }
    states = [(generator, generator.get_state()) for generator in generators.values()]
    # A second loader over the same dataset and sampler: iterating the user's own would reset its persistent workers.
    # From a shuffling loader, the first examples in stored order: a resumed run must draw the same probe again.
    is_shuffled = isinstance(loader.sampler, torch.utils.data.RandomSampler) and loader.batch_size is not None
    if is_shuffled or isinstance(loader.dataset, torch.utils.data.IterableDataset):
        order: dict[str, Any] = {"batch_size": loader.batch_size}
    elif loader.batch_sampler is not None:
        order = {"batch_sampler": loader.batch_sampler}
    else:
        order = {"sampler": loader.sampler, "batch_size": None}
    plain: DataLoader[Any] = DataLoader(loader.dataset, collate_fn=loader.collate_fn, **order)
    with restored_random_state():
        try:
            return next(iter(plain))
        except StopIteration:
            raise ValueError("probe: the DataLoader is empty; give one with at least one batch") from None
        finally:
            for generator, state in states:
                generator.set_state(state)


def _check_length(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    config = getattr(model, "config", None)
    # The names under which public models state how many positions they have.
    names = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len")
    for name in names:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            break
    else:
        return
    for where, tensor in tensors.items():
        is_token_ids = is_plain(tensor) and tensor.dim() == 2 and tensor.dtype in (torch.int64, torch.int32)
        if is_token_ids and tensor.shape[1] > limit:
            raise ValueError(
                f"probe{where} is {tensor.shape[1]} tokens long but the model's config.{name} is {limit}; "
                f"cut it: probe[:, :{limit}]"
            )


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on the batch as the signature of its ``forward`` requires, see `Probe`."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    takes_any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # A probe does not need the key/value cache of generation, which would hold every layer's keys.
    extra = {"use_cache": False} if "use_cache" in named else {}
    if isinstance(batch, Mapping):
        known = dict(batch) if takes_any_keyword else {key: value for key, value in batch.items() if key in named}
        return model(**{**extra, **known}) if known else model(batch)
    if isinstance(batch, (tuple, list)):
        takes_all = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return model(*(batch if takes_all else batch[: max(1, len(required))]), **extra)
    return model(batch, **extra)
