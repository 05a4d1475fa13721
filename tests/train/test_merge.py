import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, NemotronHForCausalLM

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.tokenizer import byte_tokenizer
from train import merge, tensor_files
from train.__main__ import main
from train.loop import train

FIELDS = {
    "hybrid_override_pattern": "M*E", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8,
    "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8,
}  # fmt: skip


@pytest.fixture
def make_models(tmp_path):
    def make(count=3, tokenizer=True, **changes):
        """Folders of models of one shape whose weights, those of buffers too, differ."""
        folders = [tmp_path / f"model-{i}" for i in range(count)]
        for i, folder in enumerate(folders):
            torch.manual_seed(i)
            model = HybridLMForCausalLM(HybridLMConfig(**FIELDS | changes))
            for buffer in model.buffers():
                buffer.normal_()
            model.save_pretrained(folder, max_shard_size="20KB" if i == 1 else "5GB")
            if tokenizer:
                byte_tokenizer().save_pretrained(folder)
        return folders

    return make


def weights(folder):
    return {name: value for file in sorted(Path(folder).glob("*.safetensors")) for name, value in load_file(file).items()}


def mean(folders):
    each = [weights(folder) for folder in folders]
    return {name: torch.stack([one[name].double() for one in each]).mean(0).float() for name in each[0]}


def alter(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("file_bytes", [20_000, tensor_files.FILE_BYTES])
def test_every_weight_and_buffer_is_the_mean_of_one_file_or_several(make_models, tmp_path, run_main, monkeypatch, file_bytes):
    folders, out = make_models(), tmp_path / "deep" / "merged"
    alter(folders[2], lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items()}))
    assert len(list(folders[1].glob("*.safetensors"))) > 1
    monkeypatch.setattr(tensor_files, "FILE_BYTES", file_bytes)
    status, text, _ = run_main(main, "merge", "--models", *folders, "--out", out)
    assert status == 0
    assert f"{out}: the mean of 3 models: {', '.join(map(str, folders))}" in text
    assert text.splitlines()[-1] == f"next: python -m eval perplexity --model {out} {folders[2]} --data SOURCE"
    wanted = mean(folders)
    assert any("e_score_correction_bias" in name for name in wanted)
    assert same(weights(out), wanted)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (file_bytes == 20_000)
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    for kind in (HybridLMForCausalLM, AutoModelForCausalLM):
        model, report = kind.from_pretrained(out, output_loading_info=True)
        assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is NemotronHForCausalLM
    assert model.generation_config.pad_token_id == AutoModelForCausalLM.from_pretrained(folders[0]).generation_config.pad_token_id
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"] == byte_tokenizer()("the cat")["input_ids"]


def test_the_checkpoints_of_a_run(quiet_config, tmp_path, run_main):
    config = quiet_config(train__checkpoint_every=2, train__keep_checkpoints=9)
    train(config)
    run, out = Path(config.run_dir), tmp_path / "merged"
    steps = [run / "checkpoints" / f"step-{step}" / "model" for step in (2, 4, 6, 8)]

    def merged(*which):
        shutil.rmtree(out, ignore_errors=True)
        status, text, err = run_main(main, "merge", *which, "--out", out)
        return (status, err) if status else (weights(out), text)

    for which, chosen in (([], steps), (["--last", 2], steps[2:]), (["--from_step", 3], steps[1:])):
        found, text = merged("--run", run, *which)
        assert same(found, mean(chosen))
        assert f"the mean of {len(chosen)} models: {', '.join(f'run/{step.parent.name}' for step in chosen)}\n" in text
    card, text = ModelCard.load(out / "README.md"), (out / "README.md").read_text()
    assert card.data.tags == ["hybrid", "mamba2", "nemotron_h", "merge"] and card.data.model_name == "merged"
    model = HybridLMForCausalLM.from_pretrained(out)
    assert f"weights of 3 models of {sum(p.numel() for p in model.parameters()):,} parameters" in text
    assert "- `run/step-4`\n- `run/step-6`\n- `run/step-8`\n" in text and str(tmp_path) not in text
    assert same({"": weights(run / "model")["lm_head.weight"]}, {"": load_file(steps[3] / "model.safetensors")["lm_head.weight"]})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (steps[3] / name).read_bytes()

    damaged = steps[2] / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    found, text = merged("--run", run, "--last", 2)
    assert same(found, mean([steps[1], steps[3]]))
    status, err = merged("--models", *steps)
    assert status == 2 and f"{steps[2]} is of a checkpoint that is not valid: model/model.safetensors has been altered" in err
    status, err = merged("--run", run, "--last", 4)
    assert status == 2 and "has 3 whole checkpoints (step-2, step-4, step-8), and 4 are wanted. train.keep_every: N keeps" in err
    status, err = merged("--run", run, "--from_step", 5)
    assert status == 2 and "has 1 whole checkpoints from step 5 on (step-8), and 2 are wanted" in err
    status, err = merged("--models", steps[3], run / "model")
    assert status == 2 and "a folder is named twice" in err
    assert not out.exists()


