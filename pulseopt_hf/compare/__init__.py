"""`pulseopt-hf compare`: methods, base learning rates and seeds on one task, at equal cost."""
