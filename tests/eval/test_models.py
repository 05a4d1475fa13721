from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from eval import models
from eval.models import broken_part, check_vocabulary, in_batches, is_ours, open_model, stock_nll
from hybridlm import HybridLMForCausalLM
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.tokenizer import byte_tokenizer


def test_hybrids_are_opened_by_this_library_and_others_by_transformers(model_folder, stock_folder):
    ours, tokenizer = open_model(str(model_folder()))
    assert isinstance(ours, HybridLMForCausalLM) and not ours.training and ours.dtype == torch.float32
    assert tokenizer("a").input_ids == [97]
    stock, _ = open_model(str(stock_folder), torch.bfloat16)
    assert type(stock).__name__ == "LlamaForCausalLM" and not stock.training and stock.dtype == torch.bfloat16
    assert is_ours(str(model_folder())) and not is_ours(str(stock_folder))


def test_a_model_type_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "frobnicate"}')
    with pytest.raises(ValueError, match=r"cannot be opened by transformers.*frobnicate"):
        open_model(str(tmp_path))


def test_a_configuration_that_is_no_object(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no checkpoint"):
        open_model(str(tmp_path))


def test_weights_that_are_no_safetensors_are_refused(stock_folder):
    model, _ = open_model(str(stock_folder))
    (stock_folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), stock_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be opened by transformers"):
        open_model(str(stock_folder))


def test_weights_that_do_not_fit_are_refused_not_drawn_at_random(stock_folder):
    file = stock_folder / "model.safetensors"
    weights, whole, gone, other = load_file(file), file.read_bytes(), "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {"rotary.inv_freq": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert open_model(str(stock_folder))[0].model.norm.weight.equal(weights[gone])
    save_file({k: v[:2] if k == other else v.clone() for k, v in weights.items() if k != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit its config\.json; missing: {gone}; of another shape: .*{other}"):
        open_model(str(stock_folder))
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="cannot be opened by transformers"):
        open_model(str(stock_folder))


@pytest.mark.parametrize("at_a_time", [3, 7, 100])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_of_a_stock_model_in_pieces_is_that_of_all_its_logits(stock_folder, tmp_path, monkeypatch, at_a_time, kind):
    monkeypatch.setattr(models, "LOGITS_AT_A_TIME", at_a_time)
    folder = stock_folder
    if kind == "gpt2":
        GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
        folder = tmp_path / "gpt2"
        byte_tokenizer().save_pretrained(folder)
    model, _ = open_model(str(folder))
    ids = torch.randint(256, (2, 20))
    targets = torch.randint(256, (2, 20))
    targets[1, 12:] = IGNORE
    with torch.no_grad():
        want = cross_entropy(model(input_ids=ids).logits.mT, targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(stock_nll(model, ids, targets), want, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (2, 20, 258)  # it is left as it was


def test_a_vocabulary_among_the_settings_of_the_text():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9))  # as of models that see pictures, too
    check_vocabulary(8, SimpleNamespace(config=config), "m")
    with pytest.raises(ValueError, match=r"token id 9, but the model's vocabulary has 9 \(vocab_size\)"):
        check_vocabulary(9, SimpleNamespace(config=config), "m")


def refusing(most, error):
    calls = []

    def run(batch):
        calls.append(len(batch))
        if len(batch) > most:
            raise error
        return sum(batch)

    return run, calls


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_a_batch_that_is_too_large_is_halved_and_said_so(error, capsys):
    run, calls = refusing(2, error)
    found = list(in_batches(run, range(10), 8))
    assert [batch for batch, _ in found] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert [result for _, result in found] == [1, 5, 9, 13, 17]
    assert calls == [8, 4, 2, 2, 2, 2, 2]
    assert "not enough memory for a batch of 8: going on with 4 at a time" in capsys.readouterr().err


def test_half_of_what_was_too_much_comes_next_though_more_was_asked_for():
    run, calls = refusing(1, MemoryError())
    assert [result for _, result in in_batches(run, range(3), 100)] == [0, 1, 2]
    assert calls == [3, 1, 1, 1]


def test_other_errors_and_a_single_item_that_is_too_large_are_raised():
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(refusing(0, RuntimeError("shapes"))[0], range(3), 2))
    with pytest.raises(MemoryError, match="not enough memory for a single one"):
        list(in_batches(refusing(0, MemoryError())[0], range(3), 2))


def test_what_is_broken_is_named(model_folder, monkeypatch):
    model, _ = open_model(str(model_folder()))
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert broken_part(model, ids) == "its layers' outputs are finite"
    monkeypatch.setattr(models, "LOGITS_AT_A_TIME", 3)
    at_once = []
    model.lm_head.register_forward_hook(lambda head, args, logits: at_once.append(logits.shape[1]))
    kept = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(torch.full_like(kept, 3e38))
    assert broken_part(model, ids) == "the first output that is not finite is that of lm_head"
    model.lm_head.weight = kept
    assert at_once == [3, 1]  # all logits of a long text would not fit into memory
    mixer = model.backbone.layers[2].mixer
    forward = mixer.forward
    monkeypatch.setattr(mixer, "forward", lambda *a, **k: (forward(*a, **k)[0] * torch.inf, None))
    assert broken_part(model, ids) == "the first output that is not finite is that of backbone.layers.2.mixer"
    with torch.no_grad():
        model.backbone.layers[1].norm.weight[0] = torch.nan
    assert broken_part(model, ids) == "its weight backbone.layers.1.norm.weight has numbers that are not finite"
