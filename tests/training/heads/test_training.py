"""`steersman train reward --objective head` and `train dpo --head`, from end to end and from within."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from steersman.guidance.head_files import HEAD_FILE, POLICY, REWARD, HeadCheckpoint, read_head
from steersman.guidance.heads import Head, HeadShape
from steersman.training import command
from steersman.training.configuration import load
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.heads import saving
from steersman.training.heads.arguments import HeadRewardConfig
from steersman.training.heads.examples import read_pair
from steersman.training.heads.features import compute_features
from steersman.training.heads.frozen_base import FrozenBase
from steersman.training.heads.network import TrainedHead
from steersman.training.heads.reward_targets import RewardLoss, pair_examples
from steersman.training.heads.trainer import HeadTrainer
from steersman.training.running import train
from tests.support import tiny
from tests.support.preferences import contents
from tests.support.random_input import random_prompts
from tests.support.training import write_config, write_task

HEAD = {"head_width": 32, "head_rank": 8, "num_train_epochs": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task; `teacher`, a random reward model; `answers.jsonl`, kind answers with reward 7 and rude ones with 2."""
    folder = write_task(tmp_path_factory.mktemp("heads"))
    model, tokenizer = load(str(folder / "model"), AutoModelForSequenceClassification, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": pair["prompt"], "response": pair[name], "reward": reward}
        for pair in pairs
        for name, reward in (("chosen", 7.0), ("rejected", 2.0))
    ]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(folder: Path, kind: str, out: Path, **keys: Any) -> int:
    """The command's exit code. keys: of the configuration, `...` for one that is left out."""
    role = {"objective": "head", "prefixes_per_pair": 0} if kind == "reward" else {"head": True}
    given = {"output_dir": str(out), **HEAD, **role, **keys}
    config = write_config(folder, **{key: value for key, value in given.items() if value is not ...})
    return command.main([kind, "--config", str(config)])


