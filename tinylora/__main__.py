"""python -m tinylora, and torchrun -m tinylora: the command `tinylora`."""

from tinylora.cli import main

raise SystemExit(main())
