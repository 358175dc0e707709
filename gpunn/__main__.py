"""``python -m gpunn``: the command line of ``gpunn.cli``."""

from gpunn.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
