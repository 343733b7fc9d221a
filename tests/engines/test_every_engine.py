"""What holds on DDP, FSDP2 and every stage of DeepSpeed alike."""

from typing import Any

import pytest
import torch
from transformers import Trainer

from tests.conftest import ARMS, Make, flat, without_dropout
from tests.engines.engine import SCHEDULER, VARIANTS, assert_ranks_agree, lrs, slow, whole
from tests.engines.trainers import bad_loss
from tests.versions import needs

KNOBS: dict[str, Any] = {**ARMS, "episode_length": 3}


@pytest.mark.parametrize(
    ("engine", "ranks", "bf16"),
    [
        *(("ddp", 2, False), ("ddp", 2, True), ("ddp", 4, False)),
        *(("fsdp2", 2, False), ("fsdp2", 2, True), slow("fsdp2", 4, False)),
    ],
)
def test_all_ranks_run_the_same_arms_and_have_equal_parameters_after_every_step(
    engine: str, ranks: int, bf16: bool, on_ranks: Make
) -> None:
    ends = on_ranks(engine, pulse=KNOBS, ranks=ranks, bf16=bf16, look=whole)
    end = assert_ranks_agree(ends, ranks)
    assert end.precision == ("bf16" if bf16 else "no")
    assert len(end.logs["episode_rewards"]) == 8
    assert len(set(end.logs["selected_combined_names"])) > 3
    assert len(set(end.logs["selected_lr_values"])) == 3
    assert end.logs["episode_end_losses"][-1] < end.logs["episode_start_losses"][0]
    assert len(end.seen) == 26
    for other in ends[1:]:
        assert all(map(torch.equal, other.seen, end.seen))


@pytest.mark.parametrize(
    ("engine", "ranks"), [("ddp", 2), ("ddp", 4), ("zero2", 2), slow("zero1", 2), slow("zero3", 2)]
)
def test_ranks_together_equal_one_process_with_the_same_global_batch(
    engine: str, ranks: int, agreed: Make, train: Make, tiny_model: Any, tiny_data: Any
) -> None:
    # Under DDP noise is that of one process; DeepSpeed's partitions have their own, and its Adam
    # rounds otherwise. Dropout's masks follow the batch of a process.
    knobs, loss, weight = (KNOBS, 1e-4, 1e-4)
    if engine != "ddp":
        knobs, loss, weight = ({**KNOBS, "noise_candidates": [0.0]}, 1e-3, 2e-3)
    # The global batches of 64 rows hold the same rows in every split.
    common = {
        "pulse": knobs,
        "model": without_dropout(tiny_model()),
        "train_dataset": tiny_data[:64],
    }
    end = agreed(engine, ranks=ranks, per_device_train_batch_size=8 // ranks, **common)
    alone = train(per_device_train_batch_size=8, **common)
    expected = alone.aees.get_logs()
    assert end.logs["selected_combined_names"] == expected["selected_combined_names"]
    assert len(expected["selected_combined_names"]) == 8
    for key in ("episode_start_losses", "episode_end_losses", "episode_rewards"):
        assert end.logs[key] == pytest.approx(expected[key], abs=loss)
    assert torch.allclose(end.parameters, flat(alone.model), atol=weight)
    assert not torch.allclose(end.parameters, flat(tiny_model()), atol=1e-2)


ORDINARY = {("zero2", "scheduler of the config"), ("zero3", "as it is")}


@pytest.mark.parametrize(
    ("engine", "variant"),
    [("fsdp2", "as it is")]
    + [
        (engine, variant) if (engine, variant) in ORDINARY else slow(engine, variant)
        for engine in ("zero0", "zero1", "zero2", "zero3")
        for variant in VARIANTS
        if (engine, variant) != ("zero0", "optimizer offload")
    ],
)
def test_a_constant_multiplier_equals_the_same_learning_rate_bit_for_bit(engine, variant, on_ranks):
    settings = {"max_steps": 12, **VARIANTS[variant]}
    knobs = {"lr_candidates": [2.0], "episode_length": 4}
    ours = on_ranks(engine, pulse=knobs, learning_rate=2e-3, **settings)[0]
    plain = on_ranks(engine, Trainer, learning_rate=4e-3, **settings)[0]
    assert torch.equal(ours.parameters, plain.parameters)
    scaled = [2.0 * lr for lr in lrs(ours)]
    assert scaled == pytest.approx(lrs(plain)), "the scheduler sees more than the base LR"
    assert len(set(lrs(ours))) > 6
    assert ours.steps == 12


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_neutral_run_equals_a_plain_trainer_bit_for_bit_and_so_does_the_callback(engine, agreed):
    neutral = {"lr_candidates": [1.0], "episode_length": 4}
    plain = agreed(engine, "stock", max_steps=8)
    for road in ("subclass", "attached"):
        ours = agreed(engine, road, neutral, max_steps=8)
        assert torch.equal(ours.parameters, plain.parameters)
        assert ours.steps == 8
    # It also runs the same arms as the Trainer.
    ours, attached = (agreed(engine, road, KNOBS) for road in ("subclass", "attached"))
    assert attached.logs == ours.logs
    assert torch.equal(attached.parameters, ours.parameters)


# DeepSpeed with bf16 then looks for no overflow itself, and would train on NaN.
UNCHECKED = {"enabled": True, "check_grad_overflow": False}


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        *(("ddp", {"max_grad_norm": 0.0}), ("ddp", {"max_grad_norm": 1.0}), ("fsdp2", {})),
        *(("zero2", {"config": {"scheduler": SCHEDULER}}), ("zero3", {})),
        *(slow("zero0", {}), slow("zero1", {}), slow("zero2", {})),
        *(slow(f"zero{stage}", {"config": {"scheduler": SCHEDULER}}) for stage in (0, 1, 3)),
        *(
            slow(f"zero{stage}", {"bf16": True, "config": {"bf16": UNCHECKED, **scheduler}})
            for stage in (1, 2, 3)
            for scheduler in ({}, {"scheduler": SCHEDULER})
        ),
    ],
)
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(engine, settings, agreed):
    cls = bad_loss(7, value=float("inf"), base=bad_loss(3, rank=1))
    knobs = {**KNOBS, "lr_candidates": [0.5, 2.0]}
    end = agreed(engine, cls, knobs, max_steps=14, **settings)
    assert (end.skipped, end.steps) == (2, 12)
    assert len(end.logs["episode_rewards"]) == 4
    logged = [entry["pulse/skipped_steps"] for entry in end.history]
    assert logged == [0] * 3 + [1] * 4 + [2] * 7
    assert len(set(lrs(end))) <= 13, "the scheduler advanced over skipped steps"


