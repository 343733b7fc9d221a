"""`python -m pulseopt_hf`: the command line."""

from pulseopt_hf.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