@torch.no_grad()
def outputs(checkpoint: HeadCheckpoint, folder: Path, ids: list[int]) -> torch.Tensor:
    """The head's outputs [T, V] behind every token, from a plain forward of the base."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32").eval()
    hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    return checkpoint.head(hidden)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"head_tokens": "embedding", "label_smoothing": 0.1},
        {"head_target": "ratings", "num_train_epochs": 30},
        {"head_target": "ratings", "num_train_epochs": 30, "train_file": "answers.jsonl"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())) or "pairs",
)
def test_a_reward_head_learns_and_is_saved_with_what_it_measured(
    folder: Path, tmp_path: Path, keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**keys, **({"train_file": str(folder / keys["train_file"])} if "train_file" in keys else {})}
    assert run(folder, "reward", tmp_path / "kind", **keys) == 0
    log = capsys.readouterr().err
    assert "hidden states of 32 numbers" in log
    assert f"epoch {keys.get('num_train_epochs', 8)}: loss on held-out rows" in log
    checkpoint = read_head("head", tmp_path / "kind", REWARD)
    facts = checkpoint.facts
    assert (facts["objective"], facts["target"], facts["rank"]) == ("head", keys.get("head_target", "pairs"), 9)
    assert facts["accuracy"]["1"] > 0.95
    assert facts["validation_loss"][facts["best_epoch"] - 1] == min(facts["validation_loss"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)
    right, every = 0.0, []
    for row in rows:
        scores = []
        for response in (row.chosen, row.rejected):
            found = outputs(checkpoint, folder, [*row.prompt, *response])[len(row.prompt) - 1 : -1]
            scores.append(found.gather(1, torch.tensor(response).unsqueeze(1))[:, 0])
        right += scores[0][-1].item() > scores[1][-1].item()
        every += scores
    assert facts["accuracy"]["1"] == pytest.approx(right / len(rows), abs=0.02)
    if keys.get("head_target") == "ratings":  # in the unit of the data
        mean = 4.5 if "train_file" in keys else sum(row.score_chosen + row.score_rejected for row in rows) / 128
        assert torch.cat(every).mean().item() == pytest.approx(mean, abs=0.7)
    assert {path.name for path in (tmp_path / "kind").iterdir()} == {HEAD_FILE, "README.md", "accuracy.png"}
    card = (tmp_path / "kind" / "README.md").read_text(encoding="utf-8")
    assert "steersman serve model --reward-model kind=PATH_OF_THIS_FOLDER" in card
    assert f"a standard deviation of {facts['spread']:g}" in card


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_only_what_is_kept_of_responses_is_read(
    folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, kind, tmp_path / "kind", keep=0.5, validation_file=None, num_train_epochs=1) == 0
    rows = load_preferences(folder / "pairs.jsonl", AutoTokenizer.from_pretrained(folder / "model"), 128)
    states = sum(math.ceil(len(response) / 2) for row in rows for response in (row.chosen, row.rejected))
    assert f"features of train_file: {states} hidden states" in capsys.readouterr().err


def test_a_head_learns_from_a_teacher(folder: Path, tmp_path: Path) -> None:
    keys = {"head_target": "teacher", "teacher": str(folder / "teacher"), "num_train_epochs": 20, "head_rank": 32}
    assert run(folder, "reward", tmp_path / "kind", **keys, top_k=4) == 0
    facts = read_head("head", tmp_path / "kind", REWARD).facts
    # Of the variance of rewards within a prefix, and a tenth of that between prefixes.
    assert facts["validation_loss"][-1] < 0.5 * facts["validation_loss"][0]
    assert (facts["teacher"], facts["top_k"]) == ("teacher", 4)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"loss_type": "ipo"},
        {"method": "kto", "head_tokens": "embedding"},
        {"method": "orpo", "num_train_epochs": 20},
        {"method": "simpo", "curriculum": "easy_first"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())) or "dpo",
)
def test_a_policy_head_makes_chosen_responses_likelier(folder: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    assert run(folder, "dpo", tmp_path / "kind", **keys) == 0
    checkpoint = read_head("head", tmp_path / "kind", POLICY)
    assert checkpoint.facts["accuracy"]["1"] > 0.95
    assert checkpoint.facts["objective"] == keys.get("method", "dpo")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32").eval()
    for row in load_preferences(folder / "pairs.jsonl", tokenizer, 128)[:5]:
        ratios = []
        for response in (row.chosen, row.rejected):
            ids = [*row.prompt, *response]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            places = torch.arange(len(row.prompt) - 1, len(ids) - 1)
            base = logits.log_softmax(-1)[places, response]
            guided = (logits + outputs(checkpoint, folder, ids)).log_softmax(-1)[places, response]
            ratios.append((guided - base).sum().item())
        assert ratios[0] > ratios[1]
    card = (tmp_path / "kind" / "README.md").read_text(encoding="utf-8")
    assert "steersman serve model --policy kind=PATH_OF_THIS_FOLDER" in card


def test_the_probe_tells_the_base_by_texts_of_the_training_rows(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "reward", tmp_path / "kind", num_train_epochs=1, validation_file=None) == 0
    checkpoint = read_head("head", tmp_path / "kind", REWARD)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32").eval()
    probe = checkpoint.probe
    lengths = [len(text) for text in probe.texts]
    assert len(lengths) == 8
    assert (min(lengths), lengths) == (8, sorted(lengths))
    for text, hidden in zip(probe.texts, probe.hidden, strict=True):
        with torch.no_grad():
            plain = model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(hidden, plain, atol=1e-4, rtol=1e-4)
    base = checkpoint.base
    assert (base.model_type, base.hidden_size, base.layers) == ("llama", 32, 1)
    assert base.vocabulary == model.get_output_embeddings().weight.shape[0]
    assert "accuracy" not in checkpoint.facts


def test_training_again_gives_the_same_file_from_the_same_features(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        assert run(folder, "reward", tmp_path / name, num_train_epochs=1, feature_cache=str(tmp_path / "cache")) == 0
    assert "are there already" in capsys.readouterr().err
    one, two = (contents(tmp_path / name)[HEAD_FILE] for name in ("one", "two"))
    assert one == two
    assert run(folder, "reward", tmp_path / "three", num_train_epochs=1, seed=7) == 0
    assert contents(tmp_path / "three")[HEAD_FILE] != one


def test_a_planted_reward_is_learned(rng: random.Random, tmp_path: Path) -> None:
    """Labels drawn by Bradley and Terry from a random head's reward of single tokens are learned by another head, which
    then orders tokens that it has seen behind other texts."""
    path = tiny.save_base(tmp_path / "base", rng.randrange(1000))
    base = FrozenBase(str(path), torch.device("cpu"))
    planted, tokens = Head(HeadShape(64, 8, 2, tiny.VOCABULARY)).requires_grad_(False), rng.sample(range(2, 300), 12)
    prompts = random_prompts(rng, 1500, longest=12)
    drafts = [TokenizedPreference(prompt, *([token] for token in rng.sample(tokens, 2))) for prompt in prompts]
    drafted = [reading for row in drafts for reading in read_pair(row)]
    features = compute_features(base, drafted, tmp_path, tokens=2000, what="rows")
    hidden = features.states[::2]
    raw = planted(hidden)
    planted.outer.weight.div_(raw[:, tokens].std() / 3)
    planted.outer.bias.div_(raw[:, tokens].std() / 3)
    rewards = planted(hidden)
    rows = []
    for n, row in enumerate(drafts):
        margin = rewards[n, row.chosen[0]] - rewards[n, row.rejected[0]]
        right = rng.random() < margin.sigmoid().item()
        rows.append(row if right else TokenizedPreference(row.prompt, row.rejected, row.chosen))
    readings = [reading for row in rows for reading in read_pair(row)]
    examples = pair_examples(features, readings, rows, [[1]] * len(rows))
    config = HeadRewardConfig(
        str(tmp_path / "out"),
        use_cpu=True,
        report_to="none",
        num_train_epochs=15,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    head = TrainedHead(HeadShape(64, 16, 4, tiny.VOCABULARY), features.moments(), value=True)
    learned = train(HeadTrainer(head, config, RewardLoss("pairs"), (features, examples[:1300]), None)).fold()
    found, expected = learned(hidden[1300:])[:, tokens], rewards[1300:][:, tokens]
    centred = [each - each.mean(dim=1, keepdim=True) for each in (found, expected)]
    assert torch.corrcoef(torch.stack([each.flatten() for each in centred]))[0, 1] > 0.7


def test_the_epoch_with_the_least_loss_on_held_out_rows_is_kept(folder: Path, tmp_path: Path) -> None:
    """Held-out labels that are the training rows' turned round are known best before anything is learned."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    turned = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "turned.jsonl").write_text("\n".join(map(json.dumps, turned)))
    assert run(folder, "reward", tmp_path / "kind", validation_file=str(tmp_path / "turned.jsonl")) == 0
    facts = read_head("head", tmp_path / "kind", REWARD).facts
    assert facts["best_epoch"] == 1
    assert facts["validation_loss"] == sorted(facts["validation_loss"])
    spread = facts["spread"]
    assert run(folder, "reward", tmp_path / "last", validation_file=None) == 0
    assert read_head("head", tmp_path / "last", REWARD).facts["spread"] > spread


