"""The weights of a checkpoint: all of them in their places, or an error that names those that are not.

transformers gives a tensor that a checkpoint lacks fresh random values. Numbers of such tensors say nothing about the
checkpoint. A model that was saved from inside a wrapper (compiled, DDP, FSDP) has all of its tensors under longer
names; these are mended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnmonitor.messages import first_names
from attnmonitor.parallel.process_state import first_import

__all__ = ["load_complete"]

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = ("module.", "model.")  # stripped from the front only: a part of a model may have these names
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_named = partial(first_names, most=4)


def load_complete(kind: Any, folder: str, where: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Load a model with ``kind.from_pretrained``, and return it with what is to be said about its tensors.

    Args:
        kind: A model class of transformers.
        folder: Folder or id of the checkpoint.
        where: Further keywords of ``from_pretrained``.

    Raises:
        ValueError: A tensor that attention depends on is missing, has another shape or was not loaded.
        Exception: Whatever transformers raises for files that it cannot read.
    """
    try:
        model, info = _load(kind, folder, **where)
        gaps = _gaps(model, info)
    except Exception:
        # The tensors lie one level deeper: {"state_dict": {...}}. An unreadable file fails here a second time.
        if "gguf_file" in where or not (tensors := _tensors_in(Path(folder))):
            raise
        model, info, gaps = _empty(kind, folder, where), {}, ["all"]
    else:
        tensors = _tensors_in(Path(folder)) if gaps and "gguf_file" not in where else {}
    notes = []
    if gaps and tensors:
        mended, note = _unwrapped(tensors, model)
        if note:
            config, model_class = model.config, type(model)
            del model
            model, info = _load(model_class, None, config=config, state_dict=mended)
            gaps, notes = _gaps(model, info), [note]
    if gaps:
        raise ValueError(
            f"{len(gaps)} of its tensors do not fit {type(model).__name__} and would be measured with random "
            f"values: {_named(gaps)}{_extra_text(info)}; save the unwrapped model with save_pretrained, or mend "
            "the names"
        )
    return model, notes + _remarks(model, info)


def _load(kind: Any, folder: str | None, **where: Any) -> tuple[Any, dict[str, Any]]:
    model, info = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **where)
    return model, info


def _empty(kind: Any, folder: str, where: Mapping[str, Any]) -> Any:
    """Return the model without weights, for the names of its tensors."""
    with first_import("transformers"):
        import transformers
    config = transformers.AutoConfig.from_pretrained(folder, **where)
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _gaps(model: Any, info: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with each tensor that attention depends on."""
    state = model.state_dict(keep_vars=True)
    missing = set(info.get("missing_keys", ()))
    loaded = {id(tensor) for name, tensor in state.items() if name not in missing}
    lacking = sorted(
        name for name in missing if id(state.get(name)) not in loaded and not _is_after_attention(model, name)
    )
    mismatched = [
        f"{name} (has shape {tuple(there)}, needs {tuple(needed)})" if there else f"{name} (has another shape)"
        for name, there, needed in map(_mismatch, info.get("mismatched_keys", ()))
        if not _is_after_attention(model, name)
    ]
    named = [*model.named_parameters(), *model.named_buffers()]
    unloaded = [name for name, tensor in named if tensor.is_meta and name not in missing]
    return [
        *(f"{name} (missing)" for name in lacking),
        *sorted(mismatched),
        *(f"{name} (not loaded)" for name in unloaded),
        *map(str, info.get("error_msgs", ())),
    ]


def _mismatch(entry: Any) -> tuple[str, Sequence[int], Sequence[int]]:
    # transformers 5 gives (name, its shape, the model's), some versions before it the name alone.
    return (entry, (), ()) if isinstance(entry, str) else entry


def _is_after_attention(model: Any, name: str) -> bool:
    """Return whether a tensor belongs to a head or pooler, which run after all attention."""
    is_outside = model.base_model is not model and not name.startswith(f"{model.base_model_prefix}.")
    head = model.get_output_embeddings()
    is_output = head is not None and any(
        name.startswith(f"{at}.") for at, part in model.named_modules() if part is head
    )
    return is_outside or is_output or ".pooler." in f".{name}"


def _remarks(model: Any, info: Mapping[str, Any]) -> list[str]:
    """Return what does not change the measured numbers, but should be known."""
    unused = sorted(name for name in info.get("missing_keys", ()) if _is_after_attention(model, name))
    extra = sorted(info.get("unexpected_keys", ()))
    remarks = []
    if unused:
        remarks.append(f"{len(unused)} tensors after all attention are missing and not measured: {_named(unused)}")
    if extra:
        remarks.append(f"{len(extra)} tensors are not part of {type(model).__name__}: {_named(extra)}")
    return remarks


def _extra_text(info: Mapping[str, Any]) -> str:
    extra = sorted(info.get("unexpected_keys", ()))
    return f"; in the checkpoint, but not in the model: {_named(extra)}" if extra else ""


def _unwrapped(tensors: Mapping[str, Tensor], model: Any) -> tuple[dict[str, Tensor], str]:
    """Return the tensors without the names of wrappers, and what was stripped; ``""`` if that fits no better."""
    expected, base = set(model.state_dict()), f"{model.base_model_prefix}."
    if model.base_model is model:  # checkpoints of the whole model have names with the base's in front, as here ...
        expected |= {base + name for name in expected}
    else:  # ... and those of the base alone are without it
        expected |= {name.removeprefix(base) for name in expected}

    def num_known(names: Iterable[str]) -> int:
        return len(expected & set(names))

    new_name = {name: _WRAPPERS.sub("", name) for name in tensors}
    parts = {part for name in tensors for part in _WRAPPERS.findall(name)}
    while True:
        front = next((outer for outer in _OUTER if all(name.startswith(outer) for name in new_name.values())), None)
        shorter = {name: new.removeprefix(front or "") for name, new in new_name.items()}
        if front is None or num_known(shorter.values()) <= num_known(new_name.values()):
            break
        new_name, parts = shorter, parts | {front}
    if len(set(new_name.values())) < len(tensors) or num_known(new_name.values()) < num_known(tensors):
        return {}, ""
    if not parts:
        return dict(tensors), "its tensors were taken from within a training checkpoint"
    stripped = ", ".join(map(repr, sorted(parts)))
    return {new: tensors[name] for name, new in new_name.items()}, f"{stripped} was stripped from its tensors' names"


def _tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's weight files by name; none where the checkpoint is no folder."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        files = _files_of(index) if index.is_file() else [f"{stem}.{suffix}"]
        # Names only: an index must not point out of its folder.
        paths = [folder / Path(file).name for file in files]
        if all(path.is_file() for path in paths):
            return {name: tensor for path in paths for name, tensor in _read(path).items()}
    return {}


def _files_of(index: Path) -> list[str]:
    try:
        return sorted(map(str, set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # anything may be in it
        raise ValueError(f"{index.name} does not say which files hold its tensors") from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        with first_import("safetensors.torch"):
            from safetensors.torch import load_file
        return dict(load_file(path))
    found = torch.load(path, map_location="cpu", weights_only=True)
    nested = (found[key] for key in _NESTED if isinstance(found.get(key), Mapping))
    return {name: tensor for name, tensor in next(nested, found).items() if isinstance(tensor, Tensor)}
