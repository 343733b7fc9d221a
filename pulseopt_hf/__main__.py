"""`python -m pulseopt_hf`: the command line."""

from pulseopt_hf.cli import console

if __name__ == "__main__":
    console()
