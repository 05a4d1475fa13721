import threading
from datetime import timedelta

import pytest
from torch import distributed

from train.launch import NEUTRAL, SHARDED, check, join, meet, take, told
from train.loop import train

SECOND = timedelta(seconds=1)


def asked(**environment):
    return take(dict(environment))


def test_what_agrees_or_says_nothing_passes(make_config):
    check(make_config(), {})
    check(make_config(), asked(ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="NO", FSDP_VERSION="1", HOME="x"))
    check(make_config(train__precision="bf16"), asked(ACCELERATE_MIXED_PRECISION="bf16"))
    fsdp = {SHARDED: "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    check(make_config(train__sharding="fsdp2", train__recompute="M"), asked(**fsdp))


@pytest.mark.parametrize(
    ("environment", "changes", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "mixed_precision is bf16 and train.precision fp32"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"train__precision": "bf16"}, "mixed_precision is fp16"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "a parallelism_config"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "a dynamo_backend"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "train.micro_batch"),
        ({SHARDED: "true", "FSDP_VERSION": "2"}, {}, "asks for FSDP, and train.sharding is none"),
        ({SHARDED: "true", "FSDP_VERSION": "1"}, {"train__sharding": "fsdp2"}, "fsdp_version is 1"),
        ({SHARDED: "true"}, {"train__sharding": "fsdp2"}, "fsdp_version is 1"),
        ({SHARDED: "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "True"}, {"train__sharding": "fsdp2"}, "offload_params"),
        (
            {SHARDED: "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"train__sharding": "fsdp2"},
            "train.recompute names no kind",
        ),
    ],
)
def test_what_disagrees_is_an_error_that_says_so(make_config, environment, changes, words):
    with pytest.raises(ValueError, match="disagree") as error:
        check(make_config(**changes), asked(**environment))
    assert words in str(error.value) and str(error.value).count("\n  ") == 1


def test_every_disagreement_is_told_at_once(make_config):
    with pytest.raises(ValueError) as error:
        check(make_config(), asked(ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_USE_FSDP="true"))
    assert str(error.value).count("\n  ") == 3


def test_accelerate_is_asked_neither_to_shard_nor_for_what_is_refused():
    asks = {SHARDED: "true", "FSDP_VERSION": "2", **dict.fromkeys(NEUTRAL, "true")}
    environment = asks | {"OTHER": "x"}
    assert take(environment) == asks
    assert environment == {"FSDP_VERSION": "2", "OTHER": "x"}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_run_refuses_what_it_does_not_use_whether_it_is_installed_or_not(make_config, monkeypatch, name):
    monkeypatch.setenv(name, "4" if name.endswith("STEPS") else "inductor" if "DYNAMO" in name else "true")
    with pytest.raises(ValueError, match=r"it asks for .*, which this program does not use"):
        train(make_config())


def test_more_ranks_than_gpus_are_refused_before_any_waits_for_another(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    join({"LOCAL_WORLD_SIZE": "4"}, SECOND)
    with pytest.raises(ValueError, match=r"started 8 ranks on this machine, which has 4 GPU\(s\)"):
        join({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16", "TORCHELASTIC_USE_AGENT_STORE": "True"}, SECOND)


def test_who_started_it():
    elastic = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert told({}) == "python"
    assert told(elastic) == "torchrun, restart 1 of at most 3"
    assert told(elastic | {"ACCELERATE_MIXED_PRECISION": "no"}) == "accelerate launch, restart 1 of at most 3"


def meeting(store, ranks):
    """The names that the ranks of one start get."""
    names = {}

    def come(rank):
        own = distributed.TCPStore("127.0.0.1", store.port, is_master=False)
        names[rank] = meet(own, rank, ranks, 20 * SECOND)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(ranks)]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    assert names.keys() == set(range(ranks))
    return set(names.values())


def test_each_start_has_a_name_of_its_own_though_earlier_ones_have_used_the_store():
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (first,), (second,) = meeting(store, 3), meeting(store, 3)
    for rank in (1, 2):  # of a start in which nobody was answered
        store.set(f"word/{rank}", "of one that died")
    (third,) = meeting(store, 3)
    assert len({first, second, third}) == 3


def test_a_rank_that_does_not_come_is_named():
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("word/1", "of one that died")
    with pytest.raises(TimeoutError, match=r"rank\(s\) \[1, 2\] of 3 did not come within 1 s"):
        meet(store, 0, 3, SECOND)
    with pytest.raises(TimeoutError, match="rank 0 did not answer rank 2"):
        meet(store, 2, 3, SECOND)
