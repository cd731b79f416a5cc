"""``python -m attnmonitor`` is the command line."""

from attnmonitor.cli import main

raise SystemExit(main())
