"""A model on disk: found, loaded, and its text cut into sequences of its own tokens.

A checkpoint is a folder, the id of a Hugging Face model or one ``.gguf`` file. Its configuration and tokenizer are read
at once, its weights when they are first needed. So a wrong path, a missing tokenizer or a text that is too short is an
error within seconds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnmonitor.messages import needed, whole_argument
from attnmonitor.parallel.process_state import first_import
from attnmonitor.scan.weights import load_complete

__all__ = ["Checkpoint", "checkpoints_in", "silence_transformers", "steps_of"]


class Checkpoint:
    """A language model on disk with its tokenizer.

    Args:
        source: A folder with ``config.json`` and weights, a Hugging Face id, or a ``.gguf`` file.
        dtype: Data type of the weights and of the forward.
        device: Device of the model; by default the first CUDA device, else the CPU.
        tokenizer: Folder, id or ``.gguf`` file of the tokenizer, where the model has none.
        trust_remote_code: Run code that comes with the checkpoint.

    Attributes:
        name: The source as the caller named it.
        notes: What is to be said about its tensors, once they are loaded: names that were mended, tensors that are not
            part of the model.

    Raises:
        ValueError: There is no such model, or no tokenizer. The message says what to do.
        ModuleNotFoundError: transformers is not installed.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        tokenizer: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        with needed(by="scan", extra="transformers"), first_import("transformers"):
            import transformers

        self.name = str(source)
        self.notes: list[str] = []
        self._dtype = dtype
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._folder, where = _find(source)
        self._where = {"trust_remote_code": trust_remote_code, **where}
        try:
            self._config = transformers.AutoConfig.from_pretrained(self._folder, **self._where)
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise ValueError(
                    f"model={self.name!r} comes with its own code, which is not run by default; read it, then "
                    "set trust_remote_code=True (--trust-remote-code)"
                ) from error
            raise ValueError(
                f"model={self.name!r} cannot be loaded: {_first_line(error)} (a model is a folder with config.json and "
                "weights, a Hugging Face id or a .gguf file)"
            ) from error
        self._tokenizer = _tokenizer(source if tokenizer is None else tokenizer, trust_remote_code)

    def sequences(self, text: str, length: int, batch: int) -> Tensor:
        """Cut a text into token sequences, each with the model's own special tokens.

        Returns:
            At most ``batch`` sequences of exactly ``length`` tokens: int64 ``(at most batch, length)``.

        Raises:
            ValueError: The model has fewer positions than ``length``, or the text is shorter than one sequence.
        """
        limit = getattr(self._config, "max_position_embeddings", None)
        if isinstance(limit, int) and 0 < limit < length:
            raise ValueError(
                f"length={length} is more than the {limit} positions {self.name!r} has; take {limit} or less"
            )
        if self._tokenizer.is_fast:
            cut = self._tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        else:
            token_ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            room = max(1, length - self._tokenizer.num_special_tokens_to_add())
            pieces = (token_ids[at : at + room] for at in range(0, len(token_ids), room))
            cut = [self._tokenizer.prepare_for_model(piece)["input_ids"] for piece in pieces]
        whole = [token_ids for token_ids in cut if len(token_ids) == length][:batch]
        if not whole:
            raise ValueError(
                f"the text is {max(map(len, cut), default=0)} tokens long, shorter than one sequence of "
                f"length={length}; give a longer text or a smaller length"
            )
        return torch.tensor(whole)

    @cached_property
    def model(self) -> Any:
        """The model, loaded on first use.

        Raises:
            ValueError: Its weights cannot be read or do not fit, it takes no text, or the device cannot hold it.
        """
        with first_import("transformers"):
            import transformers
        # The class the checkpoint was saved from, so that layers have the names they had in training.
        saved_from = (getattr(transformers, name, None) for name in self._config.architectures or ())
        kind: Any = next(filter(None, saved_from), transformers.AutoModelForCausalLM)
        try:
            model, self.notes = load_complete(kind, self._folder, self._where)
        except Exception as error:
            raise ValueError(f"the weights of model={self.name!r} cannot be loaded: {_first_line(error)}") from error
        if model.main_input_name != "input_ids":
            raise ValueError(
                f"model={self.name!r} is a {type(model).__name__} and takes {model.main_input_name!r}, not text; "
                "measure it with AttentionMonitor(model, probe).sample(0), with a batch of its inputs as the probe"
            )
        try:
            return model.to(device=self._device, dtype=self._dtype).eval()
        except (RuntimeError, AssertionError) as error:  # torch raises either for a device that does not exist
            raise ValueError(
                f"device={str(self._device)!r} cannot hold the model as {self._dtype}: {_first_line(error)}"
            ) from error


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return the checkpoints of one run in a folder, by step; none if the folder is one model.

    A folder that is a model itself and holds ``checkpoint-N`` folders, as transformers' Trainer writes it, comes last;
    so does a checkpoint whose name has no number (``final``).
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    own = [folder] if (folder / "config.json").exists() else []
    # Other folders in the folder of a model (adapters, poolers) are parts of it, not checkpoints.
    found = [file.parent for file in folder.glob("checkpoint-*/config.json" if own else "*/config.json")]

    def order(path: Path) -> tuple[float, str]:
        number = _number(path.name)
        return math.inf if number is None else number, path.name

    return sorted(found, key=order) + own if found else []


def steps_of(checkpoints: Sequence[str | Path]) -> list[int]:
    """Return the step of each checkpoint: the number that ends its name, or what its Trainer saved.

    A checkpoint with neither counts as one step after the checkpoint before it.
    """
    steps: list[int] = []
    for checkpoint in checkpoints:
        number = _number(str(checkpoint))
        state = Path(checkpoint) / "trainer_state.json"
        if number is None and state.is_file():
            number = _saved_step(state)
        steps.append((steps[-1] + 1 if steps else 0) if number is None else number)
    return steps


def _saved_step(state: Path) -> int | None:
    try:
        return whole_argument(json.loads(state.read_text(encoding="utf-8"))["global_step"], least=0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a file of others: anything may be in it
        return None


def _number(name: str) -> int | None:
    number = re.search(r"(\d+)/?$", name)
    return int(number.group(1)) if number else None


def _find(model: str | Path) -> tuple[str, dict[str, str]]:
    """Return the arguments of ``from_pretrained`` for a model: its folder or id, and its file if it is one."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(model)) and path.suffix != ".gguf"
    if not path.is_dir() and not is_id:
        raise ValueError(
            f"{str(model)!r} is neither a folder, nor a .gguf file, nor the id of a Hugging Face model; check the path"
        )
    return str(path if path.is_dir() else model), {}


def _tokenizer(source: str | Path, trust_remote_code: bool) -> Any:
    with first_import("transformers"):
        import transformers
    folder, where = _find(source)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **where)
        # Of some models transformers makes a tokenizer without files: it knows special tokens, and no word.
        reason = "it has no vocabulary" if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens) else ""
    except Exception as error:
        reason = _first_line(error)
    if reason:
        raise ValueError(
            f"no tokenizer in {str(source)!r}: {reason}; name the folder, id or .gguf file of the one the model was "
            "trained with: tokenizer=... (--tokenizer on the command line)"
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def silence_transformers() -> None:
    """Switch off the progress bars and advice of transformers; its errors are exceptions."""
    with needed(by="scan", extra="transformers"), first_import("transformers.utils"):
        from transformers.utils import logging
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