def test_what_differs_is_listed_and_nothing_written(make_models, tmp_path, run_main):
    first, second, third = make_models()
    out = tmp_path / "merged"
    config = json.loads((third / "config.json").read_text())
    (third / "config.json").write_text(json.dumps(config | {"hidden_size": 48, "transformers_version": "0"}))
    name, gone, more = "backbone.norm_f.weight", "backbone.embeddings.weight", "backbone.more.weight"
    alter(third, lambda t: t.update({name: torch.ones(31), more: torch.ones(1), "lm_head.weight": t["lm_head.weight"].int()}))
    alter(third, lambda t: t.pop(gone))
    (third / "tokenizer.json").unlink()
    status, _, err = run_main(main, "merge", "--models", first, second, third, "--out", out)
    assert status == 2
    for fault in (
        "config.json hidden_size: 32 and 48", "tokenizer.json: not the same", f"weights missing ['{gone}']",
        f"weights unknown ['{more}']", f"weights {name}: wanted ((32,), torch.float32), got ((31,), torch.float32)",
        "weights lm_head.weight: wanted ((258, 32), torch.float32), got ((258, 32), torch.int32)",
    ):  # fmt: skip
        assert f"{third}: {fault}" in err
    assert str(second) not in err and "transformers_version" not in err
    assert not out.exists()


def test_what_is_not_finite_is_named_and_nothing_is_left(make_models, tmp_path, run_main, monkeypatch):
    folders, out = make_models(2), tmp_path / "merged"
    alter(folders[0], lambda tensors: tensors["backbone.norm_f.weight"].fill_(float("nan")))
    before = sorted(tmp_path.iterdir())
    status, _, err = run_main(main, "merge", "--models", *folders, "--out", out)
    assert status == 2 and f"backbone.norm_f.weight of {folders[0]} is not finite" in err
    assert sorted(tmp_path.iterdir()) == before

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "_check_finite", interrupt)
    status, _, err = run_main(main, "merge", "--models", *folders, "--out", out)
    assert status == 1 and f"interrupted; {out} is not there" in err
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_written_over_and_what_a_kill_left_is_in_nobodys_way(make_models, tmp_path, run_main):
    folders, out = make_models(2), tmp_path / "merged"
    (tmp_path / ".merged.unfinished").mkdir()
    (tmp_path / ".merged.unfinished" / "left.safetensors").write_text("half")
    assert run_main(main, "merge", "--models", *folders, "--out", out)[0] == 0
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]
    before = weights(out)
    status, _, err = run_main(main, "merge", "--models", *folders, "--out", out)
    assert status == 2 and f"{out} is there already, and nothing is written over" in err
    assert same(weights(out), before)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--models", "a"], "a mean needs at least 2 models; got 1"),
        (["--models", "no/where", "else/where"], "there is no checkpoint folder no/where"),
        (["--models", "a", "b", "--last", "2"], "--last and --from_step choose among the checkpoints of --run"),
        (["--run", "no/where"], "no/where is no run directory"),
        (["--run", "a", "--last", "1"], "--last must be at least 2; got 1"),
        (["--run", "a", "--models", "b"], "not allowed with argument"),
        ([], "one of the arguments --run --models is required"),
    ],
)
def test_bad_input_ends_with_2_and_says_what(tmp_path, run_main, arguments, says):
    status, _, err = run_main(main, "merge", *arguments, "--out", tmp_path / "out")
    assert status == 2 and says in err


def test_a_classifier_is_merged_too(make_labelled, tmp_path, run_main):
    config = make_labelled("sum", train__steps=2, train__checkpoint_every=1)
    train(config)
    out = tmp_path / "merged"
    assert run_main(main, "merge", "--run", config.run_dir, "--out", out)[0] == 0
    text = (out / "README.md").read_text()
    assert ModelCard.load(out / "README.md").data.pipeline_tag == "text-classification"
    scope = {"folder": out}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    assert scope["model"](torch.tensor([scope["tokenizer"]("the cat")["input_ids"]])).logits.shape == (1, 3)
    other = shutil.copytree(out, tmp_path / "other")
    values = json.loads((other / "config.json").read_text())
    values["id2label"]["0"], values["label2id"] = "what", None
    (other / "config.json").write_text(json.dumps(values))
    status, _, err = run_main(main, "merge", "--models", out, other, "--out", tmp_path / "more")
    assert status == 2 and "config.json labels: [" in err and "'what'" in err
