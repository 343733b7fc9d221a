"""Shows runs: the page of `pulseopt-hf report`, and the reading of a run's folder behind it.

Reading needs the standard library only; plots load what they need when they are made.
"""
