"""What every model class has from its base: opening a folder with `from_pretrained`, and the first values of weights."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hybridlm.checkpoint import check_folder, check_shards, weight_faults
from hybridlm.configuration import CLASSIFIER, HybridLMConfig
from hybridlm.mixers.mamba import FromRank, Mamba
from hybridlm.mixers.mamba2 import GatedNorm, Mamba2
from hybridlm.mixers.moe import Router
from hybridlm.mixers.parts import IntoResidual, KeepsWide, RMSNorm


class HybridLMPreTrainedModel(PreTrainedModel):
    config: HybridLMConfig
    config_class = HybridLMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias", "e_score_correction_bias"]
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]  # Nemotron 3's heads for several tokens at once, which this model has not
    _supports_sdpa = True
    _is_stateful = True  # a recurrent state cannot be rolled back, which assisted generation would do

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args, **kwargs) -> Any:
        """Opens a folder that this library, transformers or NVIDIA wrote, or a name on the hub; arguments as in transformers.

        Args:
            backend: the operators' (`auto`, `eager`, `fused`, `naive`).
            dtype: of the weights; A_log, D, dt_bias and the router's bias are fp32 in any case.
            output_loading_info, ignore_mismatched_sizes: as in transformers, and then weights that do not fit are the caller's.

        Raises:
            ValueError: no model there, weights outside its folder, or weights that are missing, unknown or of another shape: all
                of them listed.
        """
        name = pretrained_model_name_or_path
        if name is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(name, *args, **kwargs)
        if kwargs.get("use_safetensors") is False:
            raise ValueError("weights are read from safetensors files alone: others can run code when opened.")
        check_folder(name, kwargs.get("subfolder", ""))
        download = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "variant")
        lenient = kwargs.get("ignore_mismatched_sizes", False)
        wants_info = kwargs.pop("output_loading_info", False)
        listed = {"output_loading_info": True, "ignore_mismatched_sizes": lenient or not wants_info, "use_safetensors": True}
        path = Path(name).expanduser()
        try:
            check_shards(name, **{key: kwargs[key] for key in download if key in kwargs})
            loaded: Any = super().from_pretrained(path if path.exists() else name, *args, **kwargs | listed)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name} is no checkpoint: {error}") from None
        except (RuntimeError, MemoryError) as error:
            if "allocate" not in str(error):
                raise
            raise ValueError(f"{name} cannot be opened, its config.json asks for more memory than there is: {error}") from error
        model, info = loaded
        for module in model.modules():
            if isinstance(module, KeepsWide):  # a few numbers that were not converted would keep the whole file in memory
                for wide in (getattr(module, wide) for wide in module.WIDE):
                    wide.data = wide.data.clone()
        if wants_info:
            return model, info
        faults = weight_faults(info | ({"mismatched_keys": []} if lenient else {}))
        if faults and model.config.architectures == [CLASSIFIER]:
            raise ValueError(
                f"{name} is a classifier (data.label_column) and has no head of a language model; open it with "
                "AutoModelForSequenceClassification."
            )
        if faults:
            raise ValueError(f"the weights of {name} do not fit its config.json; {'; '.join(faults)}.")
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation of every weight there is (facts in Mamba-2's and Nemotron-H's own code)."""
        c = self.config
        if isinstance(module, FromRank):
            init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            into_residual = c.rescale_prenorm_residual and isinstance(module, IntoResidual)
            init.normal_(module.weight, std=c.initializer_range / (math.sqrt(c.num_hidden_layers) if into_residual else 1))
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            bound = 1 / math.sqrt(c.conv_kernel)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (Mamba, Mamba2)):
            heads, decays = module.dt_bias.shape, module.A_log.shape
            if isinstance(module, Mamba):  # the rows of a state forget at different rates (S4D-Real, arXiv 2206.11893)
                init.copy_(module.A_log, torch.arange(1.0, decays[1] + 1).log().expand(decays))
            else:
                init.copy_(module.A_log, torch.empty(decays).uniform_(c.A_init_min, c.A_init_max).log())
            init.ones_(module.D)
            low, high = math.log(c.time_step_min), math.log(c.time_step_max)
            dt = torch.empty(heads).uniform_(low, high).exp().clamp(min=c.time_step_floor)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        elif isinstance(module, nn.RNNCellBase):
            # Glorot & Bengio 2010; orthogonal for each gate (Saxe et al. 2014), but the identity for ReLU (Le et al. 2015).
            init.xavier_uniform_(module.weight_ih)
            n, relu = module.hidden_size, isinstance(module, nn.RNNCell) and module.nonlinearity == "relu"
            gates = [torch.empty(n, n) for _ in range(module.weight_hh.shape[0] // n)]
            init.copy_(module.weight_hh, torch.cat([nn.init.eye_(w) if relu else nn.init.orthogonal_(w) for w in gates]))
            bias = torch.zeros(module.bias_ih.shape)
            if isinstance(module, nn.LSTMCell):  # Gers et al. 2000; Jozefowicz et al. 2015
                bias[n : 2 * n] = c.lstm_forget_bias
            init.copy_(module.bias_ih, bias)
            init.zeros_(module.bias_hh)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=c.initializer_range)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, (RMSNorm, GatedNorm)):
            init.ones_(module.weight)
