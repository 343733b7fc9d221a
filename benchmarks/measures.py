"""How far one step at the tuned LR moves a model, in each measure that a calibration could take.

    python benchmarks/measures.py --data FOLDER [--settings sst2,...] [--write]

A good measure has the same value at the tuned LR in every setting. For each setting of the atlas
whose LR was tuned (`benchmarks/results/atlas.json`), one step of its optimizer is taken from the
start on each of five batches, at that LR over the square root of the learning rate's divisor for
passes, and measured on 32 rows of other batches:

- outputs: RMS change of the logits, less what classes share, over that under dropout of a tenth;
- body: the same of what the last layer returns;
- logits: RMS change of the logits, less what classes share;
- Fisher: RMS change of log p(y), y drawn from the model's prediction before the step;
- weights: norm of the change of the weight matrices over their norm.

`--write` puts the result into `benchmarks/results/measures.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from benchmarks import atlas, compare_tasks
except ImportError:
    import atlas
    import compare_tasks

from pulseopt_hf.compare.cells import Cell, trainer_of
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.movement import noise, read, read_body
from pulseopt_hf.optim.newness import newness_of

RESULT = Path(__file__).parent / "results" / "measures.json"
MEASURES = ("outputs", "body", "logits", "Fisher", "weights")
ROWS, BATCHES, DRAWS = 32, 5, 4
