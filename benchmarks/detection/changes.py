"""What training may do differently from some step on, without any head being at fault.

Each change is called before every optimizer step with the run, the steps since the change (negative before it) and the
batch, and returns the batch to train on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from benchmarks.detection.runs import Run

Change = Callable[["Run", int, Tensor], Tensor]

UNFROZEN = 2  # blocks that are frozen before or after the change


def raise_rate(run: Run, since: int, batch: Tensor) -> Tensor:
    """Multiply the learning rate by three."""
    run.rate_factor = 3.0 if since >= 0 else 1.0
    return batch


def restart_rate(run: Run, since: int, batch: Tensor) -> Tensor:
    """Let the learning rate fall linearly to a tenth over the steps before the change, and start again."""
    period = run.setting.change_at
    run.rate_factor = 1.0 - 0.9 * ((since + period) % period) / period
    return batch


def unfreeze(run: Run, since: int, batch: Tensor) -> Tensor:
    """Train the middle blocks only from the change on."""
    _train_blocks(run, is_trained=since >= 0)
    return batch


def freeze(run: Run, since: int, batch: Tensor) -> Tensor:
    """Train the middle blocks only before the change."""
    _train_blocks(run, is_trained=since < 0)
    return batch


def _train_blocks(run: Run, *, is_trained: bool) -> None:
    for block in run.model.blocks[1 : 1 + UNFROZEN]:
        block.requires_grad_(is_trained)


def clear_optimizer(run: Run, since: int, batch: Tensor) -> Tensor:
    """Forget the optimizer's state."""
    if since == 0:
        run.optimizer.state.clear()
    return batch


def swap_in_average(run: Run, since: int, batch: Tensor) -> Tensor:
    """Continue from the moving average of the weights."""
    if not run.average:
        run.average = copy.deepcopy(run.model.state_dict())
    for name, tensor in run.model.state_dict().items():
        run.average[name].lerp_(tensor, 0.02)
    if since == 0:
        run.model.load_state_dict(run.average)
    return batch


def lengthen(run: Run, since: int, batch: Tensor) -> Tensor:
    """Train on a quarter of each sequence, then on half of it, then on all."""
    length = batch.shape[1] - 1
    return batch if since >= 0 else batch[:, : length // (2 if 2 * since >= -run.setting.change_at else 4) + 1]


def enlarge_batch(run: Run, since: int, batch: Tensor) -> Tensor:
    """Train on one sequence at first, on all of them from the change on."""
    count = max(1, min(len(batch), len(batch) * (since + run.setting.change_at) // run.setting.change_at))
    return batch[:count]


def decay_by_layer(run: Run, since: int, batch: Tensor) -> Tensor:
    """Give each block 0.7 of the learning rate of the one above it, from the first step on."""
    if len(run.optimizer.param_groups) == 1:
        group = run.optimizer.param_groups[0]
        depth_of = {id(p): depth for depth, block in enumerate(run.model.blocks) for p in block.parameters()}
        top, parameters = len(run.model.blocks) - 1, group["params"]
        group["params"] = [p for p in parameters if id(p) not in depth_of]
        for depth in range(top + 1):
            params = [p for p in parameters if depth_of.get(id(p)) == depth]
            run.optimizer.add_param_group({"params": params, "rate_factor": 0.7 ** (top - depth)})
    return batch


class LowRank(nn.Module):
    """Adds a product of two thin matrices, zero at first, to a weight."""

    def __init__(self, weight: Tensor, rank: int = 4) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the product added."""
        return weight + self.up @ self.down


def low_rank_additions(model: nn.Module, projections: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Freeze a model but for low-rank additions to these projections, and return what is left to train."""
    model.requires_grad_(requires_grad=False)
    for projection in projections:
        parametrize.register_parametrization(projection, "weight", LowRank(projection.weight))
    return [p for p in model.parameters() if p.requires_grad]


def adapt_low_rank(run: Run, since: int, batch: Tensor) -> Tensor:
    """Train only low-rank additions to queries and values from the change on, on program text."""
    if since == 0:
        layers = [block.attention for block in run.model.blocks]
        added = low_rank_additions(run.model, [p for each in layers for p in (each.query, each.value)])
        run.optimizer = torch.optim.AdamW(added, lr=run.setting.learning_rate)
    return batch


CHANGES: dict[str, Change] = {
    "rate x3": raise_rate,
    "rate restarts": restart_rate,
    "unfreezing": unfreeze,
    "freezing": freeze,
    "optimizer state cleared": clear_optimizer,
    "average swapped in": swap_in_average,
    "length curriculum": lengthen,
    "batch ramp": enlarge_batch,
    "layer-wise rates": decay_by_layer,
    "low-rank fine-tuning": adapt_low_rank,
}


def do_not_clip(run: Run, since: int, batch: Tensor) -> Tensor:
    """Leave gradients as large as they are."""
    run.largest_gradient = math.inf
    return batch


def grow_rate(run: Run, since: int, batch: Tensor) -> Tensor:
    """Double the learning rate ten times over the last four fifths of the run, without clipping gradients."""
    share = since / run.setting.num_steps
    run.rate_factor = 2.0 ** max(0.0, 12.5 * (share - 0.2))
    return do_not_clip(run, since, batch)


CARELESS: dict[str, Change] = {"no clipping": do_not_clip, "growing rate": grow_rate}
"""How training may be set up from its first step so that its loss comes to rise."""
