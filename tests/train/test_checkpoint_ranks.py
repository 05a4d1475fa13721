"""Checkpoints of a model that ranks share: the files of one rank, read by any number of them, whatever fails on the way."""

import errno
import itertools
import os
import signal
import threading
import time
import weakref
from functools import cache

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.tokenizer import byte_tokenizer
from tests.conftest import TINY
from train import checkpoint, files, ranks, tensor_files
from train.optim import build_optimizers
from train.settings import Optim
from train.weights import load_weights

SMALL = 8_000  # bytes of a file, for which a tiny checkpoint is many
PARTS = 4  # of a sweep, so that processes can share it


def build(group=None, seed=None, **changes):
    """A model and its optimisers, on the ranks of the group, filled with what `seed` says, or with NaN."""
    with torch.device("meta"):
        model = HybridLMForCausalLM(HybridLMConfig(**TINY | {"hybrid_override_pattern": "M*-E"} | changes))
    if group is not None:
        mesh = init_device_mesh("cpu", (group.size(),))
        fully_shard(model.backbone.embeddings, mesh=mesh)
        for block in model.backbone.layers:
            fully_shard([module for module in block.modules() if isinstance(module, nn.Linear)], mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    optimizers = build_optimizers(model, Optim(name="muon"))
    for p, optimizer in checkpoint._owners(optimizers).items():
        optimizer.state[p] = checkpoint._zeros(p, optimizer)
    for name, tensor in tensors(model, optimizers).items():
        rows(tensor, torch.full(tensor.shape, torch.nan) if seed is None else value(name, tensor.shape, seed), copy=True)
    return model, optimizers


def tensors(model, optimizers):
    return model.state_dict() | checkpoint._optimizer_tensors(checkpoint._states(model, optimizers))


def value(name, shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((name, seed)) % 2**32))


def rows(tensor, whole, copy=False):
    """This rank's rows of `whole` are what `tensor` has of it, or become that."""
    own = tensor
    if isinstance(tensor, DTensor):
        chunks = whole.chunk(tensor.device_mesh.size())
        rank = tensor.device_mesh.get_local_rank()
        own, whole = tensor.to_local(), chunks[rank] if rank < len(chunks) else whole[:0]
    if copy:
        own.detach().copy_(whole)
    assert own.shape == whole.shape
    return torch.equal(own, whole)


def holds(model, optimizers, seed):
    found = tensors(model, optimizers)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    return all(rows(tensor, value(name, tensor.shape, seed)) for name, tensor in found.items())


def join():
    """The group of all ranks, in a forked child."""
    distributed.init_process_group("gloo")
    return ranks.patient_group()


@cache
def sidecars():
    return checkpoint.sidecars(build()[0], byte_tokenizer())


def shot(step, model, optimizers, group=None):
    state = {"step": step, "samples": 1, "tokens": 12, "identity": {}, "cursor": {}, "spikes": {}, "validation": []}
    main = group is None or group.rank() == 0
    torch.manual_seed(0 if main else 1)  # what rank 0 has of these counts
    return checkpoint.snapshot(model, optimizers, state, sidecars() if main else {}, copy=True)


def save(run_dir, step, model, optimizers, group=None):
    return checkpoint.write(run_dir, shot(step, model, optimizers, group), group)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def well(ended):
    assert [one.status for one in ended] == [0] * len(ended), "".join(one.err for one in ended)


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, SMALL), (2, SMALL), (2, tensor_files.FILE_BYTES), (3, SMALL), pytest.param(4, SMALL, marks=pytest.mark.scale)],
)
def test_any_number_of_ranks_reads_all_of_it_and_writes_the_same_bytes(tmp_path, run_ranks, monkeypatch, count, size):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", size)
    folder = save(tmp_path / "one", 7, *build(seed=7))

    def work(rank):
        group = join()
        model, optimizers = build(group)
        checkpoint.load(folder, model, optimizers, group)
        assert holds(model, optimizers, 7)
        with torch.no_grad():
            model.eval()(torch.arange(12)[None])
        assert not all(isinstance(p, DTensor) for p in model.parameters())  # FSDP2 leaves some gathered, for a backward pass
        save(tmp_path / "many", 7, model, optimizers, group)
        with torch.no_grad():
            model(torch.arange(12)[None])
        checkpoint.load(folder, model, optimizers, group)
        assert holds(model, optimizers, 7)
        found = {name: one for name, one in tensors(model, optimizers).items() if not name.endswith((".step", "correction_bias"))}
        assert len(found) > 40 and all(isinstance(one, DTensor) for one in found.values())
        weights, _ = build(group)
        load_weights(folder / "model", weights, group)
        assert all(rows(tensor, value(name, tensor.shape, 7)) for name, tensor in weights.state_dict().items())

    well(run_ranks(count, work))
    one, many = content(folder), content(tmp_path / "many/checkpoints/step-7")
    assert one == many
    names = [name for name in one if name.endswith(".safetensors")]
    assert len(names) == 2 if size > SMALL else len(names) > 20
    model, optimizers = build()
    checkpoint.load(tmp_path / "many/checkpoints/step-7", model, optimizers)
    assert holds(model, optimizers, 7)


