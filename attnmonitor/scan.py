"""The audit of a finished checkpoint: load it, run some text through it once, and say what each head does with it.

It is the measurement of a training run taken once, so the numbers are those a monitor logs for the same weights and
the same tokens, under the same names. One layer's queries and keys are in memory at a time, and logits over the
vocabulary, which nothing here reads, are made for one position only where the model can leave the others out.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnmonitor.catalog import DEFAULT_METRICS, check_metric_names
from attnmonitor.measurement import Measurement
from attnmonitor.probe import Probe, default_forward
from attnmonitor.sample import LayerCoverage

__all__ = ["Scan", "bundled_text", "checkpoints_in", "scan"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What an audit found.

    Attributes:
        model: The model as it was named.
        length: Tokens in each sequence.
        num_sequences: Sequences measured; values are means over them.
        probe_fingerprint: 12 hex digits that tell these tokens from others.
        values: ``values[metric][layer]``: float32 ``(num_heads,)``, layers in forward order; only layers measured.
        coverage: How each attention layer was captured, or why it has no values.
    """

    model: str
    length: int
    num_sequences: int
    probe_fingerprint: str
    values: Mapping[str, Mapping[str, Tensor]]
    coverage: Mapping[str, LayerCoverage]

    @property
    def not_measured(self) -> dict[str, str]:
        """Layers without values, and why."""
        return {name: layer.reason for name, layer in self.coverage.items() if not layer.measured}

    def heads(self, metric: str) -> Tensor:
        """All heads of the model, layer after layer, without those that have no number: ``(num_heads,)``."""
        heads = torch.cat(list(self.values[metric].values()))
        return heads[~heads.isnan()]

    def summary(self) -> dict[str, dict[str, float]]:
        """Return least, median and greatest value over all heads of the model, per metric."""
        found = {metric: self.heads(metric).double().numpy() for metric in self.values}
        return {
            metric: {"min": _short(heads.min()), "median": _short(np.median(heads)), "max": _short(heads.max())}
            for metric, heads in found.items()
            if heads.size
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain containers; a head without a number is None."""
        return {
            "model": self.model,
            "length": self.length,
            "sequences": self.num_sequences,
            "probe_fingerprint": self.probe_fingerprint,
            "layers": [
                {
                    "name": name,
                    **{metric: list(map(_or_none, self.values[metric][name].tolist())) for metric in self.values},
                }
                for name, layer in self.coverage.items()
                if layer.measured
            ],
            "not_measured": self.not_measured,
            "summary": self.summary(),
        }


def scan(
    model: str | Path,
    *,
    text: str | None = None,
    length: int = 512,
    batch: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    tokenizer: str | Path | None = None,
    metrics: Iterable[str] | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda doing, fraction: None,
) -> Scan:
    """Measure every attention head of a checkpoint on some text.

    Args:
        model: A folder with ``config.json`` and weights, a Hugging Face id, or a ``.gguf`` file.
        text: What to run through it; by default the English help texts that come with Python (which differ between
            versions of Python: compare numbers by their ``probe_fingerprint``).
        length: Tokens in each sequence, at least 2.
        batch: Sequences at most; fewer where the text is shorter.
        dtype: Of the weights and of the forward.
        device: Where to run; by default the first CUDA device, else the CPU.
        tokenizer: Folder, Hugging Face id or ``.gguf`` file of the tokenizer, where the model brings none.
        metrics: Names out of `attnmonitor.catalog.METRICS`; the default ones if left out.
        trust_remote_code: Run code that comes with the checkpoint.
        progress: Told what is being done.

    Raises:
        ValueError: The model or its tokenizer cannot be loaded, takes no text, has no attention that can be measured,
            or the text is shorter than ``length``. The message names the thing and the way out.
    """
    names = check_metric_names(metrics or DEFAULT_METRICS)
    if length < 2 or batch < 1:
        raise ValueError(
            f"length={length}, batch={batch}: a sequence needs 2 tokens or more, a batch 1 sequence or more"
        )
    progress("loading", 0.0)
    config = _config(model, trust_remote_code, length)
    sequences = _sequences(
        _tokenizer(model if tokenizer is None else tokenizer, trust_remote_code),
        bundled_text() if text is None else text,
        length,
        batch,
    )
    loaded = _model(model, config, trust_remote_code)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded.to(device=where, dtype=dtype).eval()
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it or the machine lacks
        raise ValueError(f"device={str(where)!r} cannot hold the model as {dtype}: {_first_line(error)}") from error
    inputs: dict[str, Any] = {"input_ids": sequences.to(next(loaded.parameters()).device)}
    if getattr(loaded.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]

    def forward(model: nn.Module, tokens: Mapping[str, Tensor]) -> None:
        can_skip_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        with _counted(model, lambda fraction: progress("measuring", fraction)):
            default_forward(model, {**tokens, "logits_to_keep": 1} if can_skip_logits else tokens)

    probe = Probe(loaded, inputs, forward=forward)
    measured = Measurement(loaded, probe, names).attach()
    found = Scan(
        model=str(model),
        length=length,
        num_sequences=len(sequences),
        probe_fingerprint=probe.fingerprint,
        values=measured.trusted_values(),
        coverage=measured.coverage,
    )
    if len(found.not_measured) == len(found.coverage):
        name, reason = next(iter(found.not_measured.items()))
        raise ValueError(f"model={model}: no attention layer could be measured; {name}: {reason}")
    return found


def bundled_text() -> str:
    """Return the English prose that every Python brings: the help topics of ``pydoc``, half a million characters."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return the checkpoints of one run that a folder holds, in order of their steps; none if it is a model itself."""
    folder = Path(folder)
    if not folder.is_dir() or (folder / "config.json").exists():
        return []
    return sorted(
        (file.parent for file in folder.glob("*/config.json")), key=lambda path: (step_of(path.name), path.name)
    )


def step_of(name: str) -> int:
    """Return the number at the end of a checkpoint's name: ``checkpoint-200`` is 200, a name without one is 0."""
    number = re.search(r"(\d+)/?$", name)
    return int(number.group(1)) if number else 0


def _located(model: str | Path) -> tuple[str, dict[str, str]]:
    """Return what ``from_pretrained`` calls a model: its folder or id, and the file in it where it is one."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(model)) and path.suffix != ".gguf"
    if not path.is_dir() and not is_id:
        raise ValueError(
            f"{str(model)!r} is neither a folder, nor a .gguf file, nor the id of a Hugging Face model; check the path"
        )
    return str(path if path.is_dir() else model), {}


def _config(model: str | Path, trust_remote_code: bool, length: int) -> Any:
    import transformers

    source, where = _located(model)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
    except Exception as error:
        raise ValueError(
            f"model={str(model)!r} cannot be loaded: {_first_line(error)} (a model is a folder with config.json and "
            "weights, a Hugging Face id or a .gguf file)"
        ) from error
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise ValueError(f"length={length} is more than the {limit} positions {str(model)!r} has; take {limit} or less")
    return config


def _model(model: str | Path, config: Any, trust_remote_code: bool) -> Any:
    import transformers

    source, where = _located(model)
    # The class the checkpoint was saved from, so that layers have the names they had in training.
    saved_from = (getattr(transformers, name, None) for name in config.architectures or ())
    kind = next(filter(None, saved_from), transformers.AutoModelForCausalLM)
    try:
        loaded = kind.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
    except Exception as error:
        raise ValueError(f"the weights of model={str(model)!r} cannot be loaded: {_first_line(error)}") from error
    if loaded.main_input_name != "input_ids":
        raise ValueError(
            f"model={str(model)!r} is a {type(loaded).__name__} and takes {loaded.main_input_name!r}, not text; "
            "measure it with AttentionMonitor(model, probe).sample(0) on a batch of its own kind"
        )
    return loaded


def _tokenizer(source: str | Path, trust_remote_code: bool) -> Any:
    import transformers

    folder, where = _located(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **where)
    except Exception as error:
        raise ValueError(
            f"no tokenizer in {str(source)!r}: {_first_line(error)}; name the folder, id or .gguf file of the one the "
            "model was trained with: tokenizer=... (--tokenizer on the command line)"
        ) from error


def _sequences(tokenizer: Any, text: str, length: int, batch: int) -> Tensor:
    """Cut the text into sequences of exactly ``length`` tokens, each with the model's own special tokens."""
    if tokenizer.is_fast:
        cut = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
    else:
        token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = max(1, length - tokenizer.num_special_tokens_to_add())
        cut = [
            tokenizer.prepare_for_model(token_ids[at : at + room])["input_ids"] for at in range(0, len(token_ids), room)
        ]
    whole = [token_ids for token_ids in cut if len(token_ids) == length][:batch]
    if not whole:
        raise ValueError(
            f"the text is {max(map(len, cut), default=0)} tokens long, shorter than one sequence of length={length}; "
            "give a longer text or a smaller length"
        )
    return torch.tensor(whole)


@contextmanager
def _counted(model: nn.Module, progress: Callable[[float], None]) -> Iterator[None]:
    """Tell how far a forward is, by the modules without children that have run."""
    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    num_run = 0

    def count(*_: object) -> None:
        nonlocal num_run
        num_run += 1
        progress(min(1.0, num_run / len(leaves)))

    handles = [module.register_forward_hook(count) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        progress(1.0)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _short(value: float) -> float:
    # Seven digits are all a float32 has.
    return float(f"{value:.7g}")


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else _short(value)
