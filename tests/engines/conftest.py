"""What the tests of the engines share: runs on forked ranks."""

from contextlib import nullcontext
from typing import Any

import pytest

from pulseopt_hf import PulseOptTrainer
from tests.conftest import Make
from tests.engines.engine import (
    End,
    allow_fsdp_on_cpu,
    assert_ranks_agree,
    check_engine,
    settings_of,
)
from tests.engines.ranks import run_ranks
from tests.engines.trainers import Watch


@pytest.fixture
def on_ranks(make_trainer: Make) -> Make:
    """Return what trains on an engine and returns how each rank ended.

    Settings are those of `make_trainer`, but for `ranks`; `config`, what to override of the
    engine's own; `look`, at the Trainer before the first step, after each, and at the end;
    `resume`, a checkpoint; and `expect`, what `train` must raise.
    """

    def run(
        engine: str,
        cls: Any = PulseOptTrainer,
        pulse: Any = None,
        *,
        ranks: int = 2,
        config: dict[str, Any] | None = None,
        look: Any = None,
        resume: str | None = None,
        expect: Any = None,
        **settings: Any,
    ) -> list[End]:
        if engine.startswith("zero"):
            pytest.importorskip("deepspeed", reason="install the extra `deepspeed` to run this")

        def body(rank: int) -> End:
            if engine == "fsdp2":
                allow_fsdp_on_cpu()
            asked = settings_of(engine, **(config or {}))
            trainer = make_trainer(cls, pulse, **asked, **settings)
            seen = [] if look is None else Watch(trainer, look).seen
            with expect or nullcontext():
                trainer.train(resume_from_checkpoint=resume)
            if look is not None:
                seen.append(look(trainer))
            check_engine(trainer, engine)
            return End.of(trainer, seen)

        return run_ranks(ranks, body)

    return run


@pytest.fixture
def agreed(on_ranks: Make) -> Make:
    """Return what trains as `on_ranks` does, and returns the one way in which all ranks ended."""

    def run(*args: Any, ranks: int = 2, **settings: Any) -> End:
        return assert_ranks_agree(on_ranks(*args, ranks=ranks, **settings), ranks)

    return run
