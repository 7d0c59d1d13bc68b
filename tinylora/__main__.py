"""python -m tinylora, and torchrun -m tinylora: the command `tinylora`."""

from tinylora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