def test_a_head_takes_the_place_of_a_whole_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "kind"
    config = write_config(folder, objective="vocabulary", output_dir=str(out), num_train_epochs=1)
    assert command.main(["reward", "--config", str(config)]) == 0
    before = contents(out)
    assert run(folder, "reward", out, num_train_epochs=1) == 2
    assert contents(out) == before
    assert run(folder, "reward", out, num_train_epochs=1, overwrite_output_dir=True) == 0
    assert set(contents(out)) == {HEAD_FILE, "README.md", "accuracy.png"}


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_a_stop_leaves_the_earlier_head_whole_and_no_features(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """SIGTERM raises SystemExit wherever the program is."""
    assert run(folder, "reward", tmp_path / "kind", num_train_epochs=1) == 0
    before = contents(tmp_path / "kind")
    if moment == "training":
        monkeypatch.setattr(HeadTrainer, "validate", lambda _: (_ for _ in ()).throw(SystemExit(143)))
    else:
        write = saving.save_head

        def half(into: Path, checkpoint: HeadCheckpoint) -> None:
            write(into, checkpoint)
            (into / HEAD_FILE).write_bytes((into / HEAD_FILE).read_bytes()[:999])
            raise SystemExit(143)

        monkeypatch.setattr(saving, "save_head", half)
    with pytest.raises(SystemExit):
        run(folder, "reward", tmp_path / "kind", num_train_epochs=1, overwrite_output_dir=True)
    assert {path: data for path, data in contents(tmp_path / "kind").items() if "unfinished" not in path} == before
    assert read_head("head", tmp_path / "kind", REWARD).role == REWARD


@pytest.mark.parametrize(
    ("kind", "keys", "complaint"),
    [
        ("reward", {"head_width": 0}, "head_width is at least 1, not 0"),
        ("reward", {"head_dropout": 1.0}, "head_dropout is from 0 to below 1, not 1"),
        ("reward", {"head_tokens": "shared"}, "head_tokens is one of free, embedding, not 'shared'"),
        ("reward", {"objective": "full", "prefixes_per_pair": ...}, "head_width: it belongs to objective head"),
        ("reward", {"teacher": "models/teacher"}, "teacher: it belongs to head_target teacher, not pairs"),
        ("reward", {"head_target": "teacher"}, "head_target teacher needs teacher"),
        ("reward", {"head_target": "ratings", "label_smoothing": 0.1}, "label_smoothing is of head_target pairs"),
        ("reward", {"lora_rank": 4}, "lora_rank: the base is frozen"),
        ("reward", {"bf16": True}, "bf16: a head is trained in float32"),
        ("reward", {"save_strategy": "epoch"}, "save_strategy: a head is trained in minutes"),
        ("reward", {"keep": 0.0}, "keep is a share above 0"),
        ("reward", {"train_sampling_strategy": "group_by_length"}, "group_by_length saves nothing"),
        ("dpo", {"method": "tdpo2"}, "method tdpo2 does not train heads, dpo, kto, orpo, simpo do"),
        ("dpo", {"head": False}, "head_width: it belongs to head: true"),
        ("dpo", {"loss_type": "aot"}, "loss_type is one of sigmoid, robust, ipo for a head, not aot"),
        ("dpo", {"method": "kto", "loss_type": "ipo"}, "loss_type: it is of method dpo; kto has a loss of its own"),
        ("dpo", {"label_smoothing": 0.1}, "label_smoothing: it belongs to loss_type robust"),
        ("dpo", {"f_divergence_type": "js_divergence"}, "f_divergence_type: it belongs to TRL's trainer"),
        ("dpo", {"lora_rank": 4}, "lora_rank: a head is no adapter"),
        ("dpo", {"beta": 0.0}, "beta is above 0"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused_before_anything_is_loaded(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    keys: dict[str, Any],
    complaint: str,
) -> None:
    monkeypatch.setattr(FrozenBase, "__init__", None)
    assert run(folder, kind, tmp_path / "kind", **keys) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"steersman train {kind}: error: ")
    assert complaint in last


def test_a_base_that_is_not_causal_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_base(tmp_path / "bert", kind="Bert")
    assert run(folder, "reward", tmp_path / "kind", model=str(tmp_path / "bert")) == 2
    assert "is no causal language model" in capsys.readouterr().err


def test_ratings_have_to_be_in_every_row(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    del row["score_rejected"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert run(folder, "reward", tmp_path / "kind", head_target="ratings", train_file=str(tmp_path / "rows.jsonl")) == 2
    assert "rows.jsonl:1: 'score_rejected' is missing" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RewardLoss, "__call__", lambda _self, head, _batch: head.bias.sum() + float("nan"))
    assert run(folder, "reward", tmp_path / "kind") == 2
    assert "training stops: try a learning_rate below" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "kind" / HEAD_FILE).exists()