class Peak(TorchDispatchMode):
    """The bytes of tensors that were made within and lived at once, at most."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                self.count(tensor.untyped_storage(), tree_leaves((arguments, keywords)))
        return result

    def count(self, storage, arguments):
        key, size = storage._cdata, storage.nbytes()
        given = {t.untyped_storage()._cdata for t in arguments if type(t) is torch.Tensor}
        if key in self.seen or key in given:
            return
        self.seen[key] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.now -= self.seen.pop(key, 0)


@pytest.mark.scale
def test_no_rank_holds_more_than_its_own_part_and_one_whole_tensor(tmp_path, run_ranks, monkeypatch):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 400_000)
    monkeypatch.setattr(ranks, "BLOCK", 512)
    largest = 4 * 3000 * 32  # of the embeddings and of the head

    def work(rank):
        group = join()
        model, optimizers = build(group, seed=1, vocab_size=3000)
        with Peak() as copied:
            taken = shot(1, model, optimizers, group)
        own = sum(one.local.nbytes for one in (*taken.weights.values(), *taken.optimizer.values()))
        assert own <= copied.most < 1.1 * own < 3 * largest
        with Peak() as written:
            checkpoint.write(tmp_path, taken, group)
        assert written.most < 1.2 * largest <= 1.2 * max(ranks.exchange(group, written.most)), written.most

        with Peak() as read:
            checkpoint.load(tmp_path / "checkpoints/step-1", model, optimizers, group)
        assert read.most < 1.2 * largest, read.most
        assert holds(model, optimizers, 1)

    well(run_ranks(4, work))


def failing(rank, at, error=errno.ENOSPC):
    """On this rank file operation number `at` fails, counted from 0, and all later ones."""
    perform, numbers = files.perform, itertools.count()

    def wrapped(operation, *arguments):
        if distributed.get_rank() == rank and next(numbers) >= at:
            raise OSError(error, os.strerror(error), str(arguments[0]))
        return None if operation is os.fsync else perform(operation, *arguments)

    return wrapped


def fail(tmp_path, run_ranks, monkeypatch, points):
    """Saves on three ranks, of which one fails from an operation on, for each (rank, operation): all raise, and the older
    checkpoint stays. Then one that does not fail."""
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 60_000)

    def work(rank):
        group = join()
        model, optimizers = build(group, seed=1)
        save(tmp_path, 1, model, optimizers, group)
        finished = set()
        for broken, at in points:
            if broken in finished:
                continue
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files, "perform", failing(broken, at))
                try:
                    save(tmp_path, 2, model, optimizers, group)
                    finished.add(broken)  # it has no more operations
                    assert at > 6
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    assert f"could not be written (rank {broken}: [Errno 28] No space left" in str(error)
                    assert "(step-1) are as they were" in str(error)
            distributed.barrier()
            if rank == 0:
                assert checkpoint.validate(tmp_path / "checkpoints/step-1") == []
                for folder in (tmp_path / "checkpoints").glob("*step-2*"):  # of a disk that also fails to delete
                    assert "unfinished" in folder.name or checkpoint.validate(folder) == []
                    files.remove(folder)
            distributed.barrier()
        save(tmp_path, 2, model, optimizers, group)
        assert len(points) < 10 or len(finished) == 3

    well(run_ranks(3, work, limit=300))
    model, optimizers = build()
    checkpoint.load(tmp_path / "checkpoints/step-2", model, optimizers)
    assert holds(model, optimizers, 1)


def test_a_disk_that_fails_on_any_rank_ends_the_save_of_all_and_leaves_the_older_checkpoint(tmp_path, run_ranks, monkeypatch):
    fail(tmp_path, run_ranks, monkeypatch, [(0, 0), (0, 15), (1, 0), (2, 3)])


@pytest.mark.faults
def test_a_disk_that_fails_on_any_rank_at_any_operation(tmp_path, run_ranks, monkeypatch):
    fail(tmp_path, run_ranks, monkeypatch, list(itertools.product(range(3), range(100))))


def test_what_else_fails_on_one_rank_is_told_on_all(tmp_path, run_ranks, monkeypatch):
    remove = files.remove

    def work(rank):
        group = join()
        model, optimizers = build(group, seed=1)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ranks.RanksError, match="rank 1: MemoryError: none left"):
            if rank == 1:
                patch.setattr(tensor_files, "_most_received", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
            save(tmp_path, 1, model, optimizers, group)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=r"rank 1: \[Errno 5\] broken for once"):
            if rank == 1:
                patch.setattr(files, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken for once")))
            patch.setattr(
                files, "remove", lambda path: time.sleep(0.2) or remove(path) if rank == 0 else pytest.fail("by rank 1")
            )
            save(tmp_path, 1, model, optimizers, group)
        distributed.barrier()
        assert not list((tmp_path / "checkpoints").iterdir())
        with pytest.raises(OSError, match=r"rank 1: .*run_dir must be on a disk that all ranks share: .*elsewhere"):
            save(tmp_path / ("elsewhere" if rank == 1 else "here"), 1, model, optimizers, group)
        folder = save(tmp_path, 1, model, optimizers, group)
        distributed.barrier()
        seen = tmp_path / "absent" if rank == 1 else folder
        with pytest.raises(ValueError, match=r"^rank 1: .*absent"):
            checkpoint.load(seen, model, optimizers, group)
        with pytest.raises(ValueError, match=r"^rank 1: .*absent"):
            load_weights(seen / "model", model, group)

    well(run_ranks(2, work))


def test_a_save_goes_on_behind_the_collectives_of_the_training(tmp_path, run_ranks, monkeypatch):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", SMALL)

    def work(rank):
        group = join()
        model, optimizers = build(group, seed=1)
        taken = shot(1, model, optimizers, group)
        for tensor in tensors(model, optimizers).values():
            rows(tensor, torch.zeros(tensor.shape), copy=True)  # the training has gone on
        saving = threading.Thread(target=checkpoint.write, args=(tmp_path, taken, group))
        saving.start()
        for number in itertools.count():
            busy = torch.tensor([float(saving.is_alive())])
            distributed.all_reduce(busy)
            if number % 20 == 0:
                other = ranks.patient_group()
                assert ranks.exchange(other, rank) == [0, 1]
                distributed.destroy_process_group(other)
            if busy == 0:
                break

    well(run_ranks(2, work))
    model, optimizers = build()
    checkpoint.load(checkpoint.newest(tmp_path), model, optimizers)
    assert holds(model, optimizers, 1)


def killed_in_a_save(tmp_path, run_ranks, victim, at):
    """Two ranks save step 1, then step 2, in which one is killed after its file operation `at`; None: not at all. What is left
    is whole. Returns the number of operations."""
    run = tmp_path / f"run-{victim}-{at}"
    listed = tmp_path / "operations"

    def work(rank):
        group = join()
        save(run, 1, *build(group, seed=1), group)
        numbers, perform = itertools.count(1), files.perform

        def wrapped(operation, *arguments):
            result = None if operation is os.fsync else perform(operation, *arguments)
            number = next(numbers)
            if rank == victim:
                listed.write_text(str(number))
                if number == at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        files.perform = wrapped
        save(run, 2, *build(group, seed=2), group)

    ended = run_ranks(2, work)
    if at is not None:
        assert ended[victim].status == -signal.SIGKILL
    found = checkpoint.newest(run)
    assert at is not None or found.name == "step-2"
    model, optimizers = build()
    assert checkpoint.load(found, model, optimizers)["step"] == int(found.name[-1])
    assert holds(model, optimizers, int(found.name[-1]))
    checkpoint.rewind(run, found)
    assert not list((run / "checkpoints").glob(".*"))
    return int(listed.read_text())


@pytest.mark.parametrize(("victim", "at"), [(0, 12), (1, 3)])
def test_a_rank_that_is_killed_in_a_save_leaves_a_whole_checkpoint(tmp_path, run_ranks, monkeypatch, victim, at):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 100_000)
    killed_in_a_save(tmp_path, run_ranks, victim, at)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_a_rank_that_is_killed_after_any_file_operation_of_a_save_leaves_a_whole_checkpoint(
    tmp_path, run_ranks, monkeypatch, part, record_property
):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 100_000)
    points = [(victim, at) for victim in (0, 1) for at in range(1, killed_in_a_save(tmp_path, run_ranks, victim, None) + 1)]
    assert len(points) > 40
    for victim, at in points[part::PARTS]:
        killed_in_a_save(tmp_path, run_ranks, victim, at)
        record_property("kill points of a sharded save, one of 2 ranks, recovered", 1)
