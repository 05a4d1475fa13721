import pytest

from hybridlm.tokenizer import byte_tokenizer
from train.setup import build_model, build_tokenizer, open_data


def test_the_model_takes_its_special_tokens_from_the_tokenizer(make_config):
    model = build_model(make_config())
    build_tokenizer(make_config(), model)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 256, 257)


def test_bytes_can_be_asked_for_where_the_weights_come_without_a_tokenizer(make_config, tmp_path):
    build_model(make_config()).save_pretrained(tmp_path / "bare")
    config = make_config(model__init_from=str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="no tokenizer"):
        build_tokenizer(config, build_model(config))
    config = make_config(model__init_from=str(tmp_path / "bare"), data__tokenizer="bytes")
    assert len(build_tokenizer(config, build_model(config))) == 258


def test_a_token_past_the_vocabulary_is_an_error_before_the_run(make_config):
    with pytest.raises(ValueError, match=r"token id 256, past the vocabulary of the model \(vocab_size=200\)"):
        open_data(make_config(), byte_tokenizer(), 200, quiet=True)


def test_validation_documents_of_one_token_are_an_error_before_the_run(make_config, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    config = make_config(data__val_source=str(tmp_path / "one.txt"))
    with pytest.raises(ValueError, match="nothing to predict"):
        open_data(config, byte_tokenizer(), 258, quiet=True)
