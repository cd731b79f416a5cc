"""Make a W&B workspace that answers what one asks first: verdict, alarms, four panels of heads, and the loss.

``pip install wandb-workspaces``, then ``python examples/wandb_workspace.py ENTITY PROJECT --save``: it prints the
workspace's address. Without ``--save`` it prints what would be sent, and needs no network.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

HEADS = ("energy_rms", "key_incoherence", "energy_effective_rank")


def workspace(entity: str, project: str, loss: str, prefix: str = "attention") -> Any:
    """Return the workspace; ``prefix`` is ``attention/<name>`` for a monitor with a name."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    alarms = [f"{prefix}/alerts/firing", f"{prefix}/alerts/new"]
    verdict = f"**{prefix}/verdict** in the table of runs says whether anything needs a look, and which head."
    panels = [
        reports.MarkdownPanel(markdown=verdict),
        reports.LinePlot(title="alarms", x=f"{prefix}/global_step", y=alarms),
        reports.LinePlot(title="loss", y=[loss]),
        *(reports.MediaBrowser(title=metric, media_keys=[f"{prefix}/{metric}/heads"]) for metric in HEADS),
        reports.MediaBrowser(title="all heads now", media_keys=[f"{prefix}/energy_rms/heatmap"]),
    ]
    section = workspaces.Section(name="attention", panels=panels, is_open=True)
    return workspaces.Workspace(entity=entity, project=project, name="attention", sections=[section])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entity")
    parser.add_argument("project")
    parser.add_argument("--loss", default="loss", help="key of the loss (default: %(default)s)")
    parser.add_argument("--prefix", default="attention", help="of the monitor's keys (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="save it to the project")
    arguments = parser.parse_args()
    made = workspace(arguments.entity, arguments.project, arguments.loss, arguments.prefix)
    if arguments.save:
        print(made.save().url)
    else:
        print(json.dumps(made._to_model().model_dump(mode="json"), indent=1))


if __name__ == "__main__":
    main()
