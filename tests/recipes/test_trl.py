"""TRL's tasks as recipes, on local files, with a tiny model that knows a chat template."""

import json
import pickle
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from pulseopt_hf import embedded
from pulseopt_hf.cli import main
from pulseopt_hf.recipes import running
from pulseopt_hf.recipes.keys import TRL_TASKS
from pulseopt_hf.recipes.parsing import recipe_parser, resolve
from tests.recipes.tiny import results

trl = pytest.importorskip("trl", reason="install the extra `trl` to run these")

STEPS = 60  # enough for a calibration
SHORT = (
    f"--max_steps {STEPS} --save_steps 30 --logging_steps 1 --eval_strategy no --quiet --use_cpu "
    "--bf16 false --per_device_train_batch_size 4 --gradient_accumulation_steps 1 "
    "--learning_rate 1e-3"
).split()
FEW = ["--num_generations", "4"]
ARMS = ["--lr_candidates", "0.5", "1", "2", "--noise_candidates", "0", "1e-3"]
TEXTS = [text for text in embedded.sentences() if len(text) > 60][:200]


def turns(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(task: str) -> list[dict[str, Any]]:
    """Return chats, or preferences for the true end of a sentence over the reversed one."""
    ask = [turns("user", text[:20]) for text in TEXTS]
    good = [turns("assistant", text[20:50]) for text in TEXTS]
    bad = [turns("assistant", text[50:20:-1]) for text in TEXTS]
    if task == "sft":
        return [{"messages": a + g} for a, g in zip(ask, good, strict=True)]
    return [
        {"prompt": a, "chosen": g, "rejected": b} for a, g, b in zip(ask, good, bad, strict=True)
    ]


def options(task: str, model: str, folder: Path) -> list[str]:
    """Write the files of a task, and return the options that name them and the model."""
    made, files = rows(task), []
    for split, part in (("train", made[:160]), ("validation", made[160:])):
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
        files += [f"--{split}_file", str(file)]
    return ["--model_name_or_path", model, *files, *SHORT]


def losses(run: Path) -> list[float]:
    state = json.loads((run / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture
def train(chat, tmp_path, monkeypatch):
    """Train a task; see that it is calibrated as it should, and ends the same from its middle."""
    trainers: list[Any] = []
    plain = running.make_trainer

    def keep(*args: Any, **kwargs: Any) -> Any:
        trainers.append(plain(*args, **kwargs))
        return trainers[-1]

    monkeypatch.setattr(running, "make_trainer", keep)
    monkeypatch.chdir(tmp_path)

    def run(task: str, *more: str) -> tuple[Any, Path]:
        folder = tmp_path / "run"
        words = ["train", f"trl/{task}", "--output_dir", str(folder)]
        words += [*options(task, chat, tmp_path), *more]
        assert main(words) == 0
        trainer = trainers[0]
        assert isinstance(trainer, getattr(trl, f"{TRL_TASKS[task]}Trainer"))
        calibrated = task in ("sft", "reward")
        assert ("calibration_trials" in trainer.aees.get_logs()) == calibrated
        assert ("Learning rate calibrated: " in (folder / "train.log").read_text()) == calibrated
        assert (trainer.lr_scheduler.base_lrs[0] == trainer.args.learning_rate) != calibrated
        whole = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
        seen = losses(folder)
        assert whole
        (folder / f"checkpoint-{STEPS}").rename(folder / "last")
        assert main([*words, "--resume"]) == 0
        assert losses(folder) == seen
        for name, content in whole.items():
            assert (folder / name).read_bytes() == content
        return trainer, folder

    return run


def fell(run: Path) -> bool:
    seen = losses(run)
    assert len(seen) == STEPS
    return statistics.mean(seen[-10:]) < min(seen[:10])


def test_sft_trains_lora_on_the_packed_words_of_the_assistant(train):
    trainer, run = train("sft", "--max_length", "256")
    assert trainer.args.packing
    assert trainer.args.assistant_only_loss
    assert len(trainer.train_dataset) < 160 / 2, "several chats make one example"
    # An assistant has less than half of these chats' tokens.
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"]
    assert 0 < (labels >= 0).float().mean() < 0.7
    assert fell(run)
    assert (run / "adapter_model.safetensors").exists()
    assert "library_name: peft" in (run / "README.md").read_text()
    scores = results(run)
    assert scores["eval_loss"] > 0
    assert 0 < scores["eval_mean_token_accuracy"] <= 1


@pytest.mark.slow
def test_find_lr_finds_one_for_sft(chat, tmp_path, capsys):
    words = [word for word in options("sft", chat, tmp_path) if word != "--quiet"]
    assert main(["find-lr", "trl/sft", *words]) == 0
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0


@pytest.mark.parametrize(
    ("task", "score"), [("dpo", "eval_rewards/accuracies"), ("reward", "eval_accuracy")]
)
def test_a_preference_for_text_over_its_reverse_is_learned(task, score, train):
    """With arms where there is no calibration, whose numbers stand beside TRL's in the log."""
    trainer, run = train(task, *(ARMS if task == "dpo" else []))
    assert fell(run)
    assert results(run)[score] > 0.9, "reversed text is easy to tell"
    if task == "reward":
        assert trainer.model.config.num_labels == 1
        return
    logs = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    multipliers = [entry["pulse/lr_multiplier"] for entry in logs]
    assert set(multipliers) == {0.5, 1.0, 2.0}
    for entry, multiplier in zip(logs, multipliers, strict=True):
        assert entry["pulse/learning_rate"] == pytest.approx(entry["learning_rate"] * multiplier)


def test_grpo_is_rewarded_by_a_function_of_a_file(train, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def share(text):\n"
        "    return sum(map(str.isalpha, text)) / (len(text) + 1)\n"
        "def letters(completions, **columns):\n"
        "    return [share(completion[0]['content']) for completion in completions]\n"
    )
    words = ["--reward_funcs", "rewards.py:letters", "think_format_reward"]
    words += [*FEW, "--max_completion_length", "8", "--max_eval_samples", "4"]
    words += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "16"]
    trainer, run = train("grpo", *words)
    history = [entry for entry in trainer.state.log_history if "rewards/letters/mean" in entry]
    rewards = [entry["rewards/letters/mean"] for entry in history]
    assert statistics.mean(rewards[-10:]) > statistics.mean(rewards[:10]) + 0.2
    assert {entry["rewards/think_format_reward/mean"] for entry in history} == {0.0}
    kept = yaml.safe_load((run / "recipe.yaml").read_text())["reward_funcs"]
    assert kept == [f"{tmp_path}/rewards.py:letters", "think_format_reward"]


@pytest.mark.parametrize(
    ("task", "extra", "says"),
    [
        ("sft", ["--packing_strategy", "tight"], "`packing_strategy`: invalid choice: 'tight'"),
        ("sft", ["--model_type", "llama"], "`model_type` cannot be used with `task: sft`"),
        ("sft", ["--metrics", "rouge"], "`metrics` cannot be used with `task: sft`"),
        ("dpo", ["--do_train", "false"], "`do_train: false` cannot be used with `task: dpo`"),
        ("dpo", ["--num_generations", "4"], "unknown option `--num_generations`"),
        ("sft", ["--eos_token", "stop"], "`task: sft`: The specified `eos_token` ('stop') is not"),
        ("sft", ["--model_init_kwargs", '{"trust_remote_code": true}'], "must not hold `trust_"),
        ("reward", ["--reward_funcs", "a.b"], "`reward_funcs` cannot be used with `task: reward`"),
        ("grpo", ["--reward_funcs", "think_format"], "did you mean `think_format_reward`?"),
        ("grpo", ["--reward_funcs", "gone.py:f"], "`gone.py:f` could not be loaded"),
        ("grpo", ["--reward_funcs", "math.pi"], "`math.pi` is not a function"),
        ("sft", ["--dataset_text_field", "body"], "`task: sft` reads `messages`, or `prompt` and "),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    task, extra, says, chat, tmp_path, monkeypatch, capsys
):
    words = [*options(task, chat, tmp_path), *(FEW if task == "grpo" else [])]
    if "body" in extra:
        file = tmp_path / "bodies.jsonl"
        file.write_text('{"chat": "hello"}\n')
        extra = [*extra, "--train_file", str(file)]
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    capsys.readouterr()
    assert main(["train", f"trl/{task}", *words, *extra]) == 2
    assert says in capsys.readouterr().err
    assert list(work.iterdir()) == []


def test_a_key_of_trl_is_a_key_of_its_tasks_only_and_has_help(tmp_path, capsys):
    for recipe, there in (("trl/sft", True), ("trl/grpo", False), ("glue/sst2", False)):
        with pytest.raises(SystemExit):
            main(["train", recipe, "--help"])
        assert ("--assistant_only_loss" in capsys.readouterr().out) == there
    file = tmp_path / "mine.yaml"
    file.write_text("task: sft\nmodel_name_or_path: x\nassistant_only_los: true\n")
    assert main(["validate", str(file), "--use_cpu"]) == 2
    assert "did you mean `assistant_only_loss`?" in capsys.readouterr().err


def test_the_arguments_keep_trls_defaults_and_are_read_again_from_a_pickle() -> None:
    for task, config in (("sft", trl.SFTConfig), ("grpo", trl.GRPOConfig)):
        training = resolve(f"trl/{task}", ["--use_cpu", "--output_dir", "x"]).training
        assert isinstance(training, config)
        assert training.logging_steps == config.logging_steps == 10
        assert pickle.loads(pickle.dumps(training)) == training
        assert (training.do_eval, training.report_to) == (True, [])


def test_without_trl_its_tasks_name_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "pulseopt_hf.recipes.tasks.trl", raising=False)
    monkeypatch.delattr("pulseopt_hf.recipes.tasks.trl", raising=False)
    recipe_parser.cache_clear()
    assert main(["validate", "trl/sft"]) == 2
    assert "`task: sft` needs `pip install 'pulseopt-hf[trl]'`" in capsys.readouterr().err
    assert main(["validate", "glue/sst2"]) == 0


@pytest.mark.skipif(find_spec("math_verify") is not None, reason="math-verify is installed")
def test_without_math_verify_its_reward_names_the_extra(chat, tmp_path, capsys):
    words = [*options("grpo", chat, tmp_path), *FEW, "--output_dir", str(tmp_path / "run")]
    assert main(["train", "trl/grpo", *words]) == 2
    assert "`accuracy_reward` needs `pip install 'pulseopt-hf[trl]'`" in capsys.readouterr().err
