"""What the steps of a run make smaller, as its configuration says: the next-token loss, or the distance from a teacher."""

from collections.abc import Callable
from functools import partial

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from hybridlm.classification import AnyModel
from train import distillation, top_logits
from train.ranks import everywhere
from train.settings import RunConfig

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def next_token_loss(model: nn.Module, batch: dict[str, Tensor], **settings: float) -> Tensor:
    """Nats of every position (b t), 0 where there is no target."""
    return model(**batch, **settings).loss


def objective(
    config: RunConfig,
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    mesh: DeviceMesh | None,
    group: ProcessGroup | None,
) -> Loss:
    """What makes of a model, wrapped or not, and a batch the loss of every position (b t), 0 where there is no target.

    Args:
        model: the run's, before any step. mesh: the ranks that share it, and `group`, the same over gloo; None: it is whole.

    Raises:
        ValueError: a teacher that this model cannot learn from, or logits on disk that are not whole.
    """
    if config.distill.teacher is not None:
        teacher = distillation.open_teacher(config, model.config.vocab_size, tokenizer, accelerator.device, mesh, group)
        return distillation.from_teacher(config, teacher, model.config)
    if config.distill.logits is not None:
        kept = top_logits.open_logits(config.distill.logits)
        everywhere(accelerator, lambda: top_logits.verify(kept) if accelerator.is_main_process else None)
        return distillation.from_logits(config)
    return partial(next_token_loss, z_loss=config.optim.z_loss) if config.optim.z_loss else next_token_loss