@pytest.mark.parametrize(
    ("knobs", "cls", "message"),
    [
        ({"nonfinite": "raise"}, bad_loss(4, rank=1), "not finite at global step 4"),
        (
            {"max_consecutive_skips": 5},
            bad_loss(*range(2, 24)),
            r"5 optimizer steps in a row .* global step 6",
        ),
    ],
    ids=["nonfinite='raise'", "too many skips"],
)
def test_what_ends_a_run_ends_it_on_all_ranks_alike(knobs, cls, message, agreed):
    expect = pytest.raises(ValueError if "nonfinite" in knobs else RuntimeError, match=message)
    agreed("ddp", cls, {**KNOBS, **knobs}, expect=expect)


SHARDED, FULL = ({"state_dict_type": f"{kind}_STATE_DICT"} for kind in ("SHARDED", "FULL"))


@pytest.mark.parametrize(
    ("engine", "config"),
    [
        ("fsdp2", SHARDED),
        ("zero2", {}),
        *(slow("fsdp2", FULL), slow("zero1", {}), slow("zero3", {})),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(engine, config, agreed, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "config": config, "max_steps": 18}
    straight = agreed(engine, pulse=KNOBS, **settings, save_steps=10)  # amid an episode
    resume = str(tmp_path / "run" / "checkpoint-10")
    resumed = agreed(engine, pulse=KNOBS, **settings, resume=resume)
    assert resumed.logs == straight.logs
    assert len(resumed.logs["episode_rewards"]) == 6
    assert torch.equal(resumed.parameters, straight.parameters)


NEEDS_5_24 = needs(
    "transformers", "5.24", "hands torch a device `cpu:0`, where some torch can load nothing"
)


@pytest.mark.parametrize(
    ("engine", "before", "after"),
    [
        pytest.param("ddp", 1, 2, marks=NEEDS_5_24),
        pytest.param("ddp", 2, 1, marks=NEEDS_5_24),
        slow("fsdp2", 2, 4),
        slow("fsdp2", 4, 2),
    ],
)
def test_a_checkpoint_resumes_on_another_number_of_ranks(engine, before, after, agreed, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "save_steps": 10}

    def run(ranks: int, resume: str | None) -> Any:
        own = {"ranks": ranks, "resume": resume, "per_device_train_batch_size": 8 // ranks}
        return agreed(engine, pulse=KNOBS, **own, **settings).logs

    earlier = run(before, None)
    later = run(after, str(tmp_path / "run" / "checkpoint-10"))
    # The three episodes closed before are carried over, and the one that was open goes on.
    assert later["episode_rewards"][:3] == earlier["episode_rewards"][:3]
    for key in ("selected_combined_names", "episode_start_losses"):
        assert later[key][:4] == earlier[key][:4]
    assert later["episode_start_steps"] == earlier["episode_start_steps"] == [*range(0, 24, 3)]
